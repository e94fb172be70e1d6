"""Interprets a sweep's words before it starts: its settings, its swept keys, the names of its folders.

A sweep's folder follows from its command line, and a job's folder from the job's values, so the same command finds its
earlier results.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.redact import redact

PLUGINS = "hydra_plugins.gemma4_tpu_sweeps"
MULTIRUN = "multirun"
SWEEPER, LAUNCHER = "hydra/sweeper", "hydra/launcher"
_OURS = {SWEEPER: ("basic", "grid"), LAUNCHER: ("basic", "processes"), "hydra/hydra_logging": ("default", "none")}
"""Group → (Hydra's default, its replacement)."""
_OF_NO_ACCOUNT = ("hydra.launcher.", "hydra/launcher", "hydra/hydra_logging", "hydra.verbose", "hydra.sweeper.n_trials")
"""Words that change how a sweep runs, not what it is."""
_LONGEST_NAME = 120


# ── `hydra.launcher.…` and `hydra.sweeper.…`, with their defaults ─────────────────────────────────────────────────────


@dataclass
class Processes:
    """`hydra/launcher=processes`: each job in its own process."""

    parallel: int = 1
    """Concurrent jobs; on GPUs each gets its share, a TPU runs one."""
    max_restarts: int = 3
    """Restarts of a preempted job (exit code 42)."""
    plan: str = "auto"
    """Whether to skip jobs that can't fit: `auto` compiles for TPU slices if libtpu is installed, `true` requires that,
    `false` skips no jobs."""
    _target_: str = f"{PLUGINS}.ProcessesLauncher"


@dataclass
class Slurm:
    """`hydra/launcher=slurm`: each job as a SLURM batch job, named after its overrides."""

    partition: str | None = None
    """Partition; null: the cluster's default."""
    nodes: int = 1
    """Nodes of each job, with one process on each; they find each other by `distributed.coordinator_address=auto`."""
    timeout_min: int = 1440
    """Time limit of a start, in minutes; a run that needs more is requeued."""
    save_seconds: int = 120
    """Seconds before the end of that time at which a run is signalled to save (SIGUSR2)."""
    max_restarts: int = 100
    """How often a job is requeued after a preemption or the end of its time (exit code 42)."""
    parallel: int = 1000
    """Most jobs in SLURM's queue at a time."""
    sbatch: list[str] = field(default_factory=list)
    """Further flags of sbatch, such as [--account=me,--gres=gpu:1]."""
    plan: str = "auto"
    """As for `processes`."""
    _target_: str = f"{PLUGINS}.SlurmLauncher"


@dataclass
class GridSweep:
    """`hydra/sweeper=grid`: every combination."""

    params: dict[str, Any] = field(default_factory=dict)
    """Key → values such as `16,32,64`, in an experiment; the command line adds to them and takes precedence."""
    metric: str | None = None
    """Key of `result.json` that decides which run is best; null: `heldout_loss_last`."""
    max_batch_size: int | None = None
    """Number of jobs that are checked and then run at a time; null: all."""
    _target_: str = f"{PLUGINS}.GridSweeper"


@dataclass
class Optuna:
    """`hydra/sweeper=optuna`: a search, kept in `optuna.journal` in the sweep folder."""

    space: str | None = None
    """YAML file of `key: choice(…)`, `range(…)`, `interval(…)` or `tag(log, interval(…))`, or the name of one in
    `conf/space`. Integer keys are drawn as integers."""
    params: dict[str, Any] = field(default_factory=dict)
    """The same, in an experiment; the command line adds to both and takes precedence."""
    n_trials: int = 20
    """Total number of trials, including those of earlier starts."""
    metric: str = "heldout_loss_best"
    """Key of `result.json` to optimise."""
    direction: str = "minimize"
    """`minimize` or `maximize`."""
    sampler: str = "tpe"
    """`tpe` or `random`."""
    seed: int | None = 0
    """Seed of the sampler; null: a new one each time."""
    prune: bool = True
    """Stop a trial whose held-out loss is above the median of the earlier trials at the same update."""
    prune_after_trials: int = 4
    """Trials to complete before any is stopped."""
    prune_after_updates: int = 1
    """Updates of each trial before it can be stopped."""
    _target_: str = f"{PLUGINS}.OptunaSweeper"


# ── the command line ───────────────────────────────────────────────────────────────────────────────────────────────


def complete(words: Sequence[str], chosen: Mapping[str, str]) -> list[str]:
    """The words of a sweep, completed with our sweeper and launcher, and with the folder that follows from them.

    Args:
      words: the command line.
      chosen: group → option, as composed from the words and experiments.
    """
    given = {override.key_or_group for override in _parse(words)}
    added = [
        f"{group}={ours}" for group, (hydras, ours) in _OURS.items() if group not in given and chosen[group] == hydras
    ]
    if "hydra.sweep.dir" not in given:
        added.append(f"hydra.sweep.dir='{MULTIRUN}/${{name}}/{sweep_name(words)}'")
    return [*added, *words]


def sweep_problems(words: Sequence[str], chosen: Mapping[str, str]) -> list[Refusal]:
    """Problems with what is swept; `chosen` as for `complete`."""
    problems = []
    for override in _parse(words):
        name, word = override.key_or_group, override.input_line
        if name == "run_dir":
            problems.append(Refusal(f"{word}: each job of a sweep has its own folder; give hydra.sweep.dir=<folder>"))
        elif override.is_interval_sweep() and chosen[SWEEPER] in _OURS[SWEEPER]:
            problems.append(Refusal(f"{word}: an interval is searched, not enumerated; add {SWEEPER}=optuna", (name,)))
    return problems + _given_twice(words)


def _given_twice(words: Sequence[str]) -> list[Refusal]:
    """Swept keys that another word sets, too: the last one counts, so jobs could share a folder."""
    given: dict[str, list[Override]] = {}
    for override in _parse(words):
        given.setdefault(override.key_or_group, []).append(override)
    return [
        Refusal(
            f"{', '.join(o.input_line or '' for o in same)}: {name} is swept and given twice; give it once", (name,)
        )
        for name, same in given.items()
        if len(same) > 1 and any(override.is_sweep_override() for override in same)
    ]


def sweep_name(words: Sequence[str]) -> str:
    """`<swept keys>_<hash>`, with a hash of the words that all jobs share and of the swept keys, but not their values.

    So the same command with more values continues in the same folder.
    """
    overrides = [o for o in _parse(words) if not (o.input_line or "").startswith(_OF_NO_ACCOUNT)]
    keys = [o.key_or_group for o in overrides if o.is_sweep_override()]
    shared = [o.input_line or "" for o in overrides if not o.is_sweep_override()]
    shared = [word for word in shared if not word.startswith("hydra.sweep.dir=")]
    readable = "+".join(keys)[:_LONGEST_NAME].replace("/", ".").rstrip("+.") or "jobs"
    return f"{readable}_{_digest([*sorted(keys), '', *sorted(shared)])}"


def fixed_keys(words: Sequence[str]) -> set[str]:
    """The keys and groups with one value for all jobs."""
    return {o.key_or_group for o in _parse(words) if not o.is_sweep_override()}


def swept(job: Sequence[str], fixed: set[str]) -> dict[str, str]:
    """Key → value as written, for a job's words whose keys are not `fixed`."""
    return {o.key_or_group: _plain(o.get_value_string()) for o in _parse(job) if o.key_or_group not in fixed}


def job_name(values: dict[str, str]) -> str:
    """`lora.rank-16+mesh-tp`: a folder name that needs no quotes after `run=`, determined by the values.

    Characters that such a name can't contain become `_`, and a hash of the whole is added.
    """
    raw = redact("+".join(f"{key}-{value}" for key, value in values.items()))
    safe = re.sub(r"[^\w.+-]", "_", raw)
    if safe == raw and 0 < len(raw) <= _LONGEST_NAME:
        return raw
    return f"{safe[:_LONGEST_NAME] or 'job'}_{_digest([raw])}"


def _parse(words: Iterable[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(words))


def _plain(value: str) -> str:
    """A value without the quotes around a whole string."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:6]
