"""The run folder: every entry point writes one, every later stage takes one.

```
config.yaml      the resolved configuration       log.txt        all log records
overrides.yaml   what was given on the command    metrics.jsonl  one row per logged update
provenance.json  code, packages, seeds, data      result.json    the outcome
data.json        rows, drops, fill                plots/  checkpoints/
record.json      what kind of work it is of
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

from gemma4_tpu.errors import UserError, first_line, stopped_code
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
    """Paths of one run, and the right to write there.

    Only process 0 of a run writes (`write=True`); the others are handed the path it chose. While a writer lives, no
    second one can open the folder.
    """

    def __init__(self, path: Path, *, write: bool = False, bucket: Bucket | None = None):
        self.path = path
        self.write = write
        self.bucket = bucket
        """Where the folder lives, if not here: `path` is then where its small files are worked on."""
        self.resumed = False
        """The writer found an earlier start of this run here."""
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
        """Makes a new run folder, or opens the one that `run_dir` names again.

        Args:
          root: where new folders go, such as `outputs`.
          name: `config.name`.
          run_dir: `config.run_dir`, local or gs://; None: `<root>/<name>/<date>_<time>`.
          resume: `config.checkpoint.resume`: `auto` continues in a used folder, `never` refuses it.
          config: the resolved configuration as plain values; written to `config.yaml`.
          kind: one of `records.WORK`: what the folder will be of.
          overrides: the command line's overrides; written to `overrides.yaml`.
          resume_allow: `config.checkpoint.resume_allow`: keys and groups that may differ, too.
          write: False on every process but the first; they need `run_dir`, and touch nothing.

        Raises:
          UserError: a folder that is no run folder, is in use, may not be resumed, or holds a different run.
        """
        if run_dir is None:
            if not write:
                raise ValueError("run_dir: only process 0 may choose the run folder; hand its path to the others")
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
        """Takes the right to write and begins the record, with the arguments of `open`."""
        _make(self.path)
        # Before anything is read: an earlier writer must be gone, or its record could change under our eyes.
        self._take_lock()
        if self.bucket:
            self.bucket.reach(self.bucket.pull)
        self.resumed = self.config_path.exists()
        if self.resumed:
            check_same_run(self.address, resume, self.read_config(), config, resume_allow)
            known = [path for path in (self.config_path, self.overrides_path, self.record_path) if path.exists()]
            self._earlier = {path: path.read_bytes() for path in known}
        write_text(self.config_path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        if kind != PLAN or not self.resumed:  # a plan can be in the folder of the run that it is for
            write_record(self.record_path, kind, {})
        write_text(self.overrides_path, yaml.safe_dump(redact_arguments(overrides), allow_unicode=True))
        self.plots.mkdir(exist_ok=True)
        self._ballast.write_bytes(bytes(_BALLAST_BYTES))
        if self.bucket:
            self.bucket.reach(self.bucket.push)
        else:
            Path(self.checkpoints).mkdir(exist_ok=True)

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
            raise UserError(f"{key}={path}: not a run folder (it has no config.yaml)")
        return run

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record_path(self) -> Path:
        return self.path / FOLDER

    @property
    def kind(self) -> str:
        """What it is of, one of `records.WORK`."""
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
        """What `run_dir=` or `run=` would name it by: a local path or gs://."""
        return self.bucket.remote if self.bucket else str(self.path)

    @property
    def checkpoints(self) -> str:
        return join(self.address, CHECKPOINTS)

    def push(self) -> None:
        """Copies what changed to the bucket, where the folder lives in one."""
        if self.bucket and self.write:
            self.bucket.push()

    def forget_bucket(self) -> None:
        """It is gone: from here on this machine's copy of the folder is the run."""
        if self.bucket:
            self.bucket.gone = True

    def read_config(self) -> dict[str, Any]:
        """The recorded configuration, as plain values."""
        return config_of(self.path)

    def begun(self) -> None:
        """From here on the record is of this start."""
        self._earlier.clear()

    def put_back(self) -> None:
        """Where this start came to nothing before it had `begun`: leaves the record of the one before as it was."""
        for path, content in self._earlier.items():
            if path.read_bytes() != content:  # a disk may have become full
                write_text(path, content.decode())

    def leave(self, outcome: Any) -> None:
        """Writes `result.json`, from a mapping or a dataclass, as a record of this folder's kind."""
        self._ballast.unlink(missing_ok=True)
        write_record(self.result_path, self.kind, outcome)

    def leave_result(self, result: Result) -> None:
        """Writes `result.json`, where this process writes; an outcome worse than that of a finished run never replaces
        it, and a full disk does not hide what went wrong before.
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
        """Does a job that resumes where it was, such as an evaluation, and closes the folder; returns its exit code.

        Ctrl-C is exit code 130, SIGTERM 143, and a line that says how to go on. What fails leaves its reason in
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
        """Copies what changed to the bucket, if any, and gives up the right to write."""
        try:
            if self.write:
                self._ballast.unlink(missing_ok=True)
            if self.bucket and self.write:
                self.bucket.reach(self.bucket.push)
        finally:
            self._unlock()

    @property
    def _ballast(self) -> Path:
        """What is thrown out for the result, which a full disk then still takes."""
        return self.path / ".ballast"

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """A POSIX record lock: the kernel drops it when this process ends in any way, and children don't inherit it."""
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
    """Makes `<parent>/<date>_<time>`; runs that start in the same second get `_2`, `_3`, …"""
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
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except (PermissionError, NotADirectoryError) as error:
        raise UserError(f"run_dir={path}: can't make this folder ({error.strerror}); give another run_dir") from error


def _given_folder(run_dir: str) -> Path:
    path = Path(run_dir).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir={run_dir}: there is a file of that name; give a folder")
    if path.is_dir() and not (path / "config.yaml").exists():
        visible = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        if visible:
            raise UserError(
                f"run_dir={run_dir}: not a run folder, and not empty (it holds {', '.join(visible[:3])}"
                f"{', …' if len(visible) > 3 else ''}); give a new or an empty folder, or a run folder to resume"
            )
    return path


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()
