"""The run folder: every entry point writes one, every later stage accepts one.

```
config.yaml      the resolved configuration       log.txt        all log records
overrides.yaml   what was given on the command    metrics.jsonl  one row per logged update
provenance.json  code, packages, seeds, data      result.json    the outcome
data.json        rows, drops, fill                plots/  checkpoints/
record.json      kind of work
```
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu.config.paths import not_unicode
from gemma4_tpu.data.hard_limit import leave_result_in
from gemma4_tpu.errors import DISK_FULL, UserError, first_line, stopped_code
from gemma4_tpu.redact import redact_arguments
from gemma4_tpu.storage import is_remote, join
from gemma4_tpu.tracking.bucket import CHECKPOINTS, Bucket
from gemma4_tpu.tracking.differences import check_same_run
from gemma4_tpu.tracking.files import jsonable, write_text
from gemma4_tpu.tracking.records import FOLDER, PLAN, TRAINING, config_of, kind_of, write_record
from gemma4_tpu.tracking.result import Result

log = logging.getLogger(__name__)

_BALLAST_BYTES = 32 << 10


class RunFolder:
    """Paths of one run, and the lock for writing to it.

    Only process 0 of a run writes (`write=True`); the others get the path that it chose. While a writer lives, no
    second one can open the folder.
    """

    def __init__(self, path: Path, *, write: bool = False, bucket: Bucket | None = None):
        self.path = path
        self.write = write
        self.bucket = bucket
        """The bucket of a remote folder; `path` is then a local copy of its small files."""
        self.resumed = False
        """Whether the writer found an earlier start of this run."""
        self._lock: int | None = None
        self._earlier: dict[Path, bytes] = {}

    @classmethod
    def open(
        cls,
        root: str | Path,
        name: str,
        run_dir: str | None,
        resume: str,
        *,
        config: dict[str, Any],
        kind: str = TRAINING,
        overrides: Sequence[str] = (),
        resume_allow: Sequence[str] = (),
        write: bool = True,
    ) -> RunFolder:
        """Creates a new run folder, or reopens the one that `run_dir` names.

        Args:
          root: parent of new folders, such as `outputs`.
          name: `config.name`.
          run_dir: `config.run_dir`, local or gs://; None: `<root>/<name>/<date>_<time>`.
          resume: `config.checkpoint.resume`: `auto` resumes in a used folder, `never` refuses it.
          config: the resolved configuration as plain values; written to `config.yaml`.
          kind: the folder's kind of work, one of `records.WORK`.
          overrides: the command line's overrides; written to `overrides.yaml`.
          resume_allow: `config.checkpoint.resume_allow`: further keys and groups that may differ.
          write: False on every process but the first; these need `run_dir` and write nothing.

        Raises:
          UserError: the folder is not a run folder, is in use, may not be resumed, or contains a different run.
        """
        if run_dir is None:
            if not write:
                raise ValueError("run_dir: only process 0 may choose the run folder; pass its path to the others")
            path = _new_folder(Path(root).expanduser().absolute() / name)
            bucket = None
        elif is_remote(run_dir):
            bucket = Bucket.of(run_dir, Path(root))
            path = bucket.local
        else:
            path, bucket = _given_folder(run_dir), None
        run = cls(path, write=write, bucket=bucket)
        if write:
            run._begin(resume, jsonable(config), kind, overrides, resume_allow)
        return run

    def _begin(
        self, resume: str, config: dict[str, Any], kind: str, overrides: Sequence[str], resume_allow: Sequence[str]
    ) -> None:
        """Takes the lock and begins the record, with the arguments of `open`."""
        _make(self.path)
        # Before anything is read: an earlier writer must be gone, or its record could change while we read it.
        self._take_lock()
        if self.bucket:
            self.bucket.reach(self.bucket.pull)
        self.resumed = self.config_path.exists()
        if self.resumed:
            check_same_run(self.address, resume, self.read_config(), config, resume_allow)
            known = [path for path in (self.config_path, self.overrides_path, self.record_path) if path.exists()]
            self._earlier = {path: path.read_bytes() for path in known}
        write_text(self.config_path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        if kind != PLAN or not self.resumed:  # a plan can be in the folder of its own run
            write_record(self.record_path, kind, {})
        write_text(self.overrides_path, yaml.safe_dump(redact_arguments(overrides), allow_unicode=True))
        self.plots.mkdir(exist_ok=True)
        self._ballast.write_bytes(bytes(_BALLAST_BYTES))
        if self.bucket:
            self.bucket.reach(self.bucket.push)
        else:
            Path(self.checkpoints).mkdir(exist_ok=True)
        if kind != PLAN:
            leave_result_in(self.result_path, kind)

    @classmethod
    def existing(cls, path: str | Path, key: str = "run") -> RunFolder:
        """The run folder at `path`, local or gs://, for reading. Raises `UserError` (naming `key`) if there is none."""
        if is_remote(str(path)):
            bucket = Bucket.of(str(path), Path("outputs"))
            bucket.reach(bucket.pull)
            run = cls(bucket.local, bucket=bucket)
        else:
            run = cls(Path(path).expanduser().absolute())
        if not run.config_path.is_file():
            raise UserError(f"{key}={path}: not a run folder (no config.yaml); give one")
        return run

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record_path(self) -> Path:
        return self.path / FOLDER

    @property
    def kind(self) -> str:
        """Its kind of work, one of `records.WORK`."""
        return kind_of(self.path) or TRAINING

    @property
    def overrides_path(self) -> Path:
        return self.path / "overrides.yaml"

    @property
    def provenance_path(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def data_path(self) -> Path:
        return self.path / "data.json"

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def address(self) -> str:
        """Its address for `run_dir=` or `run=`: a local path or gs://."""
        return self.bucket.remote if self.bucket else str(self.path)

    @property
    def checkpoints(self) -> str:
        return join(self.address, CHECKPOINTS)

    def push(self) -> None:
        """Copies changes to the bucket, if the folder is in one."""
        if self.bucket and self.write:
            self.bucket.push()

    def forget_bucket(self) -> None:
        """Gives up an unreachable bucket: from here on, this machine's copy of the folder is the run."""
        if self.bucket:
            self.bucket.gone = True

    def read_config(self) -> dict[str, Any]:
        """The recorded configuration, as plain values."""
        return config_of(self.path)

    def begun(self) -> None:
        """Marks the record as that of this start from here on."""
        self._earlier.clear()

    def put_back(self) -> None:
        """If this start failed before it had `begun`, restores the record of the previous one."""
        for path, content in self._earlier.items():
            if path.read_bytes() != content:  # the disk may be full
                write_text(path, content.decode())

    def leave(self, outcome: Any) -> None:
        """Writes `result.json`, from a mapping or a dataclass, as a record of this folder's kind."""
        self._ballast.unlink(missing_ok=True)
        write_record(self.result_path, self.kind, outcome)

    def leave_result(self, result: Result) -> None:
        """Writes `result.json`, if this process writes. An outcome never replaces a better one of a finished run, and a
        full disk does not hide an earlier error.
        """
        if not self.write:
            return
        self._ballast.unlink(missing_ok=True)
        if result.status == "finished":
            return result.write(self.result_path)
        try:
            if not (self.result_path.exists() and Result.read(self.result_path).status == "finished"):
                result.write(self.result_path)
        except (OSError, ValueError) as error:
            log.warning("%s: can't be written (%s)", self.result_path, error)

    def work(self, job: Callable[[], int]) -> int:
        """Runs a job that can resume, such as an evaluation, and closes the folder; returns the exit code.

        Ctrl-C gives exit code 130, SIGTERM 143, both with a line on how to resume. A failure leaves its reason in
        `result.json`.
        """
        try:
            return job()
        except KeyboardInterrupt as stop:
            print(f"\ninterrupted; the same command with run_dir={self.path} resumes it", file=sys.stderr)
            return stopped_code(stop)
        except Exception as error:
            self.leave({"status": "failed", "error": first_line(error)})
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Copies changes to the bucket, if any, and releases the lock."""
        leave_result_in(None)
        try:
            if self.write:
                self._ballast.unlink(missing_ok=True)
            if self.bucket and self.write:
                self.bucket.reach(self.bucket.push)
        finally:
            self._unlock()

    @property
    def _ballast(self) -> Path:
        """A file that is deleted to make room for the result on a full disk."""
        return self.path / ".ballast"

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """Takes a POSIX record lock: the kernel releases it however this process ends; children don't inherit it."""
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.pread(self._lock, 20, 0).decode() or "unknown"
            self._unlock()
            raise UserError(
                f"run_dir={self.address}: in use by a running process (pid {owner}); wait for it, or give another"
                " run_dir"
            ) from error
        except OSError as error:
            log.warning("%s: no file locks here (%s); do not start this run twice at once", self.path, error)
            return
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)


def _new_folder(parent: Path) -> Path:
    """Creates `<parent>/<date>_<time>`; runs that start in the same second get `_2`, `_3`, …"""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    attempt = 1
    while True:
        path = parent / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            _make(path, exist_ok=False)
            return path
        except FileExistsError:
            attempt += 1


def _make(path: Path, exist_ok: bool = True) -> None:
    if (problem := not_unicode(str(path))) is not None:  # the current folder's name, too
        raise UserError(f"run_dir={problem}")
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if error.errno in DISK_FULL or isinstance(error, FileExistsError):
            raise
        raise UserError(f"run_dir={path}: can't create this folder ({error.strerror}); give another run_dir") from error


def _given_folder(run_dir: str) -> Path:
    path = Path(run_dir).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir={run_dir}: is a file; give a folder")
    if path.is_dir() and not (path / "config.yaml").exists():
        visible = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        if visible:
            raise UserError(
                f"run_dir={run_dir}: not a run folder, and not empty (it contains {', '.join(visible[:3])}"
                f"{', …' if len(visible) > 3 else ''}); give a new or an empty folder, or a run folder to resume"
            )
    return path


def is_run(folder: Path) -> bool:
    """Whether a folder is a training run's."""
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()
