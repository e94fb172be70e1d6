"""The benchmark's own rule on the same code, for comparison with published figures. It can be fooled."""

from __future__ import annotations

from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog import scan
from gemma4_tpu.evals.verilog.stage import PROGRAM
from gemma4_tpu.evals.verilog.verdict import Findings, Golden, Refused, Trial
from gemma4_tpu.evals.verilog.work_folder import write

DESIGN, BENCH, REFERENCE = "design.sv", "bench.sv", "reference.sv"
WAVES = "wave.vcd"  # the one file that a benchmark's bench may write


def passes_officially(trial: Trial, outcome: Findings, golden: Golden) -> bool:
    """The benchmark's rule on the unchanged files in the benchmark's order, given what the measures found.

    Where the same simulation is known to come out, its log is judged instead: the bench builds unchanged, the design
    ran to its count, has no macros that could change the bench, no delays whose unit the order of files decides, no
    module that the bench has too, and was compiled as a whole.
    """
    problem = trial.problem
    if outcome.kind is VerdictClass.TIMEOUT:
        return False
    bench_modules = {*scan.defined_modules(problem.testbench), *scan.defined_modules(problem.reference)}
    alike = not (trial.pruned or {*"`#"} & {*trial.code} or bench_modules & {*scan.defined_modules(trial.code)})
    if alike and golden.builds_unchanged and outcome.kind in (VerdictClass.PASS, VerdictClass.MISMATCH):
        return problem.official_rule(outcome.log)
    try:
        log, builds = _build(trial)
        return problem.official_rule(log + _simulate(trial) if builds else log)
    except Refused:
        return False


def builds_unchanged(trial: Trial) -> bool:
    """Whether design and bench build by the benchmark's own command."""
    try:
        return _build(trial)[1]
    except Refused:
        return False


def _build(trial: Trial) -> tuple[str, bool]:
    """(what the benchmark's own compilation printed, whether it succeeded)."""
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
    """What the benchmark's own simulation prints."""
    waves = trial.folder / WAVES
    waves.touch()
    trial.sandbox.adopt(waves)
    done = trial.run(trial.tools.simulate(PROGRAM), "run", writable=[waves])
    return done.stdout + done.stderr
