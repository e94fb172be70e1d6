"""Search by Optuna: trials are jobs of the sweep, and the study is a journal in its folder, so that a search
resumes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from gemma4_tpu.config.conf import config_dir, groups_of
from gemma4_tpu.config.keys import did_you_mean, field_types, is_group, type_name
from gemma4_tpu.config.overrides import Groups, check_overrides
from gemma4_tpu.config.refusals import refusal
from gemma4_tpu.config.sweeps import Optuna
from gemma4_tpu.errors import UserError
from gemma4_tpu.step.objective_kinds import every_measure
from gemma4_tpu.sweeping import state
from gemma4_tpu.sweeping.hydra_jobs import OpenSweep
from gemma4_tpu.sweeping.state import SweepJob
from gemma4_tpu.sweeping.table import outcome_value
from gemma4_tpu.tracking.metrics import HELDOUT
from gemma4_tpu.tracking.result import Result

log = logging.getLogger(__name__)

JOURNAL = "optuna.journal"
_OUTCOME = "outcome"
"""Attribute of a completed trial: its job's status. A trial without it was interrupted, and runs again."""
_ENDED = (state.FINISHED, state.PRUNED, state.FAILED, state.PREEMPTED, state.REFUSED, state.MISFIT)


class Search:
    """Runs trials until there are `n_trials`, in batches of `hydra.launcher.parallel`."""

    def __init__(self, opened: OpenSweep, launcher: Any, settings: Mapping[str, Any]):
        self._opened, self._launcher = opened, launcher
        self._settings = Optuna(**{key: _plain(value) for key, value in settings.items()})
        self._running: dict[frozenset[str], optuna.Trial] = {}

    def run(self, arguments: list[str]) -> None:
        """Runs the rest of the search.

        Raises:
          UserError: there is nothing to search, no run has the metric, or the space contradicts that of an earlier
            start.
        """
        self._check()
        fixed, space = self._space(arguments)
        study = self._study()
        _enqueue_cut_short(study)
        self._opened.monitor = self._monitor
        while (left := self._settings.n_trials - _ended(study)) > 0 and not self._opened.stop.count:
            trials = [study.ask(space) for _ in range(min(left, self._launcher.settings["parallel"]))]
            words = [[*fixed, *(f"{key}={_text(trial.params[key])}" for key in space)] for trial in trials]
            self._running = {frozenset(w): trial for w, trial in zip(words, trials, strict=True)}
            # Trials can draw the same values: they share one job, and each receives its outcome.
            self._launcher.launch([list(w) for w in dict.fromkeys(map(tuple, words))], 0)
            for trial, given in zip(trials, words, strict=True):
                self._tell(study, trial, self._job(given))
        told = {status: n for status in _ENDED if (n := _count(study, status))}
        log.info("search: %d trials (%s)", _ended(study), ", ".join(f"{n} {status}" for status, n in told.items()))

    def _check(self) -> None:
        settings, entry = self._settings, self._opened.sweep.entry
        if not hasattr(self._launcher, "sweep"):
            raise UserError("hydra/sweeper=optuna: works with hydra/launcher=processes")
        for key, choices in {
            "direction": (state.LOWER_IS_BETTER, state.HIGHER_IS_BETTER),
            "sampler": _SAMPLERS,
        }.items():
            value = getattr(settings, key)
            if value not in choices:
                raise UserError(f"hydra.sweeper.{key}={value}: not a choice (choices: {', '.join(choices)})")
        numbers = [f.name for f in dataclasses.fields(Result) if f.name not in ("status", "error", "measures")]
        numbers += [f"{of}{name}" for name in every_measure() for of in (HELDOUT, "")]
        if entry == "train" and settings.metric not in numbers:
            hint = did_you_mean(settings.metric, numbers)
            raise UserError(
                f"hydra.sweeper.metric={settings.metric}: not a key of result.json{hint} ({', '.join(numbers)})"
            )

    # ── the space ──────────────────────────────────────────────────────────────────────────────────────────────────
    def _space(self, arguments: list[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
        """(words that every trial shares, key → distribution)."""
        expressions = {**self._file(), **self._settings.params}
        given = OverridesParser.create().parse_overrides([f"{key}={text}" for key, text in expressions.items()])
        self._check_words([override.input_line or "" for override in given])
        overrides = {override.key_or_group: override for override in given}
        overrides |= {o.key_or_group: o for o in OverridesParser.create().parse_overrides(arguments)}
        fixed = [o.input_line or "" for o in overrides.values() if not o.is_sweep_override()]
        schema = self._opened.entry.schema
        space = {
            key: _distribution(o, _is_integer(schema, key)) for key, o in overrides.items() if o.is_sweep_override()
        }
        if not space:
            raise UserError(
                "hydra/sweeper=optuna: nothing to search; give a key several values, such as lora.rank=8,16,32 or"
                " 'optimizer.learning_rate=tag(log,interval(1e-5,1e-3))', or hydra.sweeper.space=<YAML file of such>"
            )
        return fixed, space

    def _file(self) -> dict[str, Any]:
        space = self._settings.space
        if space is None:
            return {}
        named = config_dir() / "space" / f"{space}.yaml"
        path = named if named.is_file() else Path(space).expanduser()
        if not path.is_file():
            there = sorted(place.stem for place in named.parent.glob("*.yaml"))
            hint = did_you_mean(space, there)
            raise UserError(f"hydra.sweeper.space={space}: no such file{hint} (conf/space has {', '.join(there)})")
        content = OmegaConf.load(path)
        if not isinstance(content, DictConfig):
            raise UserError(f"hydra.sweeper.space={space}: is a list; write one 'key: choice(…)' per line")
        return {str(key): value for key, value in content.items()}

    def _check_words(self, words: list[str]) -> None:
        entry = self._opened.entry
        _, problems = check_overrides(words, schema=entry.schema, groups=Groups(groups_of(entry)), multirun=True)
        if problems:
            raise refusal(problems)

    # ── the study ──────────────────────────────────────────────────────────────────────────────────────────────────
    def _study(self) -> optuna.Study:
        settings = self._settings
        backend = JournalFileBackend(str(self._opened.sweep.folder / JOURNAL))
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the sweep prints its own lines
        study = optuna.create_study(
            storage=JournalStorage(backend),
            study_name="sweep",
            direction=StudyDirection[settings.direction.upper()],
            load_if_exists=True,
        )
        # Another start of the search must not repeat the same draws.
        seed = None if settings.seed is None else settings.seed + len(study.trials)
        study.sampler = _SAMPLERS[settings.sampler](seed=seed)
        study.pruner = optuna.pruners.MedianPruner(
            n_startup_trials=settings.prune_after_trials, n_warmup_steps=settings.prune_after_updates
        )
        if study.direction.name.lower() != settings.direction:
            raise UserError(
                f"hydra.sweeper.direction={settings.direction}: the search in {self._opened.sweep.folder} has the other"
                " one; set another hydra.sweep.dir"
            )
        return study

    def _monitor(self, job: SweepJob, row: dict[str, Any]) -> str | None:
        """Reports held-out losses of a running trial, and decides whether to stop it."""
        loss, update = row.get("heldout_loss"), row["update"]
        trial = next((trial for words, trial in self._running.items() if words <= set(job.words)), None)
        if not self._settings.prune or trial is None or not isinstance(loss, float) or not math.isfinite(loss):
            return None
        lower = self._settings.direction == state.LOWER_IS_BETTER
        trial.report(loss if lower else -loss, update)  # a lower loss is better in either case
        if update == 0 or not trial.should_prune():
            return None
        return f"held-out loss {loss:.4f} at update {update}, worse than the median of earlier trials there"

    def _job(self, words: Sequence[str]) -> SweepJob:
        return next(job for job in self._opened.sweep.jobs.values() if set(words) <= set(job.words))

    def _tell(self, study: optuna.Study, trial: optuna.Trial, job: SweepJob) -> None:
        """Sets the trial's state from its job's."""
        value = outcome_value(self._opened.sweep, job, self._settings.metric)
        if job.status not in _ENDED:
            study.tell(trial, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
            return
        trial.set_user_attr(_OUTCOME, job.status)
        trial.set_user_attr("job", job.name)
        if job.status == state.FINISHED and math.isfinite(value):
            study.tell(trial, value)
        elif job.status == state.PRUNED:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, state=TrialState.FAIL)


_SAMPLERS: dict[str, Any] = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}


def _enqueue_cut_short(study: optuna.Study) -> None:
    """Enqueues trials that were running when the process was killed, in the same folders."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)


def _count(study: optuna.Study, status: str) -> int:
    return sum(trial.user_attrs.get(_OUTCOME) == status for trial in study.get_trials(deepcopy=False))


def _ended(study: optuna.Study) -> int:
    return sum(_OUTCOME in trial.user_attrs for trial in study.get_trials(deepcopy=False))


def _is_integer(schema: type, key: str) -> bool:
    """Whether a key holds an int (or null)."""
    kind: Any = schema
    for part in key.split("."):
        kind = field_types(kind)[part] if is_group(kind) and part in field_types(kind) else None
    return kind is not None and not is_group(kind) and type_name(kind) in ("int", "int or null")


def _distribution(override: Override, integer: bool) -> BaseDistribution:
    """The distribution of a key."""
    value, name = override.value(), override.key_or_group
    try:
        if isinstance(value, RangeSweep):
            bounds: list[Any] = [value.start, value.stop, value.step]  # a missing bound raises TypeError
            start, stop, step = bounds
            if integer:
                last = int(stop) - 1 - (int(stop) - 1 - int(start)) % int(step)  # `stop` itself is excluded
                return IntDistribution(int(start), last, step=int(step))
            return FloatDistribution(float(start), float(stop), step=float(step))
        if isinstance(value, IntervalSweep):
            logarithmic = "log" in value.tags
            ends: list[Any] = [value.start, value.end]
            low, high = ends
            if integer:
                return IntDistribution(math.ceil(low), math.floor(high), log=logarithmic)
            return FloatDistribution(float(low), float(high), log=logarithmic)
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from None


def _text(value: Any) -> str:
    """A value as a word; floats with the four digits that a folder's name has room for."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
