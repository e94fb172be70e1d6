"""Hydra's own flags and words: `--cfg`, `--info`, `--hydra-help`, `--shell-completion`, sweeps by `--multirun`, and
the meaning of `--config-dir`, `hydra.run.dir` and `hydra.verbose` here.

The plugins of `hydra_plugins/gemma4_tpu_sweeps.py` run sweeps, unless the command line names others.
"""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gemma4_tpu.children import end_with_parent
from gemma4_tpu.config.conf import VERSION_BASE, composing, config_dir, register
from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.keys import unknown_key
from gemma4_tpu.config.lists import as_word
from gemma4_tpu.config.refusals import refusal
from gemma4_tpu.config.sweeps import complete, sweep_problems
from gemma4_tpu.errors import UserError, tell


def serve(entry: EntryPoint, flags: list[str], overrides: list[str]) -> NoReturn:
    """Hands the command line to Hydra and ends the process. A sweep runs each job in its own process. What the other
    flags print (`--cfg job`: the whole configuration) is printed without secrets.

    Raises:
      UserError: something can't be swept, or a launcher is not installed.
    """
    sweeps = {"-m", "--multirun"} & set(flags)
    if sweeps:
        chosen = _chosen(entry, overrides)
        if problems := sweep_problems(overrides, chosen):
            raise refusal(problems)
        overrides = complete(overrides, chosen)
    register(entry)

    @hydra.main(version_base=VERSION_BASE, config_path=str(config_dir()), config_name=entry.name)
    def run_job(_: DictConfig) -> None:
        """Runs one job of a third-party launcher, on the machine that it chose."""
        job = HydraConfig.get()
        command = [sys.executable, "-m", entry.module, *job.overrides.task]
        command.append(as_word("run_dir", str(job.runtime.output_dir)))
        subprocess.run(command, check=True, preexec_fn=end_with_parent)

    sys.argv = [sys.argv[0], *flags, "--", *overrides]
    if sweeps or "--shell-completion" in flags:
        run_job()
        raise SystemExit(0)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            run_job()
    finally:
        tell(printed.getvalue().removesuffix("\n"))
    raise SystemExit(0)


def with_config_dir(folder: str, words: list[str]) -> list[str]:
    """The words with Hydra's `--config-dir` as an entry of the search path, which is passed on to the jobs of a sweep.

    Raises:
      UserError: there is no such folder.
    """
    place = Path(folder).expanduser().absolute()
    if not folder or not place.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder; give one with groups, such as experiment/mine.yaml")
    places, others = [f"file://{place}"], []
    for word in words:
        given = _value(word) if word.lstrip("+").startswith("hydra.searchpath=") else None
        if isinstance(given, list):
            places += map(str, given)
        else:
            others.append(word)
    return [*others, as_word("hydra.searchpath", places)]


def search_path(words: list[str]) -> list[Path | None]:
    """The folders that the words add to Hydra's search path; None for one that can't be listed (`pkg://…`)."""
    found: list[Path | None] = []
    for word in words:
        key, _, _ = word.lstrip("+").partition("=")
        if key == "hydra.searchpath":
            places = _value(word)
            for place in places if isinstance(places, list) else [places]:
                folder = Path(str(place).removeprefix("file://"))
                found.append(folder if folder.is_absolute() and folder.is_dir() else None)
    return found


def of_one_run(words: list[str], schema: type) -> list[str]:
    """The words of a single run, with Hydra's translated: `hydra.run.dir` to `run_dir`; applies `hydra.verbose` at
    once.

    Raises:
      UserError: the run folder is given in both spellings.
    """
    ours = []
    for word in words:
        key, equals, value = word.lstrip("+").partition("=")
        if key == "hydra.run.dir" and equals and unknown_key(schema, "run_dir") is None:
            if twice := [other for other in words if other.lstrip("+").startswith("run_dir=")]:
                raise UserError(f"{word} and {twice[0]}: both set the run folder; give run_dir only")
            ours.append(f"run_dir={value}")
        elif key == "hydra.verbose" and equals:
            _be_verbose(word)
        else:
            ours.append(word)
    return ours


def _be_verbose(word: str) -> None:
    """Logs debug records: our own for `true`, else those of the named logger or list of loggers."""
    value = _value(word)
    names = {True: ["gemma4_tpu"], False: []}.get(value) if isinstance(value, bool) else value
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{word}: give true, false, the name of a logger or a list of names")
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)


def _value(word: str) -> Any:
    try:
        return OverridesParser.create().parse_override(word).value()
    except HydraException:
        return None


def _chosen(entry: EntryPoint, overrides: list[str]) -> dict[str, str]:
    """Hydra's own groups, such as `hydra/sweeper` → the option chosen by Hydra, an experiment or a word."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    words = {o.input_line or "": o.key_or_group for o in parsed if not o.is_sweep_override()}
    # Values below `hydra.` belong to options that are not chosen yet.
    single = [word for word, key in words.items() if not key.startswith("hydra.") or key == "hydra.searchpath"]
    with composing(entry) as compose:
        try:
            return dict(compose(entry.name, overrides=single, return_hydra_config=True).hydra.runtime.choices)
        except MissingConfigException as error:
            raise UserError(" ".join(str(error).partition("Config search path")[0].split())) from None
        except (HydraException, OmegaConfBaseException) as error:  # words that are only wrong together
            raise UserError(" ".join(str(error).split())) from None
