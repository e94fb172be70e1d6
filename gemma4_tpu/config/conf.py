"""`conf/`, composed by Hydra: its location, its groups, and the default configuration of a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers.oc import env

import gemma4_tpu
from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.overrides import groups_in, naturally
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, SLICES, option_name
from gemma4_tpu.redact import is_secret_name, redact

VERSION_BASE = "1.3"
WITHOUT_FILES = {
    "hardware": {option_name(name): {"name": name} for name in (LOCAL, *SLICES)},
    "model": {name: {"name": name} for name in ARCHITECTURES},
}
"""Group → options from a table: every slice, every size. A file of the same name in `conf/` takes precedence."""


def config_dir() -> Path:
    """The folder `conf`: next to the modules in an installed wheel, else at the root of the checkout."""
    package = Path(gemma4_tpu.__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder.resolve()
    raise FileNotFoundError(f"no conf/train.yaml next to or in {package}: the installation is damaged; reinstall")


def groups_of(entry: EntryPoint) -> dict[str, list[str]]:
    """Config group → options, for the groups that `conf/<name>.yaml` composes."""
    chosen = OmegaConf.load(config_dir() / f"{entry.name}.yaml").defaults
    names = {str(group).split()[-1] for item in chosen if isinstance(item, DictConfig) for group in item}
    files = groups_in(config_dir())
    options = {group: {*files.get(group, ()), *WITHOUT_FILES.get(group, ())} for group in {*files, *WITHOUT_FILES}}
    return {group: sorted(options[group], key=naturally) for group in sorted(options) if group in names}


def register(entry: EntryPoint) -> None:
    """Registers with Hydra the root schema, under the name that `conf/<name>.yaml` starts from, and the options without
    files; with OmegaConf the resolver `${unless:…}` of conf/, and an `${oc.env:…}` that returns no secrets.
    """
    OmegaConf.register_new_resolver("oc.env", _environment_variable, replace=True)
    OmegaConf.register_new_resolver("unless", lambda given, value: value if given is None else None, replace=True)
    store = ConfigStore.instance()
    store.store(name=f"{entry.name}_schema", node=entry.schema)
    for group, options in WITHOUT_FILES.items():
        for option, values in options.items():
            if not (config_dir() / group / f"{option}.yaml").is_file():  # Hydra would take ours for its schema
                store.store(group=group, name=option, node=values)


def _environment_variable(name: str, *default: str | None) -> str | None:
    """OmegaConf's `oc.env`, except for secrets: configurations are written to run folders and shown by trackers."""
    value = env(name, *default)
    if is_secret_name(name) or (value is not None and redact(value) != value):
        raise UserError(
            f"${{oc.env:{name}}} would put a secret into the configuration, which run folder and trackers show; leave"
            " it in the environment, from which the libraries that need it (HF_TOKEN, WANDB_API_KEY, …) read it"
        )
    return value


@contextmanager
def composing(entry: EntryPoint) -> Iterator[Callable[..., DictConfig]]:
    """Provides Hydra's `compose`, set up with `conf/` and the command's schema."""
    register(entry)
    with initialize_config_dir(str(config_dir()), version_base=VERSION_BASE):
        yield compose


def defaults(entry: EntryPoint, words: list[str] | None = None) -> DictConfig:
    """The composed configuration of a command line without arguments, or with valid `words`."""
    with composing(entry) as compose:
        return compose(entry.name, overrides=words)
