"""The verdict on one design: six measures, each of which can refuse it, and the benchmark's own rule beside.

1. `text`: nothing unterminated, no system task or directive off the lists, in the source and in its expansion;
2. `alone`: the design builds by itself, so it names nothing that only the bench has;
3. `build`: it builds behind bench and reference, with the bench as the only root;
4. `names`: bench, reference, instances, counters and the result's text carry nonces (`bench.py`), so a design that
   guesses names fails in `build` or `run`;
5. `run`: the simulation ends by itself with exit code 0 and exactly one result line, which is the last;
6. `count`: no errors, and as many samples as with the reference on this simulator.

What is compiled is the expansion that was read, so that no macro means one thing alone and another beside the bench.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma4_tpu.evals.problems import Problem, Verdict, VerdictClass
from gemma4_tpu.evals.verilog import scan
from gemma4_tpu.evals.verilog.bench import Bench, dress
from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.sandbox import Finished, Sandbox

DESIGN, EXPANDED, BENCH, REFERENCE, PROGRAM = "design.sv", "expanded.sv", "bench.sv", "reference.sv", "program.vvp"
WAVES = "wave.vcd"  # the one file that a benchmark's bench may write
DETAIL_CHARACTERS = 200
_ELABORATION = ("during elaboration", "Elaboration failed", "root module")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What the reference of a problem did on this simulator."""

    samples: int | None = None
    """Comparisons that the bench made; null where its result has no count."""
    failure: str | None = None
    """Why the reference itself does not pass; null: it does."""
    builds_unchanged: bool = True
    """Whether the bench builds as the benchmark has it (on Icarus 13, verilog-eval's don't)."""
    cpu_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the measures say of a design."""

    kind: VerdictClass
    measure: str | None = None
    """Which one refused it."""
    detail: str = ""
    mismatches: int | None = None
    samples: int | None = None
    log: str = ""
    """Everything that building and running it printed."""


class _Refused(Exception):
    """Ends a trial before the count."""

    def __init__(self, kind: VerdictClass, measure: str, detail: str, log: str = ""):
        super().__init__(detail)
        self.outcome = Outcome(kind=kind, measure=measure, detail=detail[:DETAIL_CHARACTERS], log=log)


@dataclass(kw_only=True)
class Trial:
    """One design before one bench, in an empty folder that is thrown away afterwards."""

    problem: Problem
    code: str
    tools: Tools
    sandbox: Sandbox
    folder: Path
    cpu_seconds: float = 0.0
    pruned: bool = field(default=False, init=False)
    """Modules that the design does not use were left out."""

    def strict(self, golden: Golden | None) -> Outcome:
        """All six measures; without `golden` the last one only asks for no errors."""
        try:
            self._text()
            self._alone()
            bench = dress(self.problem)
            return self._count(self._simulate(bench), golden)
        except _Refused as refusal:
            return refusal.outcome

    def official(self, outcome: Outcome, golden: Golden) -> bool:
        """The benchmark's rule on the unchanged files in the benchmark's order, given what the measures found.

        Where the same simulation is known to come out, its log is judged instead: the bench builds unchanged, the
        design ran to its count, has no macros that could change the bench, no delays whose unit the order of files
        decides, no module that the bench has too, and was compiled as a whole.
        """
        if outcome.kind is VerdictClass.TIMEOUT:
            return False
        bench_modules = {*scan.defined_modules(self.problem.testbench), *scan.defined_modules(self.problem.reference)}
        alike = not (self.pruned or {*"`#"} & {*self.code} or bench_modules & {*scan.defined_modules(self.code)})
        if alike and golden.builds_unchanged and outcome.kind in (VerdictClass.PASS, VerdictClass.MISMATCH):
            return self.problem.official_rule(outcome.log)
        try:
            log, builds = self._build_officially()
            return self.problem.official_rule(log + self._run_officially() if builds else log)
        except _Refused:
            return False

    def builds_unchanged(self) -> bool:
        """Whether design and bench build by the benchmark's own command."""
        try:
            return self._build_officially()[1]
        except _Refused:
            return False

    def _text(self) -> None:
        """Measure 1; leaves the expanded design in the folder."""
        if found := scan.unreadable(self.code):
            raise _Refused(VerdictClass.FORBIDDEN, "text", found)
        text = self._expanded() if "`" in self.code else self.code
        design = scan.reachable(text, self.problem.top)
        if found := scan.forbidden(design):
            raise _Refused(VerdictClass.FORBIDDEN, "text", found)
        self.pruned = design != text
        self._write({EXPANDED: design})

    def _expanded(self) -> str:
        """The design as the preprocessor leaves it, without macros."""
        self._write({DESIGN: self.code})
        done = self._run(self.tools.preprocess(DESIGN, EXPANDED), "text", writable=[self.folder])
        expanded = self.folder / EXPANDED
        if done.returncode or not expanded.is_file():
            raise _Refused(VerdictClass.SYNTAX, "text", _complaint(done))
        text = expanded.read_text(encoding="utf-8", errors="replace")
        expanded.unlink()  # it is the sandbox's user's
        return text

    def _alone(self) -> None:
        """Measure 2."""
        done = self._run(self.tools.check(self.problem.top, EXPANDED), "alone", writable=[self.folder])
        if done.returncode:
            raise _Refused(_build_failure(done), "alone", _complaint(done))

    def _simulate(self, bench: Bench) -> tuple[Mapping[str, str], str]:
        """Measures 3 to 5: (groups of the result line, log as the benchmark would have it)."""
        self._write({BENCH: bench.source, **self.problem.files})
        build = self._run(self.tools.build(bench.top, PROGRAM, [BENCH, EXPANDED]), "build", writable=[self.folder])
        if build.returncode:
            raise _Refused(_build_failure(build), "build", _complaint(build))
        done = self._run(self.tools.simulate(PROGRAM), "run")
        if done.returncode:
            raise _Refused(VerdictClass.RUNTIME, "run", f"exit code {done.returncode}: {_complaint(done)}")
        result = bench.read(done.stdout)
        log = build.stdout + build.stderr + done.stdout + done.stderr
        log = log.replace(bench.marker, self.problem.result_marker)
        if isinstance(result, str):
            failed = self.problem.failure_pattern and re.search(self.problem.failure_pattern, done.stdout)
            raise _Refused(VerdictClass.MISMATCH if failed else VerdictClass.NO_RESULT, "run", result, log)
        return result.groupdict(), log

    def _count(self, found: tuple[Mapping[str, str], str], golden: Golden | None) -> Outcome:
        """Measure 6."""
        groups, log = found
        mismatches = int(groups.get("errors") or 0)
        samples = int(groups["samples"]) if "samples" in groups else None
        detail = ""
        if mismatches:
            detail = f"{mismatches} mismatches in {samples} samples"
        elif samples == 0 or (golden and samples != golden.samples):
            detail = f"{samples} samples" + (f" instead of {golden.samples}" if golden else "")
        return Outcome(
            kind=VerdictClass.MISMATCH if detail else VerdictClass.PASS,
            measure="count" if detail else None,
            detail=detail,
            mismatches=mismatches,
            samples=samples,
            log=log,
        )

    def _build_officially(self) -> tuple[str, bool]:
        """(what the benchmark's own compilation printed, whether it succeeded)."""
        files = {DESIGN: self.code, BENCH: self.problem.testbench}
        if self.problem.bench_needs_reference:
            files[REFERENCE] = self.problem.reference
        for left in self.folder.iterdir():
            left.unlink()
        self._write({**files, **self.problem.files})
        build = self._run(self.tools.build(self.problem.bench_top, PROGRAM, [*files]), "build", writable=[self.folder])
        return build.stdout + build.stderr, build.returncode == 0

    def _run_officially(self) -> str:
        """What the benchmark's own simulation prints."""
        waves = self.folder / WAVES
        waves.touch()
        self.sandbox.adopt(waves)
        done = self._run(self.tools.simulate(PROGRAM), "run", writable=[waves])
        return done.stdout + done.stderr

    def _write(self, files: Mapping[str, str]) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(text, encoding="utf-8", errors="replace")

    def _run(self, command: Sequence[str], measure: str, *, writable: Sequence[Path] = ()) -> Finished:
        done = self.sandbox.run(command, self.folder, writable=writable)
        self.cpu_seconds += done.cpu_seconds
        if done.stopped == "output":
            raise _Refused(VerdictClass.RUNTIME, measure, "more output than eval.judge.output_kib")
        if done.stopped:
            raise _Refused(VerdictClass.TIMEOUT, measure, f"{done.stopped} time beyond eval.judge.cpu_seconds")
        return done


