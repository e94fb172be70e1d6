"""An evaluation from problems to outcomes: judge ready → samples drawn and stored → verdicts → counts.

The judge comes first, because a missing simulator should show before hours of generation. Everything is stored as it
comes; a second start draws and judges only what is not there yet.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.evals import endpoint
from gemma4_tpu.evals.benchmarks import load_problems
from gemma4_tpu.evals.generate import Backend, requests
from gemma4_tpu.evals.problems import (
    HOW_TO_STOP_LEAKS,
    LEAKED,
    Judge,
    Problem,
    SelfCheck,
    Verdict,
    VerdictClass,
    is_leaked_thought,
)  # fmt: skip
from gemma4_tpu.evals.scores import EvaluationOutcome, disagreements, tally
from gemma4_tpu.evals.second_opinions import OPINIONS_FILE, Second, columns, prepare, second_opinions
from gemma4_tpu.evals.store import Key, Rows, Sample, Samples, alike, read_foreign
from gemma4_tpu.evals.verilog.strength import Strength, grade, sentences, to_rows, vacuous
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge
from gemma4_tpu.tracking.records import SELFCHECK, write_record

if TYPE_CHECKING:
    from gemma4_tpu.evals.evaluated_models import Backends

log = logging.getLogger(__name__)

SAMPLES_FILE, VERDICTS_FILE, RESULT_FILE = "samples.jsonl", "verdicts.jsonl", "result.json"
SELFCHECK_FILE = "selfcheck.json"
PROGRESS_SECONDS = 10.0
SETTINGS = ("n", "temperature", "top_p", "max_new_tokens", "seed", "system", "max_problems")


@dataclass
class Subject:
    """Something that has samples: a model, or a file of them."""

    name: str
    folder: Path
    """Of its samples, verdicts and result."""
    backend: Backend | None
    """None: the samples are there already."""
    n: int | None
    """Samples asked for per problem; None: as many as the problem with the most has."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What is known of samples that are there already; a backend describes itself."""
    fingerprints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """What the report is made from."""

    outcomes: list[EvaluationOutcome]
    """The subject first, then what it is compared with."""
    problems: list[Problem]
    check: SelfCheck
    prompt: str | None
    """An example, exactly as the model saw it."""
    fingerprints: dict[str, str]
    """Of problems, weights and tokenizer."""


@dataclass(frozen=True)
class _Court:
    """All that judges."""

    judge: VerilogJudge
    check: SelfCheck
    grades: dict[str, Strength]
    second: Second | None


def evaluate(config: EvalConfig, form: str, folder: Path, load_models: Callable[[], Backends]) -> Evaluated:
    """Runs an evaluation in `folder`, from where it was.

    Args:
      config: what is generated, and how it is judged.
      form: which subject counts: `run`, `checkpoint`, `endpoint`, `samples`, or `resimulate`.
      folder: the record's.
      load_models: of a run or a checkpoint; called once there is a judge.

    Raises:
      UserError: no simulator, no sandbox, no model, damaged files.
    """
    problems = load_problems(config)
    log.info("%s: %d problems, %d samples of each", config.benchmark, len(problems), config.n)
    with VerilogJudge(config.judge) as judge:
        check = judge.prepare(problems)
        log.info("%s, sandbox %s; %d problems cannot pass here", check.simulator, check.sandbox, len(check.cannot_pass))
        scrutiny = config.second_opinion
        grades = grade(problems, judge, check.cannot_pass, config.judge) if scrutiny else {}
        write_record(folder / SELFCHECK_FILE, SELFCHECK, {**check.to_row(), "benches": to_rows(grades)})
        court = _Court(judge, check, grades, _second(problems, judge, config, folder))
        subjects = _subjects(config, form, folder, problems, load_models)
        outcomes = [_evaluate(subject, problems, config, court, again=form == "resimulate") for subject in subjects]
    backend = subjects[0].backend
    prompt = backend.example(requests(problems[:1], config)[0]) if backend else None
    fingerprints = {"problems": _fingerprint(problems), **subjects[0].fingerprints}
    return Evaluated(outcomes, problems, check, prompt, fingerprints)


def _second(problems: Sequence[Problem], judge: VerilogJudge, config: EvalConfig, folder: Path) -> Second | None:
    return prepare(problems, judge, config.stimulus_seed, folder) if config.second_opinion else None


def _fingerprint(problems: Sequence[Problem]) -> str:
    text = "\0".join(part for p in problems for part in (p.name, p.prompt, p.reference, p.testbench))
    return hashlib.sha256(text.encode()).hexdigest()


def _subjects(
    config: EvalConfig, form: str, folder: Path, problems: Sequence[Problem], load_models: Callable[[], Backends]
) -> list[Subject]:
    """The subject in `folder` itself, what it is compared with in a folder of that name beneath."""
    match form:
        case "run" | "checkpoint":
            loaded = load_models()
            return [
                Subject(name, _place(folder, i, name), backend, config.n, fingerprints=loaded.fingerprints)
                for i, (name, backend) in enumerate(loaded.by_name.items())
            ]
        case "endpoint":
            return [Subject("endpoint", folder, endpoint.Endpoint(config), config.n)]
        case "samples":
            _take_over(config, folder, problems)
            return [Subject("samples", folder, None, None, {"samples": config.samples})]
    recorded = [folder, *(place for place in sorted(folder.iterdir()) if (place / SAMPLES_FILE).is_file())]
    results = [EvaluationOutcome.read(place / RESULT_FILE) for place in recorded]
    return [
        Subject(result.name, place, None, result.n, result.settings)
        for result, place in zip(results, recorded, strict=True)
    ]


