"""Hydra's own flags: `--cfg`, `--info`, `--hydra-help`, `--shell-completion`, and sweeps by `--multirun`.

A sweep is run by the plugins of `hydra_plugins/gemma4_tpu_sweeps.py`, unless the command line names others.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gemma4_tpu.config.problems import refusal
from gemma4_tpu.config.sweeps import complete, sweep_problems

if TYPE_CHECKING:
    from gemma4_tpu.config.entries import EntryPoint


def serve(entry: EntryPoint, flags: list[str], overrides: list[str]) -> NoReturn:
    """Hands the command line to Hydra and ends the process. A sweep runs each job as a process of its own.

    Raises:
      UserError: something that can't be swept.
    """
    from gemma4_tpu.config.load import _VERSION_BASE, config_dir, register

    if {"-m", "--multirun"} & set(flags):
        if problems := sweep_problems(overrides):
            raise refusal(problems)
        overrides = complete(overrides)
    register(entry)

    @hydra.main(version_base=_VERSION_BASE, config_path=str(config_dir()), config_name=entry.name)
    def run_job(_: DictConfig) -> None:
        """One job of a launcher from elsewhere, on the machine that it found."""
        job = HydraConfig.get()
        command = [sys.executable, "-m", f"gemma4_tpu.{entry.name}", *job.overrides.task]
        command.append(f"run_dir='{job.runtime.output_dir}'")
        subprocess.run(command, check=True)

    sys.argv = [sys.argv[0], *flags, "--", *overrides]
    run_job()
    raise SystemExit(0)
