"""What a sweep's words mean before it starts: what is set about it, which keys are swept, how its folders are called.

The folder of a sweep follows from its command line, and the folder of a job from the job's values, so that the same
command finds again what it has done.
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
"""Group → (what Hydra chooses by itself, what takes its place)."""
_OF_NO_ACCOUNT = ("hydra.launcher.", "hydra/launcher", "hydra/hydra_logging", "hydra.verbose", "hydra.sweeper.n_trials")
"""Words that change how a sweep is run, not what it is."""
_LONGEST_NAME = 120


# ── `hydra.launcher.…` and `hydra.sweeper.…`, with the values that hold unless they are given ─────────────────────────


@dataclass
class Processes:
    """`hydra/launcher=processes`: each job as a process of its own."""

    parallel: int = 1
    """Jobs at a time; on GPUs each gets its share, a TPU takes one."""
    max_restarts: int = 3
    """Further starts of a job that was preempted (exit code 42)."""
    plan: str = "auto"
    """Whether jobs that can't fit are left out: `auto` compiles for TPU slices where libtpu is installed, `true`
    insists on it, `false` doesn't."""
    _target_: str = f"{PLUGINS}.ProcessesLauncher"


@dataclass
class Slurm:
    """`hydra/launcher=slurm`: each job as a batch job of SLURM, named after its overrides."""

    partition: str | None = None
    """Partition; null: the cluster's default."""
    nodes: int = 1
    """Nodes of each job, with one process on each; they find each other by `distributed.coordinator_address=auto`."""
    timeout_min: int = 1440
    """Minutes that a start may take; a run that needs more is requeued."""
    save_seconds: int = 120
    """Seconds before the end of that time at which a run is told to save (SIGUSR2)."""
    max_restarts: int = 100
    """Times that a job is requeued after it was preempted or out of time (exit code 42)."""
    parallel: int = 1000
    """Jobs that are in SLURM's queue at a time."""
    sbatch: list[str] = field(default_factory=list)
    """Further flags of sbatch, such as [--account=me,--gres=gpu:1]."""
    plan: str = "auto"
    """As of `processes`."""
    _target_: str = f"{PLUGINS}.SlurmLauncher"


@dataclass
class GridSweep:
    """`hydra/sweeper=grid`: every combination."""

    params: dict[str, Any] = field(default_factory=dict)
    """Key → values such as `16,32,64`, in an experiment; the command line adds to them and wins."""
    metric: str | None = None
    """Key of `result.json` that decides which run is best; null: `heldout_loss_last`."""
    max_batch_size: int | None = None
    """Jobs that are checked, and then run, at a time; null: all of them."""
    _target_: str = f"{PLUGINS}.GridSweeper"


@dataclass
class Optuna:
    """`hydra/sweeper=optuna`: a search, kept in `optuna.journal` in the sweep folder."""

    space: str | None = None
    """YAML file of `key: choice(…)`, `range(…)`, `interval(…)` or `tag(log, interval(…))`, or the name of one in
    `conf/space`. Keys that hold integers are drawn as such."""
    params: dict[str, Any] = field(default_factory=dict)
    """The same, in an experiment; the command line adds to both and wins."""
    n_trials: int = 20
    """Trials in all, those of earlier starts included."""
    metric: str = "heldout_loss_best"
    """Key of `result.json` to be optimised."""
    direction: str = "minimize"
    """`minimize` or `maximize`."""
    sampler: str = "tpe"
    """`tpe` or `random`."""
    seed: int | None = 0
    """Of the sampler; null: another one each time."""
    prune: bool = True
    """Stop a trial whose held-out loss is above the median of the earlier trials at the same update."""
    prune_after_trials: int = 4
    """Trials to see through before any is stopped."""
    prune_after_updates: int = 1
    """Updates of each trial during which it is not stopped."""
    _target_: str = f"{PLUGINS}.OptunaSweeper"


# ── the command line ───────────────────────────────────────────────────────────────────────────────────────────────


def complete(words: Sequence[str], chosen: Mapping[str, str]) -> list[str]:
    """The words of a sweep with what they leave open: our sweeper and launcher, and a folder that follows from them.

    Args:
      words: the command line.
      chosen: group → option, as composed from the words; an experiment may have chosen, too.
    """
    given = {override.key_or_group for override in _parse(words)}
    added = [
        f"{group}={ours}" for group, (hydras, ours) in _OURS.items() if group not in given and chosen[group] == hydras
    ]
    if "hydra.sweep.dir" not in given:
        added.append(f"hydra.sweep.dir='{MULTIRUN}/${{name}}/{sweep_name(words)}'")
    return [*added, *words]


def sweep_problems(words: Sequence[str], chosen: Mapping[str, str]) -> list[Refusal]:
    """What can't be swept; `chosen` as for `complete`."""
    problems = []
    for override in _parse(words):
        name, word = override.key_or_group, override.input_line
        if name == "run_dir":
            problems.append(Refusal(f"{word}: each job of a sweep has its own folder; give hydra.sweep.dir=<folder>"))
        elif override.is_interval_sweep() and chosen[SWEEPER] in _OURS[SWEEPER]:
            problems.append(Refusal(f"{word}: an interval is searched, not enumerated; add {SWEEPER}=optuna", (name,)))
    return problems


def sweep_name(words: Sequence[str]) -> str:
    """`<swept keys>_<hash>`: the hash is of the words that all jobs share and of the swept keys, not of their values.

    So the same command with more values goes on in the same folder.
    """
    overrides = [o for o in _parse(words) if not (o.input_line or "").startswith(_OF_NO_ACCOUNT)]
    keys = [o.key_or_group for o in overrides if o.is_sweep_override()]
    shared = [o.input_line or "" for o in overrides if not o.is_sweep_override()]
    shared = [word for word in shared if not word.startswith("hydra.sweep.dir=")]
    readable = "+".join(keys)[:_LONGEST_NAME].replace("/", ".").rstrip("+.") or "jobs"
    return f"{readable}_{_digest([*sorted(keys), '', *sorted(shared)])}"


def fixed_keys(words: Sequence[str]) -> set[str]:
    """The keys and groups that are given one value for all jobs."""
    return {o.key_or_group for o in _parse(words) if not o.is_sweep_override()}


def swept(job: Sequence[str], fixed: set[str]) -> dict[str, str]:
    """Key → value, as written, of a job's words whose keys are not `fixed`."""
    return {o.key_or_group: _plain(o.get_value_string()) for o in _parse(job) if o.key_or_group not in fixed}


def job_name(values: dict[str, str]) -> str:
    """`lora.rank-16+mesh-tp`: a folder's name that can be typed unquoted after `run=`, the same for the same values.

    What such a name can't hold becomes `_`, and a hash of the whole is added.
    """
    raw = redact("+".join(f"{key}-{value}" for key, value in values.items()))
    safe = re.sub(r"[^\w.+-]", "_", raw)
    if safe == raw and 0 < len(raw) <= _LONGEST_NAME:
        return raw
    return f"{safe[:_LONGEST_NAME] or 'job'}_{_digest([raw])}"


def _parse(words: Iterable[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(words))


def _plain(value: str) -> str:
    """Without the quotes around a whole string."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:6]
