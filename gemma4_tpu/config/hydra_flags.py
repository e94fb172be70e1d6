"""Hydra's own flags: `--cfg`, `--info`, `--hydra-help`, `--shell-completion`, and sweeps by `--multirun`.

A sweep is run by the plugins of `hydra_plugins/gemma4_tpu_sweeps.py`, unless the command line names others.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gemma4_tpu.config.problems import refusal
from gemma4_tpu.config.sweeps import complete, sweep_problems
from gemma4_tpu.errors import UserError

if TYPE_CHECKING:
    from gemma4_tpu.config.entries import EntryPoint


def serve(entry: EntryPoint, flags: list[str], overrides: list[str]) -> NoReturn:
    """Hands the command line to Hydra and ends the process. A sweep runs each job as a process of its own.

    Raises:
      UserError: something that can't be swept, or a launcher that is not installed.
    """
    from gemma4_tpu.config.load import _VERSION_BASE, config_dir, register

    if {"-m", "--multirun"} & set(flags):
        chosen = _chosen(entry, overrides)
        if problems := sweep_problems(overrides, chosen):
            raise refusal(problems)
        overrides = complete(overrides, chosen)
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


def _chosen(entry: EntryPoint, overrides: list[str]) -> dict[str, str]:
    """Hydra's own groups, such as `hydra/sweeper`, with the option that Hydra, an experiment or a word chose."""
    from gemma4_tpu.config.load import _VERSION_BASE, config_dir, register

    register(entry)
    parsed = OverridesParser.create().parse_overrides(overrides)
    words = {o.input_line or "": o.key_or_group for o in parsed if not o.is_sweep_override()}
    # Values beneath `hydra.` belong to options that are not chosen yet.
    single = [word for word, key in words.items() if not key.startswith("hydra.") or key == "hydra.searchpath"]
    with initialize_config_dir(str(config_dir()), version_base=_VERSION_BASE):
        try:
            return dict(compose(entry.name, overrides=single, return_hydra_config=True).hydra.runtime.choices)
        except MissingConfigException as error:
            if "submitit" in str(error):
                raise UserError("hydra/launcher=slurm needs submitit: pip install 'gemma4-tpu[slurm]'") from None
            raise UserError(" ".join(str(error).partition("Config search path")[0].split())) from None
        except (HydraException, OmegaConfBaseException) as error:  # what no word does alone
            raise UserError(" ".join(str(error).split())) from None
