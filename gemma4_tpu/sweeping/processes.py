"""Runs a sweep's jobs, each in its own process: one after the other, or concurrently if devices allow."""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.lists import as_word
from gemma4_tpu.config.load import load
from gemma4_tpu.config.outputs import TrackerConfig
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.config.sweeps import Processes, Slurm
from gemma4_tpu.errors import INTERRUPTED, PREEMPTED, TERMINATING, UserError
from gemma4_tpu.sweeping import state
from gemma4_tpu.sweeping.display import Display
from gemma4_tpu.sweeping.job_process import Child
from gemma4_tpu.sweeping.plan_check import check_fit
from gemma4_tpu.sweeping.sites import site_of
from gemma4_tpu.sweeping.state import Sweep, SweepJob
from gemma4_tpu.tracking.differences import config_differences
from gemma4_tpu.tracking.files import jsonable
from gemma4_tpu.tracking.progress import format_seconds
from gemma4_tpu.tracking.records import config_of, result_of

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGHUP, *TERMINATING)
_SAME_RESULT = (
    "checkpoint.", "distributed.", "name", "preview", "run_dir", "storage.", "tracker.", "trainer.compile_cache",
    "trainer.log_every", "trainer.stall_seconds",
)  # fmt: skip
"""A finished job is not rerun because of differences in these."""

Monitor = Callable[[SweepJob, dict[str, Any]], str | None]
"""Receives each new row of a job's `metrics.jsonl`; returns a reason if the job is to be stopped."""


class Stop:
    """Counts SIGINT, SIGHUP, SIGTERM, SIGUSR1 and SIGUSR2 while open, as a context manager (main thread only).

    The first asks the jobs to save, the second kills them. A signal that was ignored before, as `nohup` does with
    SIGHUP, stays ignored.
    """

    def __init__(self) -> None:
        self.count = 0
        self.exit_code = 0
        """The sweep's exit code: 130 after Ctrl-C, 42 after SIGTERM (the same command resumes it); 0: not stopped."""

    def __enter__(self) -> Stop:
        self._before: dict[int, Any] = {}
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        self.count += 1
        self.exit_code = self.exit_code or (INTERRUPTED if number == signal.SIGINT else PREEMPTED)


@dataclass
class _RunningJob:
    job: SweepJob
    child: Child
    share: dict[str, str]


