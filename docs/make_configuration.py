"""Writes `docs/configuration.md` from the schema, the limits and `conf/`: `python docs/make_configuration.py`.

A test compares the committed page with what this makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from gemma4_tpu.commands import ENTRIES
from gemma4_tpu.config.conf import WITHOUT_FILES, config_dir, defaults, groups_of
from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.help import shown
from gemma4_tpu.config.keys import element_type, field_docs, field_types, is_group, is_mapping, type_name
from gemma4_tpu.config.limits import CHOICES, RANGES
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.config.sweeps import GridSweep, Optuna, Processes
from gemma4_tpu.data import checks as data_checks
from gemma4_tpu.evals import checks as evals_checks
from gemma4_tpu.launch.gke import GKE
from gemma4_tpu.launch.tpu_vm import TPU_VM
from gemma4_tpu.markdown import table

PAGE = Path(__file__).with_name("configuration.md")
COMMANDS: dict[str, EntryPoint] = {**ENTRIES, TPU_VM.name: TPU_VM, GKE.name: GKE}
INTRODUCTION = """\
# Configuration

*Made by `python docs/make_configuration.py` from `gemma4_tpu/config/schema.py`, `tasks.py` and `serving.py` (types,
meanings), `limits.py` (limits) and `conf/` (values); a test holds it to them.*

Every command takes words: `group=option` chooses a file of `conf/<group>/` (of `hardware` a slice of
`gemma4_tpu/hardware.py`, of `model` also any size of `architectures.py`), `key=value` sets one value, whatever the
order. Lists are written `'key=[a,b]'`, mappings `'key={a: 1}'`, no value is `null`. All words are checked together,
before anything starts; `--help` shows the same as this page for one command, `--cfg job` the composed configuration.
What is always wanted on one machine goes into `conf/local/default.yaml` (first line `# @package _global_`), which git
ignores and every command that takes `local` reads last; files elsewhere are found by `hydra.searchpath=[file://<folder>]`.

`gemma4-tpu train …` is `python -m gemma4_tpu.train …`, and so on. Bash completes its commands, groups, options and keys
after

```bash
eval "$(gemma4-tpu --shell-completion install=bash)"
```

(the same in zsh, after `autoload -U bashcompinit; bashcompinit`; in fish `gemma4-tpu --shell-completion install=fish |
source`).
"""


def page() -> str:
    """The whole page."""
    lines, rows = [INTRODUCTION, "## Commands", ""], []
    for entry in COMMANDS.values():
        groups = ", ".join(f"[`{name}`](#{name})" for name in groups_of(entry))
        rows.append([f"[`{entry.command}`](#{entry.name}-keys)", groups or "none"])
    lines += [*table(["command", "takes the groups"], rows), "## Groups"]
    for name in dict.fromkeys(group for entry in COMMANDS.values() for group in groups_of(entry)):
        lines += _group(name)
    lines += ["", "## Keys of single commands", ""]
    for entry in COMMANDS.values():
        lines += _own_keys(entry)
    lines += ["", "## Sweeps", "", "With `-m` (`--multirun`), for `train`; see [sweeps](sweeps.md).", ""]
    for prefix, schema in (("launcher", Processes), ("sweeper", GridSweep), ("sweeper", Optuna)):
        lines += [f"**{_cell((schema.__doc__ or '').strip().rstrip('.'))}**", ""]
        kept = {name: value for name, value in asdict(schema()).items() if not name.startswith("_")}
        rows = [_row(schema, name, f"hydra.{prefix}.{name}", shown(value)) for name, value in kept.items()]
        lines += table(_HEADS, rows)
    return "\n".join(lines).rstrip() + "\n"


_WITHOUT_SCHEMA = {
    "experiment": "Recipes: values of any keys over those of the groups; `key=value` words win over them. What came of"
    " them lies in [`experiments/`](../experiments).",
    "local": "`conf/local/default.yaml` of this machine, where there is one; over everything but the command line.",
}
_HEADS = ("key", "type", "default", "meaning")


def _group(name: str) -> list[str]:
    """One config group: who takes it, its options, its keys."""
    takers = [entry for entry in COMMANDS.values() if name in groups_of(entry)]
    takes: type = takers[0].schema
    schema = field_types(takes).get(name)
    lines = ["", f"### {name}", ""]
    about = (schema.__doc__ or "") if schema is not None else _WITHOUT_SCHEMA[name]
    lines += [_cell(" ".join(about.split())), ""]
    lines += ["Taken by " + ", ".join(f"`{entry.name}`" for entry in takers) + "."]
    options = groups_of(takers[0])[name] if name != "local" else []  # which is each machine's own
    if options:
        lines += ["", *table(["option", "is", "sets"], [_option(name, option) for option in options])][:-1]
    if schema is not None:
        lines += ["", *table(_HEADS, list(_keys(schema, name, takers)))][:-1]
    return lines


def _option(group: str, option: str) -> list[str]:
    path = config_dir() / group / f"{option}.yaml"
    if not path.is_file():
        return [f"`{group}={option}`", "", ", ".join(f"`{k}={v}`" for k, v in WITHOUT_FILES[group][option].items())]
    comments = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    told = " ".join(
        f"`{line.strip()}`" if line.startswith("  ") else line for line in comments if not line.startswith("@package")
    )
    content = OmegaConf.load(path)
    assert isinstance(content, DictConfig)
    bases = [_base(item) for item in content.get("defaults", ())]
    values = [f"`{key}={value}`" for key, value in _flat(content) if not key.startswith("defaults")]
    return [f"`{group}={option}`", _cell(told), _cell(", ".join([*bases, *values]))]


def _base(item: Any) -> str:
    """An entry of a file's defaults list in words: another option of its group, or of another group."""
    if isinstance(item, DictConfig):
        ((group, option),) = item.items()
        return f"`{str(group).removeprefix('override ').lstrip('/')}={option}`"
    return f"all of `{item}`"