def judge_code(trial: Trial, golden: Golden) -> Verdict:
    """The strict verdict and the official one. Where the reference itself fails here, nothing can pass."""
    if golden.failure:
        detail = f"the reference itself fails with {trial.tools.name}: {golden.failure}"
        outcome = Outcome(kind=VerdictClass.NO_RESULT, measure="count", detail=detail[:DETAIL_CHARACTERS])
    else:
        outcome = trial.strict(golden)
    official = trial.official(outcome, golden)
    return Verdict(
        kind=outcome.kind,
        detail=outcome.detail,
        official=official,
        refused_by=outcome.measure,
        mismatches=outcome.mismatches,
        samples=outcome.samples,
        cpu_seconds=round(trial.cpu_seconds, 3),
    )


def reference_as_answer(problem: Problem) -> str:
    """The reference under the name that an answer has."""
    return re.sub(rf"\b{re.escape(problem.reference_top)}\b", problem.top, problem.reference)


def _build_failure(done: Finished) -> VerdictClass:
    """Syntax or elaboration: the compiler names the later phase when it fails there."""
    text = done.stdout + done.stderr
    return VerdictClass.ELABORATION if any(words in text for words in _ELABORATION) else VerdictClass.SYNTAX


def _complaint(done: Finished) -> str:
    """The first line of what a tool complained of."""
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[0].strip() if lines else f"exit code {done.returncode} without a word"
