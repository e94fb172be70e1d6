"""`python -m gemma4_tpu.merge run=<run folder>`: a trained run as a model that others can load.

Configuration → runs, bases and targets checked → each written beside its target, compared, renamed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from gemma4_tpu.config.entries import MERGE
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.merge_checks import MergeChecked
from gemma4_tpu.config.schema import MergeRoot
from gemma4_tpu.errors import UserError

if TYPE_CHECKING:
    from gemma4_tpu.export.job import Job

log = logging.getLogger(__name__)
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 published, 2 refused or failed the comparison (one message on stderr), 130 interrupted."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # an export leaves accelerators to others
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # blocks of rows are worked on in parallel instead
    try:
        return _run(load(list(sys.argv[1:] if argv is None else argv), MERGE))
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the file it was at", file=sys.stderr)
        return INTERRUPTED


def _run(loaded: Loaded[MergeRoot, MergeChecked]) -> int:
    """Exports every run; one that fails does not keep the others from being exported."""
    from gemma4_tpu.export.job import prepare_all
    from gemma4_tpu.tracking.logs import setup_logging

    setup_logging()
    jobs = prepare_all(loaded.checked.runs, loaded.root.export)
    failures = []
    for job in jobs:
        try:
            _export(job, loaded, several=len(jobs) > 1)
        except UserError as failure:
            failures.append(f"{job.trained.run.path}: {failure}" if len(jobs) > 1 else str(failure))
    if failures:
        raise UserError("\n".join(failures))
    return 0


def _export(job: Job, loaded: Loaded[MergeRoot, MergeChecked], *, several: bool) -> None:
    """One export and its record: configuration, provenance, log, delta norms, parity, result."""
    from gemma4_tpu.tracking import provenance
    from gemma4_tpu.tracking.files import write_json
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.run import RunFolder

    config, run = loaded.root, job.trained.run.path
    run_dir = f"{config.run_dir}/{run.name}" if config.run_dir and several else config.run_dir
    with job.reserved():
        record = RunFolder.open(run, config.name, run_dir, "auto", config=asdict(config), overrides=loaded.overrides)
        setup_logging(record.log_path)
        try:
            fingerprints = {"base": job.trained.base.fingerprint, "checkpoint": job.trained.state.identity}
            provenance.record(record, provenance.capture(hardware={}, seeds={}, fingerprints=fingerprints))
            result = job.run(record)
            write_json(record.result_path, result)
        except Exception as error:
            failed = {"status": "failed", "error": (str(error) or repr(error)).splitlines()[0]}
            with suppress(OSError):  # a disk that is full takes no record either
                write_json(record.result_path, failed)
            raise
        finally:
            record.close()
    for kind, target in result["targets"].items():
        print(f"{kind}: {target}")


if __name__ == "__main__":
    sys.exit(main())
