"""`python -m gemma4_tpu.merge run=<run folder>`: exports a trained run as a model that other tools can load.

Configuration → checks of runs, bases and targets → each export is written next to its target, compared, renamed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import Loaded, from_yaml, load
from gemma4_tpu.config.tasks import MergeRoot
from gemma4_tpu.errors import Ended, UserError, exit_code, first_line, leave
from gemma4_tpu.export.checks import MergeChecked, examine_merge, normalise_merge

if TYPE_CHECKING:
    from gemma4_tpu.export.job import ExportJob
    from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)


MERGE: EntryPoint[MergeRoot, MergeChecked] = EntryPoint(
    name="merge",
    schema=MergeRoot,
    normalise=normalise_merge,
    examine=examine_merge,
    summary=(
        "Export a run as a merged checkpoint, a PEFT adapter, or both. Writes next to the target, compares with the"
        " LoRA model, then renames."
    ),
    examples=(
        ("run=outputs/train/<run>", "the run's last checkpoint, to outputs/train/<run>/merged"),
        ("run=outputs/train/<run> export=both checkpoint=best", "merged and PEFT, at the lowest held-out loss"),
        ("run=outputs/train/<run> target=gs://bucket/model", "to a bucket"),
        ("run=multirun/<name>/<sweep>", "every finished run of a sweep"),
        ("run=outputs/train/<run> push_to_hub=owner/name", "upload it too (needs HF_TOKEN)"),
    ),
    shorthands={key: f"export.{key}" for key in ("checkpoint", "target", "overwrite", "verify", "push_to_hub")},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 published, 2 refused or failed the comparison (one message on stderr), 130 or 143 interrupted."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # an export needs no accelerator
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # blocks of rows run in parallel instead
    return exit_code(
        lambda: run(load(list(sys.argv[1:] if argv is None else argv), MERGE)).code,
        interrupted="interrupted; the same command resumes at the file that it was writing",
    )


def run(loaded: Loaded[MergeRoot, MergeChecked]) -> Ended:
    """Exports every run; a failure does not stop the others."""
    from gemma4_tpu.export.job import prepare_all
    from gemma4_tpu.tracking.logs import setup_logging

    setup_logging()
    for told in loaded.checked.skipped:
        log.warning("skipped, not finished: %s", told)
    jobs = prepare_all(loaded.checked.runs, loaded.root.export)
    folders, failures = [], []
    for job in jobs:
        try:
            folders.append(_export(job, loaded, several=len(jobs) > 1))
        except UserError as failure:
            failures.append(f"{job.trained.run.path}: {failure}" if len(jobs) > 1 else str(failure))
    if failures:
        raise UserError("\n".join(failures))
    return Ended(0, tuple(folders))


def _export(job: ExportJob, loaded: Loaded[MergeRoot, MergeChecked], *, several: bool) -> Path:
    """Runs one export and keeps its record (configuration, provenance, log, delta norms, parity, result); returns its
    folder.
    """
    from gemma4_tpu.reporting.deltas import write_deltas
    from gemma4_tpu.tracking import provenance, records
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.run import RunFolder

    config, run = loaded.root, job.trained.run.path
    run_dir = f"{config.run_dir}/{run.name}" if config.run_dir and several else config.run_dir
    with job.reserved():
        record = RunFolder.open(
            run, config.name, run_dir, "auto", config=asdict(config), kind=records.MERGE, overrides=loaded.overrides
        )
        setup_logging(record.log_path)
        try:
            fingerprints = {"base": job.trained.base.fingerprint, "checkpoint": job.trained.state.identity}
            provenance.record(record, provenance.capture(hardware={}, seeds={}, fingerprints=fingerprints))
            result = job.run(record, write_deltas)
            record.leave(result)
            _track(job, record, result, asdict(config))
        except Exception as error:
            with suppress(OSError):  # a full disk takes no record either
                record.leave({"status": "failed", "error": first_line(error)})
            raise
        finally:
            record.close()
    for kind, target in result["targets"].items():
        print(f"{kind}: {target}")
    return record.path


def _track(job: ExportJob, record: RunFolder, result: dict[str, Any], config: dict[str, Any]) -> None:
    """Reports the export's location to the training run's tracker."""
    from gemma4_tpu.tracking.trackers import make_tracker

    trained = job.trained
    known = from_yaml(yaml.safe_dump({"tracker": trained.run.read_config().get("tracker", {})})).tracker
    try:
        tracker = make_tracker(known, record, config, name=f"merge of {trained.run.path.name}", job="merge")
    except UserError as refusal:  # training had a key or a package that is missing here
        log.warning("the export is not tracked: %s", refusal)
        return
    about: dict[str, Any] = {
        key: result[key] for key in ("run", "update", "base", "base_fingerprint", "parity") if key in result
    }
    for kind, target in result["targets"].items():
        tracker.artifact(kind, target, [f"update-{trained.state.update}"], about)
    tracker.summary(about)
    tracker.close()


if __name__ == "__main__":
    leave(main())
