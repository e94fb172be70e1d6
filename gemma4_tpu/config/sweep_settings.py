"""What `hydra.launcher.…` and `hydra.sweeper.…` take, with the values that hold unless they are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PLUGINS = "hydra_plugins.gemma4_tpu_sweeps"


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
