"""Hydra's own flags: `--cfg`, `--info`, `--hydra-help`, `--shell-completion`, and sweeps by `--multirun`."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

if TYPE_CHECKING:
    from gemma4_tpu.config.entries import EntryPoint


def serve(entry: EntryPoint, flags: list[str], overrides: list[str]) -> NoReturn:
    """Hands the command line to Hydra and ends the process. A sweep runs each job as a process of its own."""
    from gemma4_tpu.config.load import _VERSION_BASE, config_dir, register

    register(entry)

    @hydra.main(version_base=_VERSION_BASE, config_path=str(config_dir()), config_name=entry.name)
    def run_job(_: DictConfig) -> None:
        job = HydraConfig.get()
        command = [sys.executable, "-m", f"gemma4_tpu.{entry.name}", *job.overrides.task]
        if not any(word.startswith("run_dir=") for word in job.overrides.task):
            command.append(f"run_dir='{job.runtime.output_dir}'")
        subprocess.run(command, check=True)

    sys.argv = [sys.argv[0], *flags, "--", *overrides]
    run_job()
    raise SystemExit(0)
