"""Applies the benchmark's own rule to the same code, for comparison with published figures. It can be fooled."""

from __future__ import annotations

from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog import scan
from gemma4_tpu.evals.verilog.stage import PROGRAM
from gemma4_tpu.evals.verilog.verdict import Findings, Golden, Refused, Trial
from gemma4_tpu.evals.verilog.work_folder import read, write

DESIGN, BENCH, REFERENCE = "design.sv", "bench.sv", "reference.sv"
SEVERAL_DRIVERS = " .resolv "  # in a compiled program
WAVES = "wave.vcd"  # the only file that a benchmark's bench may write


def passes_officially(trial: Trial, outcome: Findings, golden: Golden) -> bool:
    """The benchmark's rule on the unchanged files in the benchmark's order, given the findings of the measures.

    If that simulation is known to give the same result, the existing log is judged instead: the bench builds unchanged,
    and the design ran to its count, was compiled as a whole, and has no macros that could change the bench, no delays
    whose unit depends on the order of files, no net with several drivers (a bench's variable can't be connected to
    one), and no module that the bench has too.
    """
    problem = trial.problem
    if outcome.kind is VerdictClass.TIMEOUT:
        return False
    bench_modules = {*scan.defined_modules(problem.testbench), *scan.defined_modules(problem.reference)}
    alike = not (trial.pruned or {*"`#"} & {*trial.code} or bench_modules & {*scan.defined_modules(trial.code)})
    counted = outcome.kind in (VerdictClass.PASS, VerdictClass.MISMATCH)
    if alike and counted and golden.builds_unchanged and SEVERAL_DRIVERS not in read(trial.folder / PROGRAM):
        return problem.official_rule(outcome.log)
    try:
        log, builds = _build(trial)
        return problem.official_rule(log + _simulate(trial) if builds else log)
    except Refused:
        return False


def builds_unchanged(trial: Trial) -> bool:
    """Whether design and bench build with the benchmark's own command."""
    try:
        return _build(trial)[1]
    except Refused:
        return False


def _build(trial: Trial) -> tuple[str, bool]:
    """(output of the benchmark's own compilation, whether it succeeded)."""
    problem = trial.problem
    files = {DESIGN: trial.code, BENCH: problem.testbench}
    if problem.bench_needs_reference:
        files[REFERENCE] = problem.reference
    for left in trial.folder.iterdir():
        left.unlink()
    write(trial.folder, {**files, **problem.files})
    command = trial.tools.build(problem.bench_top, PROGRAM, [*files])
    built = trial.run(command, "build", writable=[trial.folder])
    return built.stdout + built.stderr, built.returncode == 0


def _simulate(trial: Trial) -> str:
    """The output of the benchmark's own simulation."""
    waves = trial.folder / WAVES
    waves.touch()
    trial.sandbox.adopt(waves)
    done = trial.run(trial.tools.simulate(PROGRAM), "run", writable=[waves])
    return done.stdout + done.stderr
