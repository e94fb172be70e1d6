"""The verdict on one design: measures, each of which can refuse it, and the benchmark's own rule beside.

The design is simulated alone, behind a player that gives it the bench's stimulus and writes down its responses. Then
the bench runs, in a process without a line of the design, with a stand-in that gives it these responses (`replay.py`).

1. `text`: nothing unterminated or unreadable, no system task or directive off the lists, in the source and in its
   expansion;
2. `build`: the design builds behind the player;
3. `run`: its simulation lasts until the stimulus ends;
4. `replay`: the bench, given the responses, gives the stimulus that they were made for, and one result;
5. `count`: no errors, and as many samples as with the reference on this simulator.

Where a bench waits for its design, the stimulus depends on the responses. It then differs from the reference's from
some moment on; the design is simulated again with the new one, until both agree. Each round is right for at least one
moment more, since nothing in a bench depends on what comes later.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma4_tpu.evals.problems import Problem, Verdict, VerdictClass
from gemma4_tpu.evals.verilog import replay, scan
from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.sandbox import Finished, Sandbox
from gemma4_tpu.evals.verilog.stage import BENCH_PROGRAM, PLAYER, NoStage, Stage, build_failure, unknown_bit_ticks

DESIGN, EXPANDED, BENCH, REFERENCE, PROGRAM = "design.sv", "expanded.sv", "bench.sv", "reference.sv", "program.vvp"
WAVES = "wave.vcd"  # the one file that a benchmark's bench may write
ROUNDS = 200  # of a bench that waits for its design
CPU_FACTOR = 10
"""A compilation or simulation gets this many times what judging the reference took, and at least a second."""
DETAIL_CHARACTERS = 200
_RESPONSES = re.compile(r"(?:[0-9a-f]{1,8} [0-9a-f]{1,16} [01] [01xz]+\n)*+", re.ASCII)


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
    """Where the design is compiled and simulated."""
    bench_folder: Path
    """Where the bench is simulated. No design reads it."""
    stage: Callable[[str], Stage] | None
    """Makes the bench ready for the design's text, or raises `NoStage`; null: only the benchmark's own rule can be
    asked."""
    limit_seconds: float | None = None
    """CPU time of one command; null: as configured."""
    replayed: dict[str, tuple[bytes, Finished]] = field(default_factory=dict)
    """Result marker of a stage → (digest of the latest responses that gave its stimulus back, what the bench did then).
    Right designs respond alike, and a bench that gets the same responses does the same."""
    cpu_seconds: float = 0.0
    pruned: bool = field(default=False, init=False)
    """Modules that the design does not use were left out."""

    def strict(self, golden: Golden | None) -> Outcome:
        """All measures; without `golden` the last one only asks for no errors."""
        assert self.stage is not None
        try:
            stage = self._staged(self.stage, self._text())
            log = self._build(stage)
            return self._count(*self._simulate(stage, log), golden)
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

    def _text(self) -> str:
        """Measure 1: the text that is compiled; it is left in the folder."""
        code, found = scan.canonical(self.code)
        if found:
            raise _Refused(VerdictClass.FORBIDDEN, "text", found)
        text = self._expanded(code) if scan.has_macros(code) else code
        design = scan.reachable(text, self.problem.top)
        if found := scan.forbidden(design):
            raise _Refused(VerdictClass.FORBIDDEN, "text", found)
        self.pruned = design != text
        design = scan.without_dumps(design)
        _write(self.folder, {EXPANDED: design})
        return design

    def _staged(self, stage: Callable[[str], Stage], design: str) -> Stage:
        """The bench made ready. Where there is no reference, the design itself may be why it can't be."""
        try:
            return stage(design)
        except NoStage as reason:
            blamed = not self.problem.reference or reason.kind is VerdictClass.TIMEOUT
            raise _Refused(reason.kind if blamed else VerdictClass.NO_RESULT, "build", str(reason)) from None

    def _expanded(self, code: str) -> str:
        """The design as the preprocessor leaves it, without macros."""
        _write(self.folder, {DESIGN: code})
        done = self._run(self.tools.preprocess(DESIGN, EXPANDED), "text", writable=[self.folder])
        if done.returncode:
            raise _Refused(VerdictClass.SYNTAX, "text", _complaint(done))
        try:
            text = _read(self.folder / EXPANDED)
        except OSError as error:
            raise _Refused(VerdictClass.SYNTAX, "text", f"nothing was preprocessed: {error}") from None
        (self.folder / EXPANDED).unlink()  # it is the sandbox's user's
        text, found = scan.canonical(text)
        if found:
            raise _Refused(VerdictClass.FORBIDDEN, "text", found)
        return text

    def _build(self, stage: Stage) -> str:
        """Measure 2: what the compiler printed. No directive of the design reaches the player, which stands first."""
        _write(self.folder, {PLAYER: _read(stage.folder / PLAYER)})
        command = self.tools.build(stage.player_top, PROGRAM, [PLAYER, EXPANDED])
        done = self._run(command, "build", writable=[self.folder])
        if done.returncode:
            raise _Refused(build_failure(done), "build", _complaint(done))
        return done.stdout + done.stderr

    def _simulate(self, stage: Stage, log: str) -> tuple[Mapping[str, str], str]:
        """Measures 3 and 4: (groups of the result line, log as the benchmark would have it)."""
        os.link(stage.folder / BENCH_PROGRAM, self.bench_folder / BENCH_PROGRAM)
        _write(self.bench_folder, self.problem.files)
        stimulus = first = _read(stage.folder / replay.STIMULUS)
        for _ in range(ROUNDS):
            _write(self.folder, {replay.STIMULUS: stimulus})
            responses, played = self._responses()
            seen, bench = self._seen(stage, first, responses)
            if seen == stimulus:
                break
            if self.problem.bench_needs_reference and unknown_bit_ticks(seen) > stage.unknown_bit_ticks:
                raise _Refused(VerdictClass.MISMATCH, "replay", "the design made the reference's inputs unknown")
            stimulus = seen
        else:
            raise _Refused(VerdictClass.NO_RESULT, "replay", f"bench and design do not agree in {ROUNDS} rounds")
        log = "".join([stage.build_log, log, played.stdout, played.stderr, bench.stdout, bench.stderr])
        log = log.replace(stage.result_marker, self.problem.result_marker)
        if f"\n{replay.CAPPED}\n" in f"\n{seen}":
            raise _Refused(VerdictClass.NO_RESULT, "replay", "the bench does not end with this design", log)
        if bench.returncode:
            raise _Refused(VerdictClass.NO_RESULT, "replay", f"exit code {bench.returncode}: {_complaint(bench)}", log)
        result = stage.result(self.problem, bench.stdout)
        if isinstance(result, str):
            failed = self.problem.failure_pattern and re.search(self.problem.failure_pattern, bench.stdout)
            raise _Refused(VerdictClass.MISMATCH if failed else VerdictClass.NO_RESULT, "replay", result, log)
        return result.groupdict(), log

    def _responses(self) -> tuple[str, Finished]:
        """What the design answers to the stimulus in its folder, and what it printed.

        A design could write here what it likes. It would still be nothing but a claim about its outputs.
        """
        text, done = self._written(replay.RESPONSES, PROGRAM, self.folder, "run")
        if done.returncode:
            raise _Refused(VerdictClass.RUNTIME, "run", f"exit code {done.returncode}: {_complaint(done)}")
        lines = _RESPONSES.match(text)
        assert lines is not None  # it matches the empty text
        if text[lines.end() :] != replay.END:
            raise _Refused(VerdictClass.RUNTIME, "run", "the simulation ended before the stimulus did")
        return lines[0], done

    def _seen(self, stage: Stage, first: str, responses: str) -> tuple[str, Finished]:
        """The stimulus that the bench gives to a design with these responses (`first`, often), and what it says."""
        digest = hashlib.sha256(responses.encode()).digest()
        known, done = self.replayed.get(stage.result_marker, (None, None))
        if done and known == digest:
            return first, done
        _write(self.bench_folder, {replay.RESPONSES: responses})
        seen, done = self._written(replay.SEEN, BENCH_PROGRAM, self.bench_folder, "replay")
        if seen == first:
            self.replayed[stage.result_marker] = (digest, done)
        return seen, done

    def _written(self, name: str, program: str, folder: Path, measure: str) -> tuple[str, Finished]:
        """What a simulation wrote to the one file that it may write, and what it printed."""
        file = folder / name
        file.unlink(missing_ok=True)
        with file.open("x+b") as opened:  # read through this handle: the name could lead elsewhere by then
            self.sandbox.adopt(file)
            done = self._run(self.tools.simulate(program), measure, folder=folder, writable=[file])
            opened.seek(0)
            return opened.read().decode("ascii", "replace"), done

    def _count(self, groups: Mapping[str, str], log: str, golden: Golden | None) -> Outcome:
        """Measure 5."""
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
        _write(self.folder, {**files, **self.problem.files})
        build = self._run(self.tools.build(self.problem.bench_top, PROGRAM, [*files]), "build", writable=[self.folder])
        return build.stdout + build.stderr, build.returncode == 0

    def _run_officially(self) -> str:
        """What the benchmark's own simulation prints."""
        waves = self.folder / WAVES
        waves.touch()
        self.sandbox.adopt(waves)
        done = self._run(self.tools.simulate(PROGRAM), "run", writable=[waves])
        return done.stdout + done.stderr

    def _run(
        self, command: Sequence[str], measure: str, *, folder: Path | None = None, writable: Sequence[Path] = ()
    ) -> Finished:
        done = self.sandbox.run(command, folder or self.folder, writable=writable, cpu_seconds=self.limit_seconds)
        self.cpu_seconds += done.cpu_seconds
        if done.stopped == "output":
            raise _Refused(VerdictClass.RUNTIME, measure, "more output than eval.judge.output_kib")
        if done.stopped:
            limit = min(self.sandbox.config.cpu_seconds, self.limit_seconds or math.inf)
            raise _Refused(VerdictClass.TIMEOUT, measure, f"{done.stopped} time beyond {limit:.0f} CPU seconds")
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


def _complaint(done: Finished) -> str:
    """The first line of what a tool complained of."""
    lines = [line for line in (done.stderr + done.stdout).split("\n") if line.strip()]
    return lines[0].strip() if lines else f"exit code {done.returncode} without a word"


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Writes new files, whatever a compiler in a sandbox left under their names."""
    for name, text in files.items():
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("x", encoding="utf-8", errors="replace", newline="") as file:
            file.write(text)


def _read(file: Path) -> str:
    """The text of a file that a compiler may have written in a sandbox: no link, no pipe."""
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
        return opened.read().decode("utf-8", "replace")
