"""The judge's persistent worker processes, each with its own sandbox and its own folder in memory.

Workers are single-threaded and small, so a simulation starts with a cheap fork; no Python starts per sample.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.errors import TERMINATING
from gemma4_tpu.evals.problems import Problem, Verdict, VerdictClass
from gemma4_tpu.evals.verilog.benches import Benches
from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.official import builds_unchanged, passes_officially
from gemma4_tpu.evals.verilog.remembered import Remembered
from gemma4_tpu.evals.verilog.running import Finished, kill_commands
from gemma4_tpu.evals.verilog.sandbox import Level, Sandbox
from gemma4_tpu.evals.verilog.spy import spy
from gemma4_tpu.evals.verilog.stage import NoStage, Stage, build, load
from gemma4_tpu.evals.verilog.verdict import CPU_FACTOR, Golden, Trial, judge_code, reference_as_answer
from gemma4_tpu.evals.verilog.work_folder import WorkFolder

T = TypeVar("T")
ORPHAN_CHECK_SECONDS = 2.0
NO_CODE = Verdict(kind=VerdictClass.NO_RESULT, detail="no module in the completion", official=False, refused_by="text")


def default_workers() -> int:
    """One for each CPU core that this process may use."""
    return len(os.sched_getaffinity(0))


class Pool:
    """Worker processes for judging, a context manager. Thread-safe."""

    def __init__(self, config: JudgeConfig, tools: Tools):
        self.workers = config.workers or default_workers()
        self._folder = WorkFolder(self.workers * 2 * (config.file_mib << 20))
        self._executor = ProcessPoolExecutor(
            self.workers,
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(config, tools, self._folder.path, os.getpid()),
        )

    def spy(self, level: Level) -> Future[str | None]:
        """Why a level of isolation does not work here; None: it works."""
        return self._executor.submit(_spy, level)

    def try_levels(self) -> dict[Level, str | None]:
        """Level → why it does not work here (None: it works)."""
        return {level: self.spy(level).result() for level in Level}

    def golden(self, problem: Problem, level: Level) -> Future[Golden]:
        """The reference's result."""
        return self._executor.submit(_golden, problem, level)

    def verdict(
        self, problem: Problem, code: str | None, golden: Golden, level: Level, official: bool
    ) -> Future[Verdict]:
        """The verdict on extracted code, including the benchmark's own if `official`."""
        if code is None:
            future: Future[Verdict] = Future()
            future.set_result(NO_CODE)
            return future
        return self._executor.submit(_verdict, problem, code, golden, level, official)

    def task(self, function: Callable[..., T], level: Level, *arguments: Any) -> Future[T]:
        """Runs `function(tools, sandbox, folder, *arguments)` in a worker, in its own empty folder."""
        return self._executor.submit(_task, function, level, arguments)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and removes their folders."""
        try:
            self._executor.shutdown(cancel_futures=True)
        finally:  # also if interrupted; a worker that still runs removes what it wrote meanwhile
            self._folder.remove()


def _run_for_stage(sandbox: Sandbox, folder: Path, command: Sequence[str], *, writable: Sequence[Path]) -> Finished:
    done = sandbox.run(command, folder, writable=writable)
    if done.stopped:
        raise NoStage(f"{done.stopped} time", VerdictClass.TIMEOUT)
    return done


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """The state of a worker process."""

    config: JudgeConfig
    tools: Tools
    folder: Path
    sandboxes: dict[Level, Sandbox] = field(default_factory=dict)
    benches: dict[Level, Benches] = field(default_factory=dict)
    remembered: Remembered = field(default_factory=Remembered)

    def sandbox(self, level: Level) -> Sandbox:
        if level not in self.sandboxes:
            self.sandboxes[level] = Sandbox(level=level, config=self.config, readable=self.tools.readable)
        return self.sandboxes[level]

    def empty_folder(self, sandbox: Sandbox, name: str = "design") -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        sandbox.adopt(folder)
        return folder

    def trial(self, problem: Problem, code: str, level: Level, golden: Golden | None = None) -> Trial:
        sandbox = self.sandbox(level)
        if level not in self.benches:
            self.benches[level] = Benches(sandbox, self.empty_folder(sandbox, f"bench_{level}"))
        judged = golden is None or golden.failure is None
        return Trial(
            problem=problem,
            code=code,
            tools=self.tools,
            sandbox=sandbox,
            folder=self.empty_folder(sandbox),
            benches=self.benches[level],
            stage=functools.partial(self.stage, problem, sandbox) if judged else None,
            limit_seconds=max(1.0, CPU_FACTOR * golden.cpu_seconds) if golden and judged else None,
            remembered=self.remembered if golden else Remembered(),  # references are timed, so they always run
        )

    def stage(self, problem: Problem, sandbox: Sandbox, design: str) -> Stage:
        """The problem's stage, made by the first worker that needs it; without a reference, made for each design.

        Raises:
          NoStage: it can't be made.
        """
        parts = (problem.testbench, problem.reference, problem.top, problem.bench_top, sorted(problem.files.items()))
        target = self.folder.parent / f"stage_{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"
        if not target.is_dir():
            folder = self.empty_folder(sandbox, "stage")
            build(problem, self.tools, functools.partial(_run_for_stage, sandbox, folder), folder, design)
            if not problem.reference:
                return load(folder)
            for path in (folder, *folder.iterdir()):  # they belong to the sandbox's user
                os.chown(path, os.getuid(), os.getgid())
                path.chmod(0o755 if path == folder else 0o644)
            with contextlib.suppress(OSError):  # another worker was faster
                folder.rename(target)
        return load(target)


_worker: _Worker | None = None  # set once in each worker process


def _start_worker(config: JudgeConfig, tools: Tools, root: Path, parent: int) -> None:
    global _worker
    _worker = _Worker(config=config, tools=tools, folder=root / str(os.getpid()))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))  # no traceback; stops running commands on the way out
    for number in TERMINATING:
        signal.signal(number, lambda *_: _leave(root))  # sent to the group, it also ends the process that cleans up
    signal.signal(signal.SIGALRM, lambda *_: _leave(root) if os.getppid() != parent else None)
    signal.setitimer(signal.ITIMER_REAL, ORPHAN_CHECK_SECONDS, ORPHAN_CHECK_SECONDS)
    try:
        _worker.folder.mkdir()  # never the root, which nobody would remove again
    except FileNotFoundError:  # the judge ended while this process started
        os._exit(1)


def _here() -> _Worker:
    """The worker of this process."""
    assert _worker is not None
    return _worker


def _leave(root: Path) -> None:
    """Ends a worker and its commands because its parent was or is being killed."""
    kill_commands()
    shutil.rmtree(root, ignore_errors=True)
    os._exit(1)


def _task(function: Callable[..., T], level: Level, arguments: Sequence[Any]) -> T:
    worker = _here()
    sandbox = worker.sandbox(level)
    return function(worker.tools, sandbox, worker.empty_folder(sandbox), *arguments)


def _spy(level: Level) -> str | None:
    worker = _here()
    sandbox = worker.sandbox(level)
    return spy(worker.tools, sandbox, worker.empty_folder(sandbox))


def _golden(problem: Problem, level: Level) -> Golden:
    if problem.result_marker not in problem.testbench:
        return Golden(failure=f"its test bench never prints {problem.result_marker!r}")
    trial = _here().trial(problem, reference_as_answer(problem), level)
    outcome = trial.strict(None)
    passed = outcome.kind is VerdictClass.PASS
    failure = None if passed else f"{outcome.kind}: {outcome.detail}"
    return Golden(
        samples=outcome.samples,
        failure=failure,
        cpu_seconds=round(trial.cpu_seconds, 3),
        builds_unchanged=builds_unchanged(trial),
    )


def _verdict(problem: Problem, code: str, golden: Golden, level: Level, official: bool = True) -> Verdict:
    trial = _here().trial(problem, code, level, golden)
    outcome = judge_code(trial, golden)
    return Verdict(
        kind=outcome.kind,
        detail=outcome.detail,
        official=passes_officially(trial, outcome, golden) if official else None,
        refused_by=outcome.measure,
        mismatches=outcome.mismatches,
        samples=outcome.samples,
        cpu_seconds=round(trial.cpu_seconds, 3),
    )
