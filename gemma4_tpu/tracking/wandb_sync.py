"""`python -m gemma4_tpu.report wandb=<run folder>`: what W&B has of a run, and the command that uploads the rest."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from gemma4_tpu.errors import UserError
from gemma4_tpu.markdown import shown
from gemma4_tpu.storage import is_remote
from gemma4_tpu.tracking.run import RunFolder


@dataclass(frozen=True)
class OfflineRecord:
    """One folder that W&B's offline mode left; a run that was resumed, or merged, has several."""

    folder: Path
    """`…/wandb/offline-run-<date>_<time>-<id>`."""
    synced: bool
    """W&B's own mark: `wandb sync` has uploaded it."""


def offline_records(folder: Path) -> list[OfflineRecord]:
    """The offline records in a run folder, or in the run folders of a sweep, oldest first."""
    found = sorted(folder.glob("**/wandb/offline-run-*"), key=lambda place: place.name)
    return [OfflineRecord(place, any(place.glob("*.wandb.synced"))) for place in found if any(place.glob("*.wandb"))]


def show(run: str) -> int:
    """Prints how the W&B records of a run folder (or of a folder of run folders, as of a sweep) are uploaded.

    Returns the exit code, 0.

    Raises:
      UserError: no such folder, or W&B keeps nothing of it.
    """
    folder = RunFolder.existing(run, key="wandb").path if is_remote(run) else Path(run).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"wandb={run}: no such folder; give a run folder, such as outputs/train/<date>_<time>")
    records = offline_records(folder)
    waiting = [record.folder for record in records if not record.synced]
    online = [place for place in folder.glob("**/wandb/run-*") if place.is_dir()]
    if not records and not online:
        raise UserError(
            f"wandb={run}: W&B has no record of it; runs keep one with tracker=wandb (metrics.jsonl has all there is)"
        )
    if online:
        print(f"{_count(len(online), 'record')} went to W&B while the run trained; where its network failed:")
        print(f"wandb sync --include-online {' '.join(shlex.quote(shown(place)) for place in sorted(online))}\n")
    if len(records) > len(waiting):
        print(f"{_count(len(records) - len(waiting), 'offline record')} uploaded before.")
    if not waiting:
        print("Nothing is left to upload.")
        return 0
    print(f"{_count(len(waiting), 'offline record')} to upload. Once, if no key is set: wandb login. Then:\n")
    print("wandb sync " + " \\\n  ".join(shlex.quote(shown(place)) for place in waiting))
    if len({place.name.rpartition("-")[2] for place in waiting}) < len(waiting):
        print("\nRecords of one run, which was resumed, go to the same W&B run in this order.")
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
