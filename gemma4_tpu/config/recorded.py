"""`replay=<run folder>`: the command line changes a recorded configuration instead of conf/'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gemma4_tpu.config.keys import field_types
from gemma4_tpu.config.overrides import Groups, check_file
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.storage import join, open_bytes

KEY = "replay"
_OF_THE_FIRST_START = ("run_dir", KEY, "replay_allow", "preview")


def replayed(words: list[str], schema: type) -> str | None:
    """The run folder that these (valid) words ask to repeat; None if they don't."""
    run = None
    if KEY in field_types(schema):
        for word in words:
            override = OverridesParser.create().parse_override(word)
            if override.key_or_group == KEY and not override.is_sweep_override():
                value = override.value()
                run = None if value is None else str(value)
    return run


def start_from(
    run: str, name: str, schema: type, defaults: Callable[[], DictConfig]
) -> tuple[str | None, list[Refusal]]:
    """Registers the configuration recorded in `run` with Hydra; returns its name there, or the problems.

    Args:
      run: a run folder, local or gs://.
      name: the entry point's; entry points other than `train` keep their own `name`.
      schema: that of its root.
      defaults: composes its configuration without arguments, for keys that the recorded version lacks.
    """
    try:
        file = open_bytes(join(run, "config.yaml"))
        content = OmegaConf.create(bytes(file.read(0, file.size_bytes)).decode())
    except (OSError, ValueError) as error:  # including UserError, from the storage
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "no config.yaml" if missing else str(error).splitlines()[0]
        return None, [Refusal(f"{KEY}={run}: not a run folder ({reason})")]
    except (OmegaConfBaseException, YAMLError) as error:
        return None, [Refusal(f"{KEY}={run}: config.yaml can't be read ({' '.join(str(error).split())})")]
    if not isinstance(content, DictConfig) or "trainer" not in content:
        return None, [Refusal(f"{KEY}={run}: not the folder of a training run (its config.yaml has no trainer)")]
    if problems := check_file(content, label=join(run, "config.yaml"), prefix="", schema=schema):
        return None, problems
    dropped = (*_OF_THE_FIRST_START, *(() if name == "train" else ("name",)))
    recorded = {key: value for key, value in content.items() if key not in dropped}
    values: Any = OmegaConf.to_container(OmegaConf.merge(defaults(), recorded))
    stored = f"{name}_{KEY}"
    ConfigStore.instance().store(name=stored, node={"defaults": [f"{name}_schema", "_self_"], **values})
    return stored, []


def over_recorded(words: list[str], groups: Groups) -> tuple[list[str], list[Refusal]]:
    """The words as Hydra needs them on a recorded configuration, which has no chosen options of groups."""
    taken, problems = [], []
    for word in words:
        key = OverridesParser.create().parse_override(word).key_or_group
        if key == "experiment":
            problems.append(Refusal(f"{word}: {KEY} already has a whole recipe; give single keys or groups"))
        taken.append(f"+{word}" if key in groups.options else word)
    return taken, problems
