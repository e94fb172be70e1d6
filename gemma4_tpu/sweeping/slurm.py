"""A sweep's job on a SLURM cluster: a batch job that requeues itself after a preemption or a time limit.

The parent follows the files that a job writes on the shared file system and polls `squeue`. A job needs no parent: it
continues, and is requeued, whether or not one is running.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from gemma4_tpu.children import end_with_parent
from gemma4_tpu.config.sweeps import Slurm
from gemma4_tpu.errors import PREEMPTED, TERMINATED, UserError
from gemma4_tpu.sweeping.job_process import Child

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_QUESTIONS = 5.0
_ANSWER_SECONDS = 60
_GONE_AFTER = 3
"""Number of polls without a job before it counts as gone: files take a while to appear on a shared file system."""
_BODY = """
srun --kill-on-bad-exit=1 {command} < /dev/null
code=$?
if [[ $code == {preempted} || $code == {terminated} ]] && [[ ! -e {stop} ]] \\
    && (( ${{SLURM_RESTART_COUNT:-0}} < {max_restarts} )) && scontrol requeue "$SLURM_JOB_ID"; then
  sleep 3600  # until SLURM ends this script, which starts again
fi
echo $code > {exit}.new && mv {exit}.new {exit}
"""


class Queue:
    """SLURM's commands on this machine."""

    def __init__(self) -> None:
        """Raises `UserError` if they are not installed."""
        if missing := [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]:
            raise UserError(
                f"hydra/launcher=slurm: there is no {missing[0]} on this machine; start the sweep on a node of the"
                " cluster, such as its login node"
            )
        self._jobs: dict[int, tuple[str, str]] = {}
        self.asked = 0
        """How often `squeue` has answered."""
        self._asked_at = float("-inf")

    def submit(self, script: Path) -> int:
        """Submits a script and returns the job's id. Raises `UserError` with SLURM's reason."""
        done = _run("sbatch", "--parsable", str(script))
        if done.returncode:
            raise UserError(f"hydra/launcher=slurm: {' '.join(done.stderr.split())} ({script})")
        return int(done.stdout.strip().partition(";")[0])

    def jobs(self) -> dict[int, tuple[str, str]]:
        """Id → (state, script) of this user's waiting and running jobs, some seconds old; unchanged while SLURM's
        controller does not respond.
        """
        if time.monotonic() - self._asked_at > _SECONDS_BETWEEN_QUESTIONS:
            self._asked_at = time.monotonic()
            done = _run("squeue", "--me", "--noheader", "--format=%A %T %o")
            if done.returncode == 0:
                self.asked += 1
                lines = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.strip()]
                self._jobs = {int(number): (state, script) for number, state, script in lines}
            else:
                log.debug("squeue: %s", done.stderr.strip())
        return self._jobs

    def cancel(self, number: int, *flags: str) -> None:
        """`scancel`."""
        _run("scancel", *flags, str(number))


class SlurmChild(Child):
    """A batch job."""

    def __init__(self, number: int, script: Path, log_path: Path, run_dir: Path, queue: Queue):
        super().__init__(number, log_path, run_dir)
        self._exit, self._stop, self._queue = _exit(script), _stop(script), queue
        self._missing_since: int | None = None

    @classmethod
    def submit(
        cls, name: str, command: Sequence[str], script: Path, log_path: Path, run_dir: Path, settings: Slurm,
        queue: Queue,
    ) -> SlurmChild:  # fmt: skip
        """Submits a job. Raises `UserError` if SLURM refuses it."""
        for folder in (script.parent, log_path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        for left in (_exit(script), _stop(script)):
            left.unlink(missing_ok=True)
        script.touch(mode=0o700)  # its words can contain secrets
        script.write_text(batch_script(name, command, script, log_path, settings), encoding="utf-8")
        return cls(queue.submit(script), script, log_path, run_dir, queue)

    @classmethod
    def of(cls, script: Path, log_path: Path, run_dir: Path, queue: Queue) -> SlurmChild | None:
        """The job that an earlier parent submitted, if SLURM still has it, by its script: a parent can be killed before
        it has kept the number.
        """
        found = [number for number, (_, other) in queue.jobs().items() if other == str(script)]
        return cls(min(found), script, log_path, run_dir, queue) if found else None

    def poll(self) -> int | None:
        """As `Child.poll`; -9 if it has left the queue without an exit code."""
        if self._exit.is_file():
            return int(self._exit.read_text(encoding="utf-8"))
        if self.pid in self._queue.jobs():
            self._missing_since = None
            return None
        if self._missing_since is None:
            self._missing_since = self._queue.asked
        return -signal.SIGKILL if self._queue.asked - self._missing_since >= _GONE_AFTER else None

    def terminate(self) -> None:
        """As `Child.terminate`; the job is not requeued then."""
        self._stop.touch()
        state, _ = self._queue.jobs().get(self.pid, ("", ""))
        self._queue.cancel(self.pid, *(["--signal=TERM"] if state == "RUNNING" else []))

    def kill(self) -> None:
        """As `Child.kill`."""
        self._stop.touch()
        self._queue.cancel(self.pid)

    def error(self) -> str:
        """As `Child.error`."""
        if self.poll() == -signal.SIGKILL:
            return f"SLURM's job {self.pid} is gone without an exit code: cancelled, out of time, or its node failed"
        return super().error()


def batch_script(name: str, command: Sequence[str], script: Path, log_path: Path, settings: Slurm) -> str:
    """The script for `sbatch`: named after the job's overrides, with a signal to save before the time limit."""
    place = [f"--partition={settings.partition}"] if settings.partition else []
    flags = [
        f"--job-name={name}", f"--output={str(log_path).replace('%', '%%')}", "--open-mode=append", "--requeue",
        f"--nodes={settings.nodes}", "--ntasks-per-node=1", f"--time={settings.timeout_min}",
        f"--signal=USR2@{settings.save_seconds}", *place, *settings.sbatch,
    ]  # fmt: skip
    body = _BODY.format(
        command=shlex.join(command), preempted=PREEMPTED, terminated=TERMINATED, max_restarts=settings.max_restarts,
        stop=shlex.quote(str(_stop(script))), exit=shlex.quote(str(_exit(script))),
    )  # fmt: skip
    return "\n".join(["#!/bin/bash", *[f"#SBATCH {flag}" for flag in flags], body])


def _exit(script: Path) -> Path:
    return script.with_name(f"{script.name}.exit")


def _stop(script: Path) -> Path:
    return script.with_name(f"{script.name}.stop")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False, preexec_fn=end_with_parent
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: no answer within {_ANSWER_SECONDS} s")
