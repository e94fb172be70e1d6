"""`figures.yaml`: figures that were not made here (or not with this project), each with its source.

```yaml
label: quoted                     # or given, measured, estimated
source: whose figures these are
setups:                           # referred to by `setup:` below
  TPU v6e-8: {slice: v6e-8, model: gemma4_31b, kv_dtype: fp8}
trainings:
  - {name: TPU, slice: v5p-8, hours: 3.34, real_tokens_per_second: 763, rate_over_hours: true}
points:
  - {name: TPU short, setup: TPU v6e-8, input_tokens: 512, output_tokens_per_second: 1403}
benchmarks:                       # folders of JSON files by `vllm bench serve`, next to this file
  - {folder: results, setup: TPU v6e-8}
evaluations:
  - {name: TPU, slice: v6e-8, seconds: 600, samples: 780, passing: 500}
printed:                          # numbers that the source calculates itself; each is compared
  - {where: table 9, what: training, printed: "56.11", of: training/TPU/usd}
remarks: [what a reader of the throughputs should know]
cost_remarks: [what a reader of the costs should know]
```

`rate_over_hours: true` says that a training run's rate is the mean over its `hours`, so `real_tokens` is their product.
A rate that excludes compilation and evaluations does not apply to the paid hours, and is not multiplied by them. A
setup's model is a size (`gemma4_31b`), or a number of parameters if no more is known. Keys are the fields of
`figures.py` and `ceiling.Serving`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.costing.ceiling import ModelDemand, Serving
from gemma4_tpu.costing.figures import LABELS, Evaluation, Figures, Point, Printed, Training
from gemma4_tpu.costing.load_tests import read_points
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, SLICES
from gemma4_tpu.models.kv_cache import DTYPE_BYTES

NAME = "figures.yaml"
_LISTS = ("trainings", "points", "benchmarks", "evaluations", "printed", "remarks", "cost_remarks")
Kind = TypeVar("Kind")


def read_figures(path: Path) -> Figures:
    """Reads a `figures.yaml`.

    Raises:
      UserError: the file is not YAML, or an entry is wrong; names file, entry and key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    top = _mapping(content, f"{path}")
    _known(top, ("label", "source", "setups", *_LISTS), f"{path}")
    label, source = top.get("label"), top.get("source")
    if label not in LABELS or not isinstance(source, str):
        raise UserError(
            f"{path}: label={label!r} source={source!r}: give label as one of {', '.join(LABELS)}, source as text"
        )
    own = {"label": label, "source": source}
    setups = {
        name: _setup(_mapping(given, f"{path}: setups.{name}"), f"{path}: setups.{name}")
        for name, given in _mapping(top.get("setups") or {}, f"{path}: setups").items()
    }
    found = Figures(
        remarks=_texts(top.get("remarks"), f"{path}: remarks"),
        cost_remarks=_texts(top.get("cost_remarks"), f"{path}: cost_remarks"),
    )
    for where, given in _entries(top, "trainings", path):
        found.trainings.append(_make(Training, _training(given, where) | own, where))
    for where, given in _entries(top, "points", path):
        found.points.append(_make(Point, _point(given, setups, where) | own, where))
    for where, given in _entries(top, "benchmarks", path):
        found.points += _benchmark(given, setups, path, where)
    for where, given in _entries(top, "evaluations", path):
        model = {"model": _model(given["model"], where)} if "model" in given else {}
        found.evaluations.append(_make(Evaluation, given | own | model, where))
    for where, given in _entries(top, "printed", path):
        pairs = {key: tuple(given[key]) for key in ("ratio", "saving") if key in given}
        found.printed.append(_make(Printed, given | pairs, where))
    return found


def _setup(given: dict[str, Any], where: str) -> Serving:
    _known(given, [field.name for field in fields(Serving)], where)
    for key in ("weights_dtype", "kv_dtype"):
        if given.get(key, "bfloat16") not in DTYPE_BYTES:
            raise UserError(f"{where}: {key}={given[key]!r}: give one of {', '.join(DTYPE_BYTES)}")
    made = given | {"model": _model(given.get("model"), where), "slice": SLICES[_slice(given, where)]}
    return _make(Serving, made, where)


