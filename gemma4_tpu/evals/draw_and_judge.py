"""An evaluation from problems to outcomes: prepare the judge → draw and store samples → verdicts → counts.

The judge starts first, so that a missing simulator is noticed before hours of generation. Everything is stored as it
arrives; a second start draws and judges only what is missing.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.data.seen import holds_pictures
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.accuracy.answers_court import AnswersCourt
from gemma4_tpu.evals.checks import ACCURACY
from gemma4_tpu.evals.court import Court
from gemma4_tpu.evals.generate import Backend, requests
from gemma4_tpu.evals.problems import HOW_TO_STOP_LEAKS, Asked, VerdictClass
from gemma4_tpu.evals.scores import EvaluationOutcome, tally
from gemma4_tpu.evals.simulated import Simulation
from gemma4_tpu.evals.store import Samples, read_foreign

if TYPE_CHECKING:
    from gemma4_tpu.evals.evaluated_models import Backends

log = logging.getLogger(__name__)

SAMPLES_FILE, RESULT_FILE = "samples.jsonl", "result.json"
SETTINGS = ("n", "temperature", "top_p", "max_new_tokens", "seed", "system", "max_problems")


@dataclass
class Subject:
    """A source of samples: a model, or a file."""

    name: str
    folder: Path
    """Folder of its samples, verdicts and result."""
    backend: Backend | None
    """None: the samples exist already."""
    n: int | None
    """Samples requested per problem; None: the number of samples of the problem with the most."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of existing samples; a backend describes itself."""
    fingerprints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """The input of the report."""

    outcomes: list[EvaluationOutcome]
    """The subject's outcome, then those that it is compared with."""
    prompt: str | None
    """An example prompt, exactly as the model saw it."""
    fingerprints: dict[str, str]
    """Fingerprints of problems, weights and tokenizer."""


class LoadModels(Protocol):
    """Loads a run, a checkpoint or a server."""

    def __call__(self, *, pictures: bool) -> Backends:
        """`pictures`: whether prompts contain pictures."""


def evaluate(config: EvalConfig, form: str, folder: Path, load_models: LoadModels) -> Evaluated:
    """Runs an evaluation in `folder`, or resumes it.

    Args:
      config: what to generate, and how to judge it.
      form: kind of subject: `run`, `checkpoint`, `endpoint`, `samples` or `resimulate`.
      folder: the record's.
      load_models: called once the judge is ready.

    Raises:
      UserError: there is no simulator, sandbox or model, or a file is damaged.
    """
    opened: Court = AnswersCourt(config) if config.benchmark == ACCURACY else Simulation(config, folder)
    samples = f"{config.n} sample{'s' * (config.n != 1)} of each"
    log.info("%s: %d problems, %s", config.benchmark, len(opened.problems), samples)
    with opened as court:
        subjects = _subjects(config, form, folder, court.problems, load_models)
        outcomes = [_evaluate(subject, config, court, again=form == "resimulate") for subject in subjects]
    backend = subjects[0].backend
    prompt = backend.example(requests(court.problems[:1], config)[0]) if backend else None
    return Evaluated(outcomes, prompt, {"problems": court.fingerprint, **subjects[0].fingerprints})


def _subjects(
    config: EvalConfig, form: str, folder: Path, problems: Sequence[Asked], load_models: LoadModels
) -> list[Subject]:
    """The subjects: the first in `folder` itself, those that it is compared with in subfolders by name."""
    match form:
        case "run" | "checkpoint" | "endpoint":
            loaded = load_models(pictures=any(holds_pictures(problem.messages) for problem in problems))
            return [
                Subject(name, _place(folder, i, name), backend, config.n, fingerprints=loaded.fingerprints)
                for i, (name, backend) in enumerate(loaded.by_name.items())
            ]
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


def _take_over(config: EvalConfig, folder: Path, problems: Sequence[Asked]) -> None:
    """Copies samples from elsewhere into our own `samples.jsonl`."""
    with Samples(folder / SAMPLES_FILE) as store:
        for sample in read_foreign(config.samples or "", [problem.name for problem in problems]):
            if sample.key not in store.rows:
                store.add_sample(sample)


def _evaluate(subject: Subject, config: EvalConfig, court: Court, *, again: bool) -> EvaluationOutcome:
    """Draws, judges and counts the samples of one subject, and writes its `result.json`."""
    subject.folder.mkdir(exist_ok=True)
    generation_seconds = _generate(subject, court.problems, config) if subject.backend else None
    with Samples(subject.folder / SAMPLES_FILE) as store:
        samples = store.samples
    started = time.perf_counter()
    findings = court.judge(samples, subject.folder, again=again)
    n = subject.n or max(Counter(sample.problem for sample in samples).values())
    described = subject.backend.description if subject.backend else subject.settings
    outcome = EvaluationOutcome(
        name=subject.name,
        benchmark=config.benchmark,
        settings={
            **{key: getattr(config, key) for key in SETTINGS},
            "problems": court.fingerprint[:12],
            **described,
            **court.settings,
        },
        problems=tally(
            [p.name for p in court.problems], n, samples, findings.verdicts, findings.opinions,
            official=court.official, categories=court.categories,
        ),
        tokens=sum(sample.tokens or 0 for sample in samples) or None,
        generation_seconds=generation_seconds,
        judging_seconds=time.perf_counter() - started,
        **court.told,
        **findings.told,
    )  # fmt: skip
    if outcome.missing:
        log.warning("%s: %d of %d samples were never obtained; they count as failures",
                    subject.name, outcome.missing, outcome.samples)  # fmt: skip
    if leaked := outcome.classes.get(VerdictClass.LEAKED):
        log.warning("%s: %d of %d samples begin with a leaked thought and are not judged. %s",
                    subject.name, leaked, outcome.samples, HOW_TO_STOP_LEAKS)  # fmt: skip
    outcome.write(subject.folder / RESULT_FILE)
    return outcome


def _generate(subject: Subject, problems: Sequence[Asked], config: EvalConfig) -> float:
    """Draws the samples that are not stored yet; returns the seconds it took.

    Raises:
      UserError: no answer arrived, for example because the server can't read the requests.
    """
    assert subject.backend is not None
    started = time.perf_counter()
    with Samples(subject.folder / SAMPLES_FILE) as store:
        wanted = [r for r in requests(problems, config) if (r.problem, r.sample) not in store.rows]
        if stored := len(store.rows):
            log.info("%s: %d samples are stored, %d to draw", subject.name, stored, len(wanted))
        if wanted:
            for sample in subject.backend.generate(wanted):
                store.add_sample(sample)
        if not store.rows:
            raise UserError(
                f"{subject.name}: none of {len(wanted)} answers arrived, so there is nothing to score; see the reasons"
                " above and in the log"
            )
    return time.perf_counter() - started