def _flat(content: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as on a command line) of a YAML file, `${…}` as it stands there."""
    for key in content:
        name = f"{prefix}{key!s}"
        value: Any = content._get_node(key)
        if isinstance(value, DictConfig) and not value._is_interpolation() and len(value) and prefix.count(".") < 2:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, DictConfig | ListConfig):
            yield name, shown(OmegaConf.to_container(value))
        else:
            yield name, shown(value._value())


def _own_keys(entry: EntryPoint) -> list[str]:
    """The keys of one command that belong to no group, and its short names."""
    schema: type = entry.schema
    lines = [f"### {entry.name} keys", "", f"`{entry.command}`: {_cell(entry.summary)}", ""]
    inherited = schema is not TrainRoot and issubclass(schema, TrainRoot)
    known = field_docs(TrainRoot) if inherited else {}
    if inherited:
        lines += ["Besides the [keys of `train`](#train-keys):", ""]
    rows = []
    for name, annotation in field_types(schema).items():
        if not is_group(annotation):
            if field_docs(schema)[name] != known.get(name):
                rows.append(_row(schema, name, name, _default(entry.name, name)))
        elif name not in groups_of(entry):
            rows += _keys(annotation, name, [entry])
    lines += list(table(_HEADS, rows))[:-1] if rows else ["It takes no keys but those of its groups."]
    if entry.shorthands:
        short = ", ".join(f"`{name}` for `{key}`" for name, key in entry.shorthands.items())
        lines += ["", f"For short: {short}."]
    return [*lines, ""]


def _keys(schema: type, prefix: str, takers: list[EntryPoint]) -> Iterator[list[str]]:
    """A row for each key beneath `prefix`."""
    for name, annotation in field_types(schema).items():
        key = f"{prefix}.{name}"
        if is_group(annotation):
            yield from _keys(annotation, key, takers)
            continue
        by_default: dict[str, list[str]] = {}
        for entry in takers:
            by_default.setdefault(_default(entry.name, key), []).append(entry.name)
        (first, _), *others = by_default.items()
        differing = "; ".join(f"{', '.join(names)}: `{value}`" for value, names in others)
        yield _row(schema, name, key, first, f" ({differing})" if differing else "")
        element: Any = element_type(annotation)
        if is_group(element):
            values = asdict(element())
            for inner in field_types(element):
                yield _row(element, inner, f"{key}.<number>.{inner}", shown(values[inner]))


def _row(schema: type, name: str, key: str, default: str, others: str = "") -> list[str]:
    annotation = field_types(schema)[name]
    if is_group(element_type(annotation)):
        kind = "list of the following"
    else:
        kind = "mapping" if is_mapping(annotation) else type_name(annotation)
    if choices := (CHOICES | data_checks.CHOICES | evals_checks.CHOICES).get(key):
        kind += ": " + ", ".join(f"`{choice}`" for choice in choices)
    elif key in RANGES:
        kind += f", {RANGES[key][1].removeprefix('a number of ').removeprefix('a number ')}"
    shown_default = f"`{default}`" if default else "empty"
    return [f"`{key}`", kind, _cell(shown_default) + _cell(others), _cell(field_docs(schema)[name])]


def _default(command: str, key: str) -> str:
    value = OmegaConf.select(_defaults(command), key)
    return shown(OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value)


@cache
def _defaults(command: str) -> DictConfig:
    return defaults(COMMANDS[command], ["~local"] if "local" in groups_of(COMMANDS[command]) else [])


def _cell(text: str) -> str:
    """Text on the page: `<name>` outside of code would be a tag."""
    parts = text.split("`")
    return "`".join(part if place % 2 else part.replace("<", "\\<") for place, part in enumerate(parts))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
