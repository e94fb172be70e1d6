"""The references' results on this simulator: the sample counts that a pass needs, and problems that can't be passed.

They are cached in one file per simulator version; a changed problem, bench or rule is judged again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.problems import Problem, VerdictClass, check_problems
from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.pool import Pool
from gemma4_tpu.evals.verilog.recall import Memory, fingerprint
from gemma4_tpu.evals.verilog.sandbox import Level
from gemma4_tpu.evals.verilog.verdict import Golden

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VerilogSelfCheck:
    """Simulator, sandbox, and the references' results by problem name."""

    simulator: str
    sandbox: str
    levels: dict[str, str | None]
    """Level of isolation → why it does not work here (null: it works)."""
    golden: dict[str, Golden]
    recalled: int
    """Number of results from the cache of an earlier check."""
    seconds: float
    workers: int
    limits: dict[str, Any]

    @property
    def cannot_pass(self) -> dict[str, str]:
        """Problem → reason, for problems whose own reference fails here."""
        return {name: golden.failure for name, golden in self.golden.items() if golden.failure}

    def table(self) -> str:
        """The self-check as a table for people."""
        levels = [f"  {level:<12}{reason or 'works'}" for level, reason in self.levels.items()]
        counts = [golden.samples for golden in self.golden.values() if golden.samples is not None]
        slowest = max(self.golden, key=lambda name: self.golden[name].cpu_seconds, default=None)
        failing = [f"  {name}  {reason}" for name, reason in self.cannot_pass.items()]
        limits = ", ".join(f"{key}={value}" for key, value in self.limits.items())
        lines = [
            f"simulator   {self.simulator}",
            f"sandbox     {self.sandbox} (limits: {limits})",
            *levels,
            f"references  {len(self.golden) - len(failing)} of {len(self.golden)} pass"
            f" ({self.seconds:.1f} s on {self.workers} workers, {self.recalled} from the cache)",
            *failing,
        ]
        if counts:
            lines.append(f"samples     {min(counts)} to {max(counts)}, median {sorted(counts)[len(counts) // 2]}")
        if slowest is not None:
            lines.append(f"slowest     {slowest}, {self.golden[slowest].cpu_seconds:.1f} CPU seconds")
        return "\n".join(lines)

    def to_row(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "cannot_pass": self.cannot_pass}


def check_references(
    problems: Sequence[Problem],
    pool: Pool,
    config: JudgeConfig,
    tools: Tools,
    *,
    level: Level,
    levels: dict[Level, str | None],
    fresh: bool,
    keep: bool = True,
) -> VerilogSelfCheck:
    """Judges the references that no earlier check has judged with this simulator (all of them if `fresh`)."""
    started = time.monotonic()
    memory = Memory("references", config, tools)
    known = {key: Golden(**row) for key, row in ({} if fresh else memory.load()).items()}
    keys = {problem.name: fingerprint(problem) for problem in problems}
    check_problems(problems, "of these problems")
    unknown = Golden(cpu_seconds=config.cpu_seconds)
    known |= {keys[problem.name]: unknown for problem in problems if not problem.reference}
    futures = {p.name: pool.golden(p, level) for p in problems if keys[p.name] not in known}
    judged = {name: future.result() for name, future in futures.items()}
    if keep:
        memory.store({keys[name]: asdict(golden) for name, golden in judged.items() if not _by_chance(golden)})
    golden = {name: judged[name] if name in judged else known[key] for name, key in keys.items()}
    check = VerilogSelfCheck(
        simulator=tools.name,
        sandbox=str(level),
        levels={str(name): reason for name, reason in levels.items()},
        golden=golden,
        recalled=len(golden) - len(judged),
        seconds=round(time.monotonic() - started, 2),
        workers=pool.workers,
        limits={
            key: getattr(config, key) for key in ("cpu_seconds", "memory_mib", "file_mib", "output_kib", "processes")
        },
    )
    if check.cannot_pass:
        log.warning(
            "%d of %d references fail with %s, so nothing can pass these problems: %s",
            len(check.cannot_pass),
            len(golden),
            tools.name,
            ", ".join(check.cannot_pass),
        )
    return check


def _by_chance(golden: Golden) -> bool:
    """Whether a slow machine can be the cause; such a result is not cached."""
    return (golden.failure or "").startswith(VerdictClass.TIMEOUT)
