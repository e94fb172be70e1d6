"""The verdict on one design: measures, each of which can refuse it, alongside the benchmark's own rule.

The design is simulated alone, under a player that gives it the bench's stimulus and records its responses. Then the
bench runs, in a process that contains no line of the design, with a stand-in that gives it these responses
(`stand_ins.py`).

1. `text`: nothing unterminated or unreadable, and only listed system tasks and directives, in the source and in its
   expansion;
2. `build`: the design builds with the player;
3. `run`: its simulation lasts until the stimulus ends;
4. `replay`: given the responses, the bench gives the stimulus for which they were made, and one result;
5. `count`: no errors, and as many samples as with the reference on this simulator.

If a bench waits for its design, the stimulus depends on the responses, and differs from the reference's from some
moment on. The design is then simulated again with the new stimulus, until both agree. Each round is correct for at
least one moment more, since nothing in a bench depends on the future.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gemma4_tpu.evals.problems import Problem, VerdictClass
from gemma4_tpu.evals.verilog import scan, stand_ins
from gemma4_tpu.evals.verilog.benches import Benches
from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.remembered import Remembered
from gemma4_tpu.evals.verilog.running import Finished
from gemma4_tpu.evals.verilog.sandbox import Sandbox
from gemma4_tpu.evals.verilog.stage import (
    BENCH_PROGRAM,
    PLAYER,
    PROGRAM,
    SETTINGS,
    NoStage,
    Stage,
    build_failure,
    unknown_bit_ticks,
)
from gemma4_tpu.evals.verilog.work_folder import read, write

DESIGN, EXPANDED = "design.sv", "expanded.sv"
PLAYED = "played.sv"  # player and design
ROUNDS = 200  # of a bench that waits for its design
CPU_FACTOR = 10
"""A compilation or simulation gets this multiple of the time for judging the reference, but at least a second."""
DETAIL_CHARACTERS = 200
_ERROR = re.compile(r"\b(?:error|sorry)\b")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """The result of a problem's reference on this simulator."""

    samples: int | None = None
    """Number of comparisons that the bench made; null if its result has no count."""
    failure: str | None = None
    """Why the reference itself does not pass; null: it passes."""
    builds_unchanged: bool = True
    """Whether the benchmark's bench builds unchanged (on Icarus 13, verilog-eval's don't)."""
    cpu_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the measures found about a design."""

    kind: VerdictClass
    measure: str | None = None
    """The measure that refused it."""
    detail: str = ""
    mismatches: int | None = None
    samples: int | None = None
    log: str = ""
    """The complete output of building and running it."""


class Refused(Exception):
    """Ends a trial before the count."""

    def __init__(self, kind: VerdictClass, measure: str, detail: str, log: str = ""):
        super().__init__(detail)
        self.outcome = Findings(kind=kind, measure=measure, detail=detail[:DETAIL_CHARACTERS], log=log)


@dataclass(kw_only=True)
class Trial:
    """One design judged with one bench, in an empty folder that is discarded afterwards."""

    problem: Problem
    code: str
    tools: Tools
    sandbox: Sandbox
    folder: Path
    """Folder in which the design is compiled and simulated."""
    benches: Benches
    """Simulates the bench, out of reach of any design."""
    stage: Callable[[str], Stage] | None
    """Prepares the bench for the design's text, or raises `NoStage`; None: only the benchmark's own rule is
    available."""
    limit_seconds: float | None = None
    """Limit on the CPU time of one program; None: as configured."""
    remembered: Remembered = field(default_factory=Remembered)
    cpu_seconds: float = 0.0
    pruned: bool = field(default=False, init=False)
    """Whether modules that the design does not use were left out."""

    def strict(self, golden: Golden | None) -> Findings:
        """Applies all measures; without `golden`, the last one only requires no errors."""
        assert self.stage is not None
        try:
            design = self._text()
            return self._count(*self._simulate(self._staged(self.stage, design), design), golden)
        except Refused as refusal:
            return refusal.outcome

    def run(self, command: Sequence[str], measure: str, *, writable: Sequence[Path] = ()) -> Finished:
        """Runs a command in the design's folder.

        Raises:
          Refused: the command had to be stopped; `measure` refuses.
        """
        return self._checked(self._run(command, writable), measure)

    def _text(self) -> str:
        """Measure 1: returns the text that is compiled."""
        code, found = scan.canonical(self.code)
        if found:
            raise Refused(VerdictClass.FORBIDDEN, "text", found)
        text = self._expanded(code) if scan.has_macros(code) else code
        design = scan.reachable(text, self.problem.top)
        if found := scan.forbidden(design):
            raise Refused(VerdictClass.FORBIDDEN, "text", found)
        self.pruned = design != text
        return scan.without_dumps(design)

    def _staged(self, stage: Callable[[str], Stage], design: str) -> Stage:
        """The prepared bench. Without a reference, a failure to prepare it can be due to the design itself."""
        try:
            return stage(design)
        except NoStage as reason:
            blamed = not self.problem.reference or reason.kind is VerdictClass.TIMEOUT
            raise Refused(reason.kind if blamed else VerdictClass.NO_RESULT, "build", str(reason)) from None

    def _expanded(self, code: str) -> str:
        """The design after the preprocessor, without macros."""
        write(self.folder, {DESIGN: code})
        done = self.run(self.tools.preprocess(DESIGN, EXPANDED), "text", writable=[self.folder])
        if done.returncode:
            raise Refused(VerdictClass.SYNTAX, "text", _complaint(done))
        try:
            text = read(self.folder / EXPANDED)
        except OSError as error:
            raise Refused(VerdictClass.SYNTAX, "text", f"the preprocessor failed: {error}") from None
        text, found = scan.canonical(text)
        if found:
            raise Refused(VerdictClass.FORBIDDEN, "text", found)
        return text

    def _simulate(self, stage: Stage, design: str) -> tuple[Mapping[str, str], str]:
        """Measures 2 to 4: returns (groups of the result line, log as the benchmark would see it)."""
        first = read(stage.folder / stand_ins.STIMULUS)
        stimulus, build_log = first, None
        for _ in range(ROUNDS):
            write(self.folder, {stand_ins.STIMULUS: stimulus})
            if build_log is None:
                responses, played, build_log = self._built_and_played(stage, design)
            else:
                responses, played = self._played_again(stage)
            seen, bench = self._seen(stage, first, responses)
            if seen == stimulus:
                break
            if self.problem.bench_needs_reference and unknown_bit_ticks(seen) > stage.unknown_bit_ticks:
                raise Refused(VerdictClass.MISMATCH, "replay", "the design made the reference's inputs unknown")
            stimulus = seen
        else:
            raise Refused(VerdictClass.NO_RESULT, "replay", f"bench and design do not agree after {ROUNDS} rounds")
        log = "".join([stage.build_log, build_log, played.stdout, played.stderr, bench.stdout, bench.stderr])
        log = log.replace(stage.result_marker, self.problem.result_marker)
        if f"\n{stand_ins.CAPPED}\n" in f"\n{seen}":
            raise Refused(VerdictClass.NO_RESULT, "replay", "the bench does not end with this design", log)
        if bench.returncode:
            raise Refused(VerdictClass.NO_RESULT, "replay", _ending(bench), log)
        result = stage.result(self.problem, bench.stdout)
        if isinstance(result, str):
            failed = self.problem.failure_pattern and re.search(self.problem.failure_pattern, bench.stdout)
            raise Refused(VerdictClass.MISMATCH if failed else VerdictClass.NO_RESULT, "replay", result, log)
        return result.groupdict(), log

    def _built_and_played(self, stage: Stage, design: str) -> tuple[str, Finished, str]:
        """Measures 2 and 3, in one sandbox: like `_played_again`, plus the compiler's output.

        No directive of the design affects the player, which comes first.
        """
        (self.folder / SETTINGS).unlink(missing_ok=True)
        os.link(stage.folder / SETTINGS, self.folder / SETTINGS)
        source = f'{read(stage.folder / PLAYER)}`line 1 "{DESIGN}" 0\n{design}'
        write(self.folder, {PLAYED: source, PROGRAM: ""})
        program, mark = self.folder / PROGRAM, secrets.token_hex(8)
        self.sandbox.adopt(program)
        command = self.tools.compile_and_simulate(SETTINGS, PLAYED, PROGRAM, mark)
        text, done = self._written(command, [program])
        printed, built, stdout = done.stdout.partition(f"{mark}\n")
        if not built:
            raise Refused(build_failure(self._checked(done, "build")), "build", _complaint(done))
        complained, _, stderr = done.stderr.partition(f"{mark}\n")
        played = replace(done, stdout=stdout, stderr=stderr)
        return self._responses(stage, text, played), played, printed + complained

    def _played_again(self, stage: Stage) -> tuple[str, Finished]:
        """Measure 3: the design's responses to the stimulus in its folder, and its output."""
        text, done = self._written(self.tools.simulate(PROGRAM))
        return self._responses(stage, text, done), done

    def _responses(self, stage: Stage, text: str, done: Finished) -> str:
        """The response lines in the file that a simulation wrote.

        A design could write anything to it, but that would still be no more than a claim about its outputs.
        """
        if self._checked(done, "run").returncode:
            raise Refused(VerdictClass.RUNTIME, "run", _ending(done))
        line = rf"[0-9a-f]{{1,8}} [0-9a-f]{{1,16}} [01] [01xz]{{{stage.response_bits}}}\n"
        lines = re.match(rf"(?:{line})*+", text)
        assert lines is not None  # it matches the empty text
        if text[lines.end() :] != stand_ins.END:
            raise Refused(VerdictClass.RUNTIME, "run", "the simulation ended before the stimulus did")
        return lines[0]

    def _seen(self, stage: Stage, first: str, responses: str) -> tuple[str, Finished]:
        """The stimulus that the bench gives to a design with these responses (often `first`), and its output."""
        if known := self.remembered.get(stage, responses):
            return first, known
        command, files = self.tools.simulate(BENCH_PROGRAM), {**self.problem.files, stand_ins.RESPONSES: responses}
        seen, done = self.benches.simulate(command, stage.folder / BENCH_PROGRAM, files, self.limit_seconds)
        self.cpu_seconds += done.cpu_seconds
        self._checked(done, "replay")
        if seen == first and self.problem.reference:  # else the stage is the design's own
            self.remembered.put(stage, responses, done)
        return seen, done

    def _written(self, command: Sequence[str] | str, writable: Sequence[Path] = ()) -> tuple[str, Finished]:
        """The responses that a simulation wrote, and its output; it may write no other files than `writable`."""
        file = self.folder / stand_ins.RESPONSES
        file.unlink(missing_ok=True)
        with file.open("x+b") as opened:  # read through this handle, since the name could point elsewhere by then
            self.sandbox.adopt(file)
            done = self._run(command, [file, *writable])
            opened.seek(0)
            return opened.read().decode("ascii", "replace"), done

    def _count(self, groups: Mapping[str, str], log: str, golden: Golden | None) -> Findings:
        """Measure 5: the count."""
        mismatches = int(groups.get("errors") or 0)
        samples = int(groups["samples"]) if "samples" in groups else None
        detail = ""
        if mismatches:
            detail = f"{mismatches} mismatches in {samples} samples"
        elif samples == 0 or (golden and samples != golden.samples):
            detail = f"{samples} samples" + (f" instead of {golden.samples}" if golden else "")
        return Findings(
            kind=VerdictClass.MISMATCH if detail else VerdictClass.PASS,
            measure="count" if detail else None,
            detail=detail,
            mismatches=mismatches,
            samples=samples,
            log=log,
        )

    def _run(self, command: Sequence[str] | str, writable: Sequence[Path]) -> Finished:
        done = self.sandbox.run(command, self.folder, writable=writable, cpu_seconds=self.limit_seconds)
        self.cpu_seconds += done.cpu_seconds
        return done

    def _checked(self, done: Finished, measure: str) -> Finished:
        if done.stopped == "output":
            raise Refused(VerdictClass.RUNTIME, measure, "more output than eval.judge.output_kib")
        if done.stopped:
            limit = min(self.sandbox.config.cpu_seconds, self.limit_seconds or math.inf)
            raise Refused(VerdictClass.TIMEOUT, measure, f"{done.stopped} time beyond {limit:.0f} CPU seconds")
        return done


def judge_code(trial: Trial, golden: Golden) -> Findings:
    """The strict verdict. If the reference itself fails here, nothing can pass."""
    if golden.failure is None:
        return trial.strict(golden)
    detail = f"the reference itself fails with {trial.tools.name}: {golden.failure}"
    return Findings(kind=VerdictClass.NO_RESULT, measure="count", detail=detail[:DETAIL_CHARACTERS])


def reference_as_answer(problem: Problem) -> str:
    """The reference under the name of an answer."""
    return re.sub(rf"\b{re.escape(problem.reference_top)}\b", problem.top, problem.reference)


def _complaint(done: Finished) -> str:
    """The first error that a tool names, or else the first line that is no warning."""
    lines = [line.strip() for line in (done.stderr + done.stdout).split("\n") if line.strip()]
    graver = [line for line in lines if "warning:" not in line]
    errors = [line for line in graver if _ERROR.search(line)]
    return (errors or graver or lines or [f"exit code {done.returncode} and no output"])[0]


def _ending(done: Finished) -> str:
    said = _complaint(done)
    return said if said.startswith("exit code") else f"exit code {done.returncode}: {said}"
