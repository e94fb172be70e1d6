"""Verilog problems, judged by simulation: the judge, the strength of its benches, and second opinions."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, Self

from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.evals.benchmarks import load_problems
from gemma4_tpu.evals.court import VERDICTS_FILE, Judged
from gemma4_tpu.evals.problems import LEAKED, Problem, Verdict, VerdictClass, is_leaked_thought
from gemma4_tpu.evals.scores import disagreements
from gemma4_tpu.evals.second_opinions import OPINIONS_FILE, Second, columns, prepare, second_opinions
from gemma4_tpu.evals.store import Key, Rows, Sample, alike
from gemma4_tpu.evals.verilog.strength import grade, sentences, to_rows, vacuous
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge
from gemma4_tpu.tracking.records import SELFCHECK, write_record
from gemma4_tpu.tracking.typed import AMOUNT, FLAG, TEXT, WHOLE, choice, fields, maybe

log = logging.getLogger(__name__)

SELFCHECK_FILE = "selfcheck.json"
PROGRESS_SECONDS = 10.0


class Simulation:
    """See `Court`."""

    official = True

    def __init__(self, config: EvalConfig, folder: Path):
        """Args:
        config: the benchmark, and how it is judged.
        folder: the record's.

        Raises:
          UserError: there are no problems.
        """
        self._config, self._folder = config, folder
        self.problems: list[Problem] = load_problems(config)

    def __enter__(self) -> Self:
        config, problems, folder = self._config, self.problems, self._folder
        with ExitStack() as opened:
            self._judge = judge = opened.enter_context(VerilogJudge(config.judge))
            self._check = check = judge.prepare(problems)
            failing = len(check.cannot_pass)
            log.info("%s, sandbox %s; %d problems cannot pass here", check.simulator, check.sandbox, failing)
            scrutiny = config.second_opinion
            self._grades = grade(problems, judge, check.cannot_pass, config.judge) if scrutiny else {}
            write_record(folder / SELFCHECK_FILE, SELFCHECK, {**check.to_row(), "benches": to_rows(self._grades)})
            self._second = prepare(problems, judge, config.stimulus_seed, folder) if scrutiny else None
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def fingerprint(self) -> str:
        """See `Court`."""
        text = "\0".join(part for p in self.problems for part in (p.name, p.prompt, p.reference, p.testbench))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """See `Court`."""
        return {}

    @property
    def categories(self) -> dict[str, str]:
        """See `Court`."""
        return {}

    @property
    def told(self) -> dict[str, Any]:
        """See `Court`."""
        return {
            "selfcheck": {"simulator": self._check.simulator, "sandbox": self._check.sandbox},
            "cannot_pass": dict(self._check.cannot_pass),
            "vacuous": vacuous(self._grades),
            "benches": sentences(self._grades) if self._grades else [],
        }

    def judge(self, samples: Sequence[Sample], folder: Path, *, again: bool) -> Judged:
        """See `Court`."""
        if again:
            for made in (VERDICTS_FILE, OPINIONS_FILE):
                (folder / made).unlink(missing_ok=True)
        verdicts = _judge(samples, self.problems, self._judge, folder / VERDICTS_FILE)
        if (second := self._second) is None:
            return Judged(verdicts)
        opinions = second_opinions(
            samples, verdicts, second, self._judge, self._config.columns, folder / OPINIONS_FILE
        )  # fmt: skip
        return Judged(verdicts, opinions, {"second": _about(second, samples, verdicts, opinions)})


def _about(
    second: Second, samples: Sequence[Sample], verdicts: Mapping[Key, Verdict], opinions: Mapping[Key, Any]
) -> dict[str, Any]:
    """The report's fields about second opinions."""
    rows = disagreements(samples, verdicts, opinions)
    return {"seed": second.seed, "without": second.without, "disagreements": rows, **columns(opinions.values())}


_VERDICT = fields({"kind": choice(*VerdictClass), "official": maybe(FLAG)}, {
    "detail": TEXT, "refused_by": maybe(TEXT), "mismatches": maybe(WHOLE), "samples": maybe(WHOLE),
    "cpu_seconds": AMOUNT,
})  # fmt: skip


def _judge(
    samples: Sequence[Sample], problems: Sequence[Problem], judge: VerilogJudge, path: Path
) -> Mapping[Key, Verdict]:
    """Verdicts of all samples; equal completions of a problem are simulated once."""
    by_name = {problem.name: problem for problem in problems}
    with Rows(path, _VERDICT) as rows:
        fresh = [s for s in samples if s.key not in rows.rows and s.problem in by_name]
        for sample in fresh:
            if is_leaked_thought(sample.completion):
                rows.add_for(sample, LEAKED.to_row())
        equal = alike(s for s in fresh if not is_leaked_thought(s.completion))
        if equal:
            log.info("judging %d samples, %d of them distinct", sum(map(len, equal.values())), len(equal))
        verdicts = judge.judge_all((by_name[problem], completion) for problem, completion in equal)
        # Verdicts come in the order of the samples, and each is stored as it arrives, so a kill loses none.
        for same, verdict in zip(_reported(equal.values(), len(equal)), verdicts, strict=True):
            for sample in same:
                rows.add_for(sample, verdict.to_row())
        return {key: _verdict(row) for key, row in rows.rows.items()}


def _verdict(row: Mapping[str, Any]) -> Verdict:
    return Verdict.from_row({key: value for key, value in row.items() if key in Verdict.__dataclass_fields__})


def _reported(groups: Iterable[list[Sample]], total: int) -> Iterable[list[Sample]]:
    """Passes the groups on, and periodically logs the judge's progress."""
    last = perf_counter()
    for done, group in enumerate(groups):
        if perf_counter() - last > PROGRESS_SECONDS:
            last = perf_counter()
            log.info("judged %d of %d", done, total)
        yield group
