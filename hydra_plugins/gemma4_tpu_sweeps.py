"""What `--multirun` is served by: Hydra finds its plugins in this namespace and accepts them from nowhere else.

The work is done in `gemma4_tpu/sweeping`, imported when a sweep starts, since every start of the program loads this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from gemma4_tpu.config import sweeps as settings

_STORE = ConfigStore.instance()
_STORE.store(group="hydra/launcher", name="processes", node=settings.Processes, provider="gemma4_tpu")
_STORE.store(group="hydra/launcher", name="slurm", node=settings.Slurm, provider="gemma4_tpu")
_STORE.store(group="hydra/sweeper", name="grid", node=settings.GridSweep, provider="gemma4_tpu")
_STORE.store(group="hydra/sweeper", name="optuna", node=settings.Optuna, provider="gemma4_tpu")


def _entry(config: DictConfig) -> Any:
    """The command whose jobs are swept."""
    from gemma4_tpu.commands import ENTRIES

    return ENTRIES[str(config.hydra.job.config_name)]


class ProcessesLauncher(Launcher):
    """Each job as a process of its own."""

    form: type = settings.Processes

    def __init__(self, **settings: Any):
        self.settings = settings
        self.sweep: Any = None
        """Set by the sweeper: the `gemma4_tpu.sweeping.hydra_jobs.OpenSweep` that the jobs belong to."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra asks for it."""
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs, each with its overrides."""
        from gemma4_tpu.sweeping.hydra_jobs import launch

        return launch(self.sweep, self.config, self.form(**self.settings), job_overrides)


class SlurmLauncher(ProcessesLauncher):
    """Each job as a batch job of SLURM."""

    form = settings.Slurm


class GridSweeper(BasicSweeper):
    """Every combination, then the sweep's report."""

    config: DictConfig
    launcher: Any

    def __init__(self, metric: str | None = None, **settings: Any):
        super().__init__(**settings)
        self.metric = metric

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the sweep of a command line."""
        from gemma4_tpu.reporting.sweep import show_sweep
        from gemma4_tpu.sweeping.hydra_jobs import sweeping

        with sweeping(_entry(self.config), self.config, show_sweep, self.metric) as self.launcher.sweep:
            return super().sweep(arguments)


class OptunaSweeper(Sweeper):
    """A search, then its report."""

    config: DictConfig
    launcher: Any

    def __init__(self, **settings: Any):
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra asks for it."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the sweep of a command line."""
        from gemma4_tpu.reporting.sweep import show_sweep
        from gemma4_tpu.sweeping.hydra_jobs import sweeping
        from gemma4_tpu.sweeping.optuna_search import Search

        settings, entry = self.settings, _entry(self.config)
        metric, direction = settings["metric"], settings["direction"]
        with sweeping(entry, self.config, show_sweep, metric, direction) as self.launcher.sweep:
            return Search(self.launcher.sweep, self.launcher, settings).run(arguments)
