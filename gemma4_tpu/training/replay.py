"""Repeats a recorded run: reports differences from the record, and whether the losses are the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.differences import config_differences
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.provenance import Provenance, RecordDifference, compare
from gemma4_tpu.tracking.records import REPLAY, read_record, write_record
from gemma4_tpu.tracking.run import RunFolder

if TYPE_CHECKING:
    from gemma4_tpu.training.hosts import Hosts

log = logging.getLogger(__name__)

FILE = "replay.json"
LOSSES = ("loss", "heldout_loss")
_FINGERPRINTS = {
    "tokenizer": "tokenizer", "chat_template": "tokenizer", "base": "base", "start": "base", "teacher": "base",
    "rows": "data", "heldout": "data", "examples": "data", "prompts": "data",
}  # fmt: skip
"""Fingerprints of inputs; the others repeat values of the configuration."""
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Unequal:
    """A loss that differs, in nats per target token; None: there is none."""

    update: int
    key: str
    recorded: float | None
    now: float | None

    def __str__(self) -> str:
        return f"update {self.update}: {self.key} {self.recorded} → {self.now}"


class Replay:
    """The record of a run that is being repeated in another folder."""

    def __init__(self, run: str, folder: RunFolder):
        """Reads the record.

        Args:
          run: the recorded run's folder, local or gs:// (`replay=`).
          folder: the new run's.

        Raises:
          UserError: `run` has no record to compare with.
        """
        self.run, self._folder = run, folder
        recorded = RunFolder.existing(run, key="replay")
        if not recorded.provenance_path.exists():
            raise UserError(f"replay={run}: has no provenance.json: it ended before its training began")
        self._provenance = read_record(recorded.provenance_path).values
        self._metrics = read_metrics(recorded.metrics_path)
        self._losses = {(update, key): value for update, key, value in _losses(self._metrics)}
        self._agrees = True
        self._parts: dict[str, list[str]] = {}
        self._changed = {
            key: (before, now)
            for key, before, now in config_differences(recorded.read_config(), folder.read_config())
            if key not in ("replay", "replay_allow", "run_dir")
        }

    @staticmethod
    def begin(run: str | None, allow: Sequence[str], folder: RunFolder, hosts: Hosts, now: Provenance) -> Replay | None:
        """Process 0 compares with the record of `run`, if a run is to be repeated; all processes raise its refusal."""
        begun: list[Replay] = []

        def compare() -> None:
            if run is not None:
                begun.append(Replay(run, folder))
                begun[0].check(now, allow)

        hosts.from_first(compare)
        return begun[0] if begun else None

    def check(self, now: Provenance, allow: Sequence[str]) -> None:
        """Reports differences from the record.

        Args:
          now: provenance of this run.
          allow: parts that may differ (`replay_allow`).

        Raises:
          UserError: others differ; names all of them.
        """
        log.info("repeats %s", self.run)
        for key, (before, given) in self._changed.items():
            log.info("with %s=%s (recorded: %s)", key, given, before)
        self._parts = differing_parts(self._provenance, asdict(now))
        lines = [f"{part}: {'; '.join(differences)}" for part, differences in self._parts.items()]
        refused = [part for part in self._parts if part not in allow]
        if refused:
            shown = "".join(f"\n  {line}" for line in lines)
            raise UserError(
                f"replay={self.run}: differences from the recorded run:{shown}\n"
                f"restore it, or accept the differences: replay_allow=[{','.join(self._parts)}]"
            )
        for line in lines:
            log.warning("differs from the record: %s", line)

    def watch(self, row: dict[str, Any], update: int) -> None:
        """Receives the metrics of an update; warns at the first loss that differs from the recorded one."""
        for _, key, value in _losses([{**row, "update": update}]):
            recorded = self._losses.get((update, key))
            if self._agrees and recorded is not None and recorded != value:
                self._agrees = False
                log.warning("losses differ from the record from here on: %s", Unequal(update, key, recorded, value))

    def finish(self) -> None:
        """Compares all losses, including those before a resume; logs the outcome and writes `replay.json`."""
        losses = compare_losses(self._metrics, read_metrics(self._folder.metrics_path))
        told = {"of": self.run, "config": self._changed, "differences": self._parts, "losses": losses}
        write_record(self._folder.path / FILE, REPLAY, told)
        first = losses["first_difference"]
        if not losses["compared"]:
            log.warning("%s has no losses to compare with", self.run)
        elif first is None:
            log.info("losses bit-identical to the recorded ones: %d of %d", losses["compared"], losses["recorded"])
        else:
            log.warning(
                "losses differ from the record: first at %s; by at most %.3g", Unequal(**first), losses["largest"]
            )


def differing_parts(recorded: dict[str, Any], now: dict[str, Any]) -> dict[str, list[str]]:
    """Differences between two records of provenance, by part (`code`, `packages`, `data`, `tokenizer`, `base`,
    `hardware`), one per line. Machine facts that the older record lacks are only logged.
    """
    parts: dict[str, list[str]] = {}
    for difference in compare(recorded, now):
        part = _part(difference.key)
        if part is None:
            continue
        if part == "hardware" and difference.recorded is None:
            log.info("not recorded: %s (now %s)", difference.key, difference.now)
            continue
        parts.setdefault(part, []).append(_told(difference))
    if "tokenizer" in parts and all(line.startswith("examples") for line in parts.get("data", ())):
        parts.pop("data", None)  # the same rows, tokenised differently
    if "code" in parts and (recorded.get("code", {}).get("git_commit") != now["code"].get("git_commit")):
        commits = [str(record.get("code", {}).get("git_commit"))[:12] for record in (recorded, now)]
        parts["code"].append(f"commit {commits[0]} → {commits[1]}")
    return parts


def compare_losses(recorded: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compares the losses of two `metrics.jsonl`, update by update, as far as both go: their number, how many could be
    compared, the first that is not bit-identical, and the largest difference (nats per target token).
    """
    before = {(update, key): value for update, key, value in _losses(recorded)}
    after = {(update, key): value for update, key, value in _losses(now)}
    both = [place for place in before if place in after]
    unequal = [place for place in both if before[place] != after[place]]
    first = Unequal(*unequal[0], before[unequal[0]], after[unequal[0]]) if unequal else None
    return {
        "recorded": len(before),
        "compared": len(both),
        "first_difference": first and asdict(first),
        "largest": max((abs(before[place] - after[place]) for place in both), default=None),
    }


def _losses(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[int, str, float]]:
    """(update, key, value) of every loss, in order."""
    for row in rows:
        for key in LOSSES:
            if row.get(key) is not None:
                yield row["update"], key, row[key]


def _part(key: str) -> str | None:
    """The part that a provenance entry belongs to; None if the configuration determines it, or it changes nothing."""
    group, _, name = key.partition(".")
    if key in ("code.sha256", "packages.gemma4-tpu"):
        return "code"
    if group in ("packages", "python"):
        return "packages"
    if group in ("hardware", "platform"):
        return "hardware"
    return _FINGERPRINTS.get(name) if group == "fingerprints" else None


def _told(difference: RecordDifference) -> str:
    name = difference.key.partition(".")[2] or difference.key
    before, now = (_shown(value) for value in (difference.recorded, difference.now))
    return f"{name} {before} → {now}"


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
