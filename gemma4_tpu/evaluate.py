"""`python -m gemma4_tpu.evaluate run=<run folder>`: generates and judges answers; scores come with intervals.

Configuration → judge → samples, stored as they are drawn → verdicts → report. run_dir=… resumes a killed evaluation.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import Loaded, from_yaml, load
from gemma4_tpu.config.tasks import EvaluateRoot
from gemma4_tpu.errors import Ended, UserError, exit_code, leave
from gemma4_tpu.evals.checks import EvaluateChecked, examine_evaluate, normalise_evaluate

if TYPE_CHECKING:
    from gemma4_tpu.evals.draw_and_judge import Evaluated
    from gemma4_tpu.evals.evaluated_models import Backends
    from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)
MAY_CHANGE = (
    "eval.batch_size", "eval.columns", "eval.concurrency", "eval.image_cache", "eval.judge",
    "eval.request_timeout_seconds", "eval.retries", "eval.second_opinion", "eval.stimulus_seed",
)  # fmt: skip
"""Keys (and groups) that can change when an evaluation resumes."""
JUDGED_ANEW = ("compare", "extract", "category", "choose")
"""Keys of `eval.answers` with which stored samples can be judged again."""


EVALUATE: EntryPoint[EvaluateRoot, EvaluateChecked] = EntryPoint(
    name="evaluate",
    schema=EvaluateRoot,
    normalise=normalise_evaluate,
    examine=examine_evaluate,
    summary=(
        "Score a model on Verilog by simulation, or on your own rows. Verilog solutions are judged in a sandbox"
        " (pass@k; needs Icarus Verilog), other answers are compared (accuracy); scores come with intervals."
    ),
    examples=(
        ("run=outputs/train/<run>", "a run compared with its base, on the embedded synthetic problems"),
        ("run=outputs/train/<run> eval=verilog_eval eval.problems_path=<clone>", "on verilog-eval, 20 samples each"),
        ("model=gemma4_31b model.path=<checkpoint> eval=paper eval.problems_path=<clone>", "a checkpoint, 5 samples"),
        ("eval.endpoint=http://localhost:8000/v1 eval=verilog_eval eval.problems_path=<clone>", "a model on a server"),
        ("run=outputs/train/<run> eval=accuracy eval.problems_path=test.jsonl", "on your own rows"),
        (
            "eval=lm_eval eval.tasks=[arc_challenge] eval.endpoint=http://localhost:8000/v1 model.tokenizer=<base>",
            "tasks of lm-evaluation-harness",
        ),
        ("eval.samples=samples.jsonl eval=verilog_eval eval.problems_path=<clone>", "judge existing samples"),
        ("run_dir=<evaluation> eval.resimulate=true", "judge stored samples again"),
        ("selfcheck=true", "check the sandbox and the simulator on this machine"),
        ("compare=[<evaluation>,<evaluation>]", "two evaluations, problem by problem"),
    ),
    shorthands={"eval.unsafe": "eval.judge.unsafe", "eval.tasks": "eval.lm_eval.tasks"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 done, 2 refused (one message on stderr), 130 or 143 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return exit_code(lambda: run(load(list(sys.argv[1:] if argv is None else argv), EVALUATE)).code)


def run(loaded: Loaded[EvaluateRoot, EvaluateChecked]) -> Ended:
    """Runs the form of evaluation that the command line requests."""
    match loaded.checked.form:
        case "selfcheck":
            return Ended(_selfcheck(loaded.root))
        case "compare":
            return Ended(_compare(loaded.root.compare))
        case "harness":
            return _harness(loaded)
    return _evaluate(loaded)


def _evaluate(loaded: Loaded[EvaluateRoot, EvaluateChecked]) -> Ended:
    """Runs one evaluation and keeps its record."""
    from gemma4_tpu.evals.draw_and_judge import evaluate
    from gemma4_tpu.tracking import records
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.run import RunFolder

    setup_logging()
    config, form = loaded.root, loaded.checked.form
    if form == "resimulate":
        config = _recorded(config, loaded.overrides)
    record = RunFolder.open(
        config.run or "outputs", config.name, config.run_dir, "auto",
        config=asdict(config), kind=records.EVALUATION, overrides=loaded.overrides,
        resume_allow=(*MAY_CHANGE, *(["eval.answers"] if form == "resimulate" else [])),
    )  # fmt: skip
    setup_logging(record.log_path)

    def job() -> int:
        _report(record, evaluate(config.eval, form, record.path, partial(_models, config, form)), config)
        return 0

    return Ended(record.work(job), (record.path,))


def _harness(loaded: Loaded[EvaluateRoot, EvaluateChecked]) -> Ended:
    """Runs tasks of lm-evaluation-harness on a server, and keeps their record."""
    from gemma4_tpu.evals.harness_job import run_harness
    from gemma4_tpu.reporting.harness_tables import harness_summary, write_harness_report
    from gemma4_tpu.tracking import provenance, records
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.run import RunFolder

    setup_logging()
    config = loaded.root
    record = RunFolder.open(
        "outputs", config.name, config.run_dir, "auto",
        config=asdict(config), kind=records.HARNESS, overrides=loaded.overrides, resume_allow=MAY_CHANGE,
    )  # fmt: skip
    setup_logging(record.log_path)

    def job() -> int:
        assert config.model.tokenizer is not None  # ensured by the checks
        outcome = run_harness(config.eval, config.model.tokenizer, record.path)
        captured = provenance.capture(
            hardware={"slice": config.hardware.name}, seeds={}, fingerprints={"lm_eval": outcome.lm_eval}
        )
        provenance.record(record, captured)
        write_harness_report(outcome, record.path / "report.md")
        print(f"{harness_summary(outcome)}\nreport: {record.path / 'report.md'}")
        return 0

    return Ended(record.work(job), (record.path,))


def _models(config: EvaluateRoot, form: str, *, pictures: bool) -> Backends:
    """Loads the models to generate with; starts JAX. `pictures`: whether prompts contain pictures."""
    from gemma4_tpu.evals.evaluated_models import of_checkpoint, of_run, on_server

    if form == "endpoint":
        return on_server(config.model, config.eval)
    if form == "run":
        return of_run(config.run, config.eval, config.hardware, config.mesh, pictures=pictures)
    return of_checkpoint(config.model, config.eval, config.hardware, config.mesh, pictures=pictures)


def _report(record: RunFolder, done: Evaluated, config: EvaluateRoot) -> None:
    """Writes `report.md`, the plot and provenance, and prints the scores."""
    from gemma4_tpu.evals.compare import compare
    from gemma4_tpu.reporting.evaluation import plot_outcomes, summary, write_report
    from gemma4_tpu.tracking import provenance

    captured = provenance.capture(
        hardware={"slice": config.hardware.name}, seeds={"eval": config.eval.seed}, fingerprints=done.fingerprints
    )
    provenance.record(record, captured)
    comparison = compare(done.outcomes[0], done.outcomes[1]) if len(done.outcomes) > 1 else None
    plot = plot_outcomes(done.outcomes, record.plots)
    write_report(
        record.path / "report.md", done.outcomes, comparison=comparison, prompt=done.prompt,
        packages=captured.packages, plots=[plot],
    )  # fmt: skip
    for outcome in done.outcomes:
        print(summary(outcome))
    _print_list(comparison.claims() if comparison else [])
    print(f"report: {record.path / 'report.md'}")


def _recorded(config: EvaluateRoot, words: Sequence[str]) -> EvaluateRoot:
    """The configuration of the evaluation in `run_dir`, with the command line's settings for judging; unset answer
    settings stay as recorded.
    """
    assert config.run_dir is not None  # ensured by the checks
    recorded: EvaluateRoot = from_yaml(Path(config.run_dir, "config.yaml").read_text(encoding="utf-8"), EvaluateRoot)
    given = config.eval
    named = [key for key in JUDGED_ANEW if any(word.startswith(f"eval.answers.{key}=") for word in words)]
    answers = replace(recorded.eval.answers, **{key: getattr(given.answers, key) for key in named})
    if "letter" in {answers.choose, recorded.eval.answers.choose} and answers.choose != recorded.eval.answers.choose:
        raise UserError(f"eval.answers.choose={answers.choose}: the stored samples need {recorded.eval.answers.choose}")
    evaluation = replace(
        recorded.eval, answers=answers, judge=given.judge, second_opinion=given.second_opinion,
        stimulus_seed=given.stimulus_seed, columns=given.columns,
    )  # fmt: skip
    return replace(recorded, eval=evaluation, run_dir=config.run_dir)


def _selfcheck(config: EvaluateRoot) -> int:
    """Prints how sandbox and simulator behave here; returns 0 if everything works."""
    from gemma4_tpu.evals.benchmarks import load_problems
    from gemma4_tpu.evals.verilog.strength import grade, sentences
    from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge
    from gemma4_tpu.tracking.logs import setup_logging

    setup_logging()
    problems = load_problems(config.eval)
    with VerilogJudge(config.eval.judge) as judge:
        check = judge.prepare(problems, fresh=True)
        print(check.table(), flush=True)
        grades = grade(problems, judge, check.cannot_pass, config.eval.judge, with_mutants=True, fresh=True)
        print("\n".join(f"benches     {said}" for said in sentences(grades)))
    return 0


def _compare(folders: Sequence[str]) -> int:
    """Prints a comparison of two evaluations, problem by problem."""
    from gemma4_tpu.evals.compare import compare
    from gemma4_tpu.evals.harness import compare_harness
    from gemma4_tpu.evals.scores import EvaluationOutcome
    from gemma4_tpu.tracking.records import HARNESS, result_of

    if HARNESS in {result_of(Path(folder)).kind for folder in folders}:
        print(f"A: {folders[0]}\nB: {folders[1]}")
        _print_list(compare_harness(Path(folders[0]), Path(folders[1])).claims("A", "B"))
        return 0
    a, b = (EvaluationOutcome.read(Path(folder, "result.json")) for folder in folders)
    names = (a.name, b.name) if a.name != b.name else ("A", "B")
    print(f"{names[0]}: {folders[0]}\n{names[1]}: {folders[1]}")
    _print_list(compare(a, b, names).claims())
    return 0


def _print_list(items: Iterable[str]) -> None:
    """Prints items wrapped at words on a terminal, else one per line."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for item in items:
        print(textwrap.fill(f"- {item}", width, subsequent_indent="  ", break_on_hyphens=False))


if __name__ == "__main__":
    leave(main())