class Runner:
    """The jobs of one sweep folder. `stop` says whether the sweep is being stopped, and with which exit code."""

    def __init__(
        self, sweep: Sweep, entry: EntryPoint, settings: Processes | Slurm, stop: Stop,
        monitor: Monitor = lambda job, row: None,
    ):  # fmt: skip
        self.sweep, self._entry, self.settings, self.stop, self._monitor = sweep, entry, settings, stop, monitor

    def run(self, jobs: Sequence[SweepJob]) -> None:
        """Runs every job until it ends or is stopped, and sets its `status`. Saves the record along the way.

        Raises:
          UserError: `settings` are invalid, or the jobs would compete for an accelerator.
        """
        if self.settings.max_restarts < 0:
            raise UserError(f"hydra.launcher.max_restarts={self.settings.max_restarts}: must be at least 0")
        for job in jobs:
            self.sweep.jobs[job.name] = job
        self._site = site_of(self.sweep, self.settings)
        configs = self._checked(jobs)
        free = self._site.shares(list(configs.values()))
        # Jobs that an earlier process of this sweep left running are taken over before new ones start.
        waiting = deque(sorted(self._prepared(jobs, configs), key=lambda job: self._site.running(job) is None))
        self.sweep.save()
        running: list[_RunningJob] = []
        try:
            with Display() as display:
                while running or (waiting and not self.stop.count):
                    while waiting and free and not self.stop.count:
                        running.append(self._start(waiting.popleft(), free.pop(0), display))
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    if self.stop.count and self._site.outlives_parent:
                        log.warning("%d job(s) continue in SLURM's queue: the same command follows them", len(running))
                        break
                    self._pass_stop_on(running)
                    for one in list(running):
                        self._follow(one, display)
                        if one.child.poll() is not None:
                            running.remove(one)
                            free.append(one.share)
                            self._end(one, waiting, display)
        finally:
            for one in running:
                if not self._site.outlives_parent:
                    one.child.kill()
        for job in waiting:
            job.status = state.WAITING if job.starts == 0 else state.INTERRUPTED
        self.sweep.save()

    # ── before anything runs ───────────────────────────────────────────────────────────────────────────────────────
    def _checked(self, jobs: Sequence[SweepJob]) -> dict[str, Any]:
        """Job → its configuration; jobs that the checks refuse are marked and left out."""
        configs = {}
        for job in jobs:
            try:
                with _beside_hydra():
                    configs[job.name] = load(job.words, self._entry).root
            except UserError as refusal:
                job.status, job.error = state.REFUSED, _one_line(refusal)
                log.warning("refused: %s: %s", job.name, job.error)
        return configs

    def _prepared(self, jobs: Sequence[SweepJob], configs: dict[str, Any]) -> list[SweepJob]:
        """The jobs to run: not yet finished, and not known not to fit."""
        wanted, finished = [], 0
        for job in jobs:
            if job.name not in configs or self.stop.count:
                continue
            if self._is_finished(job, configs[job.name]):
                job.status, job.error = state.FINISHED, None
                finished += 1
                continue
            if job.status == state.PRUNED:  # drawn again by a search
                finished += 1
                continue
            job.status, job.error = state.WAITING, None
            if isinstance(configs[job.name], TrainRoot) and self._entry.name == "train":
                verdict = check_fit(
                    configs[job.name], self.settings.plan, self.sweep.folder / "plans", lambda: self.stop.count > 0
                )
                job.plan = verdict.told
                if verdict.fits is False:
                    job.status, job.error = state.MISFIT, verdict.told
                    log.warning("does not fit: %s: %s", job.name, verdict.told)
                    continue
                self._group(job, configs[job.name].tracker)
            wanted.append(job)
        if len(jobs) == 1:  # a search, trial by trial
            return wanted
        log.info(
            "%s: %d jobs; %d finished before, %d to run%s", self.sweep.folder, len(jobs), finished, len(wanted),
            f", {len(jobs) - finished - len(wanted)} that can't run" if len(jobs) > finished + len(wanted) else "",
        )  # fmt: skip
        for told in dict.fromkeys(job.plan for job in wanted if job.plan):
            log.info("plan check: %s", told)
        return wanted

    def _group(self, job: SweepJob, tracker: TrackerConfig) -> None:
        """Sets W&B's group of a sweep to its folder, unless the user named one."""
        if tracker.group is None and not any(word.startswith("tracker.group=") for word in job.words):
            job.words.append(as_word("tracker.group", "/".join(self.sweep.folder.parts[-2:])))

    def _is_finished(self, job: SweepJob, config: Any) -> bool:
        folder = self.sweep.run_folder(job)
        if not (folder / "result.json").is_file() or not (folder / "config.yaml").is_file():
            return job.status == state.FINISHED and self._entry.name != "train" and folder.is_dir()
        different = config_differences(config_of(folder), jsonable(asdict(config)))
        same = all(key.startswith(_SAME_RESULT) for key, *_ in different)
        return same and result_of(folder).values.get("status") == "finished"

    # ── while they run ─────────────────────────────────────────────────────────────────────────────────────────────
    def _start(self, job: SweepJob, share: dict[str, str], display: Display) -> _RunningJob:
        job.status = state.RUNNING
        if (child := self._site.running(job)) is not None:
            log.info("%s: still running (pid %d), taken over", job.name, child.pid)
        else:
            job.starts += 1
            child = self._site.start(job, share)
            again = f" (start {job.starts})" if job.starts > 1 else ""
            log.info("%s: running%s, log: %s", job.name, again, child.log_path)
        job.pid = child.pid
        self.sweep.save()
        display.start(job.name)
        return _RunningJob(job, child, share)

    def _follow(self, one: _RunningJob, display: Display) -> None:
        rows = one.child.new_rows()
        display.rows(one.job.name, rows)
        for row in rows:
            if why := self._monitor(one.job, row):
                one.child.ask_to_stop(why)

    def _pass_stop_on(self, running: list[_RunningJob]) -> None:
        """The first Ctrl-C or SIGTERM lets jobs save; a second one kills them."""
        if self.stop.count == 1 and any(one.child.asked is None for one in running):
            log.warning("stopping: waiting for %d job(s) to save; press again to kill them", len(running))
        for one in running:
            if self.stop.count > 1:
                one.child.kill()
            elif self.stop.count:
                one.child.ask_to_stop(state.INTERRUPTED)

    def _end(self, one: _RunningJob, waiting: deque[SweepJob], display: Display) -> None:
        """Handles a process that ended: sets the job's status, or starts it again."""
        self._follow(one, display)
        job, child = one.job, one.child
        display.end(job.name)
        code = child.poll()
        job.error = None
        if code == 0:
            job.status = state.FINISHED
        elif self.stop.count:
            job.status, job.error = state.INTERRUPTED, "the sweep was stopped; the same command resumes it"
        elif child.asked is not None and child.stopped_by_signal():
            job.status, job.error = state.PRUNED, child.asked
        elif child.stopped_by_signal() and not self._site.restarts_itself and job.restarts < self.settings.max_restarts:
            job.restarts += 1
            job.status, job.error = state.WAITING, None
            waiting.appendleft(job)
        elif child.stopped_by_signal():
            job.status = state.PREEMPTED
            job.error = f"preempted {job.restarts + 1} times (hydra.launcher.max_restarts={self.settings.max_restarts})"
        else:
            job.status, job.error = state.FAILED, child.error()
        level = logging.INFO if code == 0 else logging.WARNING
        told = "preempted; starting it again" if job.status == state.WAITING else job.status
        took = format_seconds(time.monotonic() - child.started)
        log.log(level, "%s: %s after %s%s", job.name, told, took, f": {job.error}" if job.error else "")
        self.sweep.save()


@contextmanager
def _beside_hydra() -> Iterator[None]:
    """Suspends the Hydra that runs the sweep, so that a job's configuration can be composed as its process will."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and "--help lists every key" not in line)