def _training(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Adds real tokens from rate and hours if they belong together; `model` and `lora_rank` become objects."""
    made = dict(given)
    if "lora_rank" in made:
        made["lora"] = LoraConfig(rank=made.pop("lora_rank"))
    if "model" in made:
        made["model"] = _model(made["model"], where)
    if made.pop("rate_over_hours", False):
        if "real_tokens" in made or not {"real_tokens_per_second", "hours"} <= made.keys():
            raise UserError(f"{where}: rate_over_hours: give real_tokens_per_second and hours, but no real_tokens")
        made["real_tokens"] = made["real_tokens_per_second"] * made["hours"] * 3600
    return made


def _point(given: dict[str, Any], setups: Mapping[str, Serving], where: str) -> dict[str, Any]:
    made = dict(given)
    name = made.pop("setup", None)
    if name is None:
        return made
    if name not in setups:
        raise UserError(f"{where}: setup={name!r}: no such setup{did_you_mean(str(name), list(setups), str)}")
    return made | {"serving": setups[name], "slice": setups[name].slice.name}


def _benchmark(given: dict[str, Any], setups: Mapping[str, Serving], path: Path, where: str) -> list[Point]:
    """The points of a folder, relative to the file's own; labelled measured, whatever the file's label."""
    _known(given, ("folder", "setup", "system"), where)
    serving = _point({"setup": given.get("setup")}, setups, where).get("serving")
    points = read_points(path.parent / str(given.get("folder")), setup=serving, system=given.get("system"))
    if points is None:
        raise UserError(f"{where}: folder={given.get('folder')!r}: contains no results of a benchmark; give another")
    return points


def _model(given: Any, where: str) -> ModelDemand:
    if isinstance(given, int | float) and given > 0:
        return ModelDemand(name=f"a model of {given / 1e9:g} B parameters", parameters=float(given))
    if given in ARCHITECTURES:
        return ModelDemand.of(ARCHITECTURES[given])
    raise UserError(f"{where}: model={given!r}: give one of {', '.join(ARCHITECTURES)}, or a number of parameters")


def _slice(given: Mapping[str, Any], where: str) -> str:
    name = given.get("slice")
    if name not in SLICES:
        raise UserError(f"{where}: slice={name!r}: give one of {', '.join(SLICES)}")
    return str(name)


def _entries(top: Mapping[str, Any], name: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, entry) of one list."""
    listed = top.get(name) or []
    if not isinstance(listed, list):
        raise UserError(f"{path}: {name}: give a list")
    return [(f"{path}: {name}.{i}", _mapping(entry, f"{path}: {name}.{i}")) for i, entry in enumerate(listed)]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r}: give keys with values")
    return value


def _texts(value: Any, where: str) -> list[str]:
    if value is not None and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise UserError(f"{where}: give a list of texts (in quotes if they contain a colon)")
    return list(value or [])


def _known(given: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in given:
        if key not in keys:
            raise UserError(
                f"{where}: no such key {key!r}{did_you_mean(str(key), list(keys), str)} (keys: {', '.join(keys)})"
            )


def _make(kind: type[Kind], given: Mapping[str, Any], where: str) -> Kind:
    """The entry as its dataclass; names every wrong key or value."""
    types = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    _known(given, list(types), where)
    for key, value in given.items():
        if "float" in types[key] or types[key].startswith("int"):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UserError(f"{where}: {key}={value!r}: give a number")
        elif types[key].startswith("str") and value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {key}={value!r}: give a text, in quotes")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [key for key in needed if key not in given]:
        raise UserError(f"{where}: {' and '.join(missing)} missing; give a value")
    if "slice" in types and given["slice"] not in (LOCAL, *SLICES, *SLICES.values()):
        raise UserError(f"{where}: slice={given['slice']!r}: give one of {', '.join(SLICES)}, {LOCAL}")
    return kind(**given)
