"""`sweep.json`: what a sweep records about its jobs beyond their run folders; rewritten at every change.

```
<sweep folder>/
  <job>/           run folder of a job, named after its values: lora.rank-16+mesh-tp
  logs/<job>.log   what the job's processes printed           sweep.csv  sweep.md  plots/
  plans/           plan checks, kept for the next start       sweep.json  multirun.yaml
```
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

from gemma4_tpu.errors import DISK_FULL, UserError
from gemma4_tpu.tracking.records import SWEEP, read_record, write_record

RECORD = "sweep.json"
FINISHED, FAILED, PREEMPTED, PRUNED = "finished", "failed", "preempted", "pruned"
REFUSED, MISFIT, INTERRUPTED, WAITING, RUNNING = "refused", "does not fit", "interrupted", "waiting", "running"
LOWER_IS_BETTER, HIGHER_IS_BETTER = "minimize", "maximize"


@dataclass(kw_only=True)
class SweepJob:
    """One job of a sweep."""

    name: str
    """Name of its run folder in the sweep folder."""
    values: dict[str, str]
    """Swept key → value, as written."""
    words: list[str]
    """Its whole command line, without `run_dir`."""
    status: str = WAITING
    """`waiting`, `running`; `finished`, `pruned`; `failed`, `preempted` (more often than allowed), `interrupted` (the
    sweep was stopped; the same command resumes it); never started: `refused`, `does not fit`.
    """
    error: str | None = None
    """One line on why it has not finished."""
    starts: int = 0
    """Processes started for it, over all starts of the sweep."""
    restarts: int = 0
    """Of these, restarts after a preemption since the sweep was last started."""
    pid: int | None = None
    """Process id of its last process."""
    plan: str | None = None
    """What the plan check found, or why there was none."""


@dataclass(kw_only=True)
class Sweep:
    """A sweep folder's record."""

    folder: Path
    entry: str
    """Name of the entry point: `train`."""
    metric: str | None = None
    """Key of `result.json` that the sweep optimises, if given."""
    direction: str | None = None
    """`minimize` or `maximize`, if given."""
    jobs: dict[str, SweepJob] = field(default_factory=dict)
    """By name, in order of first mention."""

    @classmethod
    def open(cls, folder: Path, entry: str | None = None) -> Sweep:
        """Opens the record of a sweep folder, or an empty one.

        Args:
          folder: need not exist.
          entry: name of the entry point to run; None accepts any.

        Raises:
          UserError: the folder belongs to a sweep of another entry point.
        """
        path = folder / RECORD
        if not path.is_file():
            return cls(folder=folder, entry=entry or "train")
        told = read_record(path, SWEEP).values
        if entry and told["entry"] != entry:
            raise UserError(f"hydra.sweep.dir={folder}: contains a sweep of {told['entry']}; use another folder")
        known = {f.name for f in dataclasses.fields(SweepJob)}
        jobs = [SweepJob(**{k: v for k, v in job.items() if k in known}) for job in told["jobs"]]
        given = {key: told.get(key) for key in ("metric", "direction")}
        return cls(folder=folder, entry=told["entry"], jobs={job.name: job for job in jobs}, **given)

    def save(self) -> None:
        """Writes the record, atomically."""
        head = {"entry": self.entry, "metric": self.metric, "direction": self.direction}
        write_record(self.folder / RECORD, SWEEP, head | {"jobs": list(self.jobs.values())})

    def run_folder(self, job: SweepJob) -> Path:
        """The run folder of a job."""
        return self.folder / job.name

    def log_path(self, job: SweepJob) -> Path:
        """The output of a job's processes."""
        return self.folder / "logs" / f"{job.name}.log"


class SweepLock:
    """The exclusive right to run a sweep's jobs; the kernel releases it when this process ends in any way."""

    def __init__(self, folder: Path):
        """Acquires the lock.

        Raises:
          UserError: a running process holds it, or there can't be such a folder.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise UserError(
                f"{folder}: can't create this folder ({error.strerror}); give another hydra.sweep.dir"
            ) from error
        self._file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.pread(self._file, 20, 0).decode() or "unknown"
            os.close(self._file)
            raise UserError(f"{folder}: this sweep is being run by another process (pid {owner})") from error
        os.truncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def __enter__(self) -> SweepLock:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)
