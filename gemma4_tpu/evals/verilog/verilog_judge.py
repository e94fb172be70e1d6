"""The Verilog judge: completions in, verdicts out.

Use it as a context manager: `prepare(problems)` once, then `judge_all([(problem, completion), …])`.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem, Verdict
from gemma4_tpu.evals.verilog.extract import code_of
from gemma4_tpu.evals.verilog.iverilog import find_tools
from gemma4_tpu.evals.verilog.pool import Pool
from gemma4_tpu.evals.verilog.sandbox import Level
from gemma4_tpu.evals.verilog.selfcheck import VerilogSelfCheck, check_references
from gemma4_tpu.evals.verilog.spy import choose_level
from gemma4_tpu.evals.verilog.verdict import Golden

T = TypeVar("T")
AHEAD = 4  # samples per worker that are queued


class VerilogJudge:
    """Judges by simulation with Icarus Verilog in a sandbox. Thread-safe; a context manager.

    Raises:
      UserError: the simulator is missing or too old, or no sandbox works and `unsafe` is false.
    """

    name = "verilog"

    def __init__(self, config: JudgeConfig):
        if not sys.platform.startswith("linux"):
            raise UserError(f"judging uses Linux sandboxes, and this is {sys.platform}: run it in a Linux container")
        self.config = config
        self.tools = find_tools(config.iverilog)
        self._pool = Pool(config, self.tools)
        try:
            self.levels = self._pool.try_levels()
            self.level = choose_level(config, self.levels)
        except BaseException:
            self._pool.close()
            raise
        self._golden: dict[str, Golden] = {}

    def prepare(self, problems: Sequence[Problem], *, fresh: bool = False, keep: bool = True) -> VerilogSelfCheck:
        """Judges the references, or recalls their results with this simulator.

        Args:
          problems: the problems to judge.
          fresh: ignore cached results.
          keep: cache the results; not useful for problems that occur only once.
        """
        check = check_references(
            problems, self._pool, self.config, self.tools,
            level=self.level, levels=self.levels, fresh=fresh, keep=keep,
        )  # fmt: skip
        self._golden.update(check.golden)
        return check

    def submit(self, problem: Problem, completion: str, *, official: bool = True) -> Future[Verdict]:
        """Queues a verdict, while further samples are generated.

        Args:
          problem: a prepared problem.
          completion: a model's.
          official: also apply the benchmark's own rule, which can take another simulation.
        """
        if problem.name not in self._golden:
            raise AssertionError(f"{problem.name}: prepare() has not seen this problem")
        code = code_of(completion, problem)
        return self._pool.verdict(problem, code, self._golden[problem.name], self.level, official)

    def judge(self, problem: Problem, completion: str) -> Verdict:
        """The verdict on one completion."""
        return self.submit(problem, completion).result()

    def judge_all(self, samples: Iterable[tuple[Problem, str]], *, official: bool = True) -> Iterator[Verdict]:
        """Verdicts in the order of the samples, on all workers; takes only a few samples ahead."""
        waiting: deque[Future[Verdict]] = deque()
        samples = iter(samples)
        ahead = AHEAD * self._pool.workers
        for problem, completion in itertools.islice(samples, ahead):
            waiting.append(self.submit(problem, completion, official=official))
        while waiting:
            verdict = waiting.popleft().result()
            for problem, completion in itertools.islice(samples, 1):
                waiting.append(self.submit(problem, completion, official=official))
            yield verdict

    def task(self, function: Callable[..., T], *arguments: Any, level: Level | None = None) -> Future[T]:
        """Runs `function(tools, sandbox, folder, *arguments)` in a worker, for other tools; `level` defaults to the
        judge's.
        """
        return self._pool.task(function, level or self.level, *arguments)

    def __enter__(self) -> VerilogJudge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()