def _place(folder: Path, index: int, name: str) -> Path:
    return folder / name if index else folder


def _take_over(config: EvalConfig, folder: Path, problems: Sequence[Problem]) -> None:
    """Foreign samples as our own `samples.jsonl`."""
    with Samples(folder / SAMPLES_FILE) as store:
        for sample in read_foreign(config.samples or "", [problem.name for problem in problems]):
            if sample.key not in store.rows:
                store.add_sample(sample)


def _evaluate(
    subject: Subject, problems: Sequence[Problem], config: EvalConfig, court: _Court, *, again: bool
) -> EvaluationOutcome:
    """Draws, judges and counts the samples of one subject, and writes its `result.json`."""
    subject.folder.mkdir(exist_ok=True)
    generation_seconds = _generate(subject, problems, config) if subject.backend else None
    if again:
        for made in (VERDICTS_FILE, OPINIONS_FILE):
            (subject.folder / made).unlink(missing_ok=True)
    with Samples(subject.folder / SAMPLES_FILE) as store:
        samples = store.samples
    started = time.perf_counter()
    check, second = court.check, court.second
    verdicts = _judge(samples, problems, court.judge, subject.folder / VERDICTS_FILE)
    path = subject.folder / OPINIONS_FILE
    opinions = second_opinions(samples, verdicts, second, court.judge, config.columns, path) if second else None
    n = subject.n or max(Counter(sample.problem for sample in samples).values())
    described = subject.backend.description if subject.backend else subject.settings
    outcome = EvaluationOutcome(
        name=subject.name,
        benchmark=config.benchmark,
        settings={
            **{key: getattr(config, key) for key in SETTINGS},
            "problems": _fingerprint(problems)[:12],
            **described,
        },
        problems=tally([p.name for p in problems], n, samples, verdicts, opinions),
        selfcheck={"simulator": check.simulator, "sandbox": check.sandbox},
        cannot_pass=dict(check.cannot_pass),
        vacuous=vacuous(court.grades),
        benches=sentences(court.grades) if court.grades else [],
        second=_about(second, samples, verdicts, opinions or {}) if second else {},
        tokens=sum(sample.tokens or 0 for sample in samples) or None,
        generation_seconds=generation_seconds,
        judging_seconds=time.perf_counter() - started,
    )
    if outcome.missing:
        log.warning("%s: %d of %d samples were never obtained; they count as failures",
                    subject.name, outcome.missing, outcome.samples)  # fmt: skip
    if leaked := outcome.classes.get(VerdictClass.LEAKED):
        log.warning("%s: %d of %d samples begin with a leaked thought and are not judged. %s",
                    subject.name, leaked, outcome.samples, HOW_TO_STOP_LEAKS)  # fmt: skip
    outcome.write(subject.folder / RESULT_FILE)
    return outcome


def _about(
    second: Second, samples: Sequence[Sample], verdicts: Mapping[Key, Verdict], opinions: Mapping[Key, Any]
) -> dict[str, Any]:
    """What the report says of second opinions."""
    rows = disagreements(samples, verdicts, opinions)
    return {"seed": second.seed, "without": second.without, "disagreements": rows, **columns(opinions.values())}


def _generate(subject: Subject, problems: Sequence[Problem], config: EvalConfig) -> float:
    """Draws what is not stored yet; returns the seconds it took."""
    assert subject.backend is not None
    started = time.perf_counter()
    with Samples(subject.folder / SAMPLES_FILE) as store:
        wanted = [r for r in requests(problems, config) if (r.problem, r.sample) not in store.rows]
        if stored := len(store.rows):
            log.info("%s: %d samples are stored, %d to draw", subject.name, stored, len(wanted))
        if wanted:
            for sample in subject.backend.generate(wanted):
                store.add_sample(sample)
    return time.perf_counter() - started


def _judge(samples: Sequence[Sample], problems: Sequence[Problem], judge: Judge, path: Path) -> Mapping[Key, Verdict]:
    """Verdicts of all samples; equal completions of a problem are simulated once."""
    by_name = {problem.name: problem for problem in problems}
    with Rows(path) as rows:
        fresh = [s for s in samples if s.key not in rows.rows and s.problem in by_name]
        for sample in fresh:
            if is_leaked_thought(sample.completion):
                rows.add_for(sample, LEAKED.to_row())
        equal = alike(s for s in fresh if not is_leaked_thought(s.completion))
        if equal:
            log.info("judging %d samples, %d of them distinct", sum(map(len, equal.values())), len(equal))
        verdicts = judge.judge_all((by_name[problem], completion) for problem, completion in equal)
        # Verdicts come in the order of the samples, and each is stored as it comes: a kill loses none that was given.
        for same, verdict in zip(_reported(equal.values(), len(equal)), verdicts, strict=True):
            for sample in same:
                rows.add_for(sample, verdict.to_row())
        return {key: _verdict(row) for key, row in rows.rows.items()}


def _verdict(row: Mapping[str, Any]) -> Verdict:
    return Verdict.from_row({key: value for key, value in row.items() if key not in ("problem", "sample")})


def _reported(groups: Iterable[list[Sample]], total: int) -> Iterable[list[Sample]]:
    """Passes the groups on, and logs how far the judge is, now and then."""
    last = time.perf_counter()
    for done, group in enumerate(groups):
        if time.perf_counter() - last > PROGRESS_SECONDS:
            last = time.perf_counter()
            log.info("judged %d of %d", done, total)
        yield group
