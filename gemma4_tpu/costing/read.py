"""Reads figures from folders: runs, plans, evaluations, server benchmarks, and written ones (`figures.yaml`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.costing import load_tests, quoted
from gemma4_tpu.costing.ceiling import ModelDemand
from gemma4_tpu.costing.figures import ENDPOINT, ESTIMATED, MEASURED, Evaluation, Figures, Training
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, MeshSizes
from gemma4_tpu.planning.money import CONFIGURED
from gemma4_tpu.prices import ON_DEMAND, kind_of
from gemma4_tpu.tracking.records import (
    CONFIG,
    EVALUATION,
    PLAN,
    PLAN_FILE,
    RESULT,
    TRAINING,
    Record,
    config_of,
    read_record,
    result_of,
)  # fmt: skip

log = logging.getLogger(__name__)


def read(places: Sequence[str]) -> Figures:
    """The figures of all places; a folder that is not a record itself stands for the records in it.

    Raises:
      UserError: there is nothing to cost, or a record is damaged.
    """
    return Figures.together(_place(Path(place)) for place in places)


def _place(place: Path) -> Figures:
    found = _record(place)
    if found is None and place.is_dir():
        inside = [figures for path in sorted(place.iterdir()) if (figures := _record(path)) is not None]
        found = Figures.together(inside) if inside else None
    if found is None:
        raise UserError(
            f"{place}: no run ({RESULT}, {CONFIG}), plan ({PLAN_FILE}), evaluation, benchmark or {quoted.NAME} in it"
        )
    return found


def _record(path: Path) -> Figures | None:
    """The figures of one record; None if it is not one."""
    if path.is_file() and path.suffix == ".yaml":
        return quoted.read_figures(path) if path.name.endswith(quoted.NAME) else None
    if path.is_file():
        return _of(read_record(path), path) if path.suffix == ".json" else None
    if (path / quoted.NAME).is_file():
        return quoted.read_figures(path / quoted.NAME)
    if (path / PLAN_FILE).is_file():
        return _of(read_record(path / PLAN_FILE), path)
    if (points := load_tests.read_points(path)) is not None:
        return Figures(points=points)
    return _of(result_of(path), path)


def _of(record: Record, path: Path) -> Figures | None:
    """Figures of a completed record; None for kinds without figures."""
    if record.kind == PLAN:
        return _plan(record.values, path)
    if record.kind == TRAINING:
        return Figures(trainings=[_run(record.values, path)])
    if record.kind == EVALUATION and not record.failed:
        return Figures(evaluations=[_evaluation(record.values, path)])
    return None


def _config(path: Path) -> dict[str, Any]:
    """`config.yaml` of a run folder as plain values; it names the slice."""
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: {CONFIG} is missing; it says which slice this ran on")
    return config_of(path)


def _short(path: Path) -> str:
    """The last two names of a folder, such as `train/2026-11-20_12-00-00`."""
    return "/".join(path.absolute().parts[-2:])


def _model(name: str) -> ModelDemand | None:
    return ModelDemand.of(ARCHITECTURES[name]) if name in ARCHITECTURES else None


def _lora(config: dict[str, Any]) -> LoraConfig:
    """What a recorded configuration trains; keys of other versions are ignored."""
    recorded = config.get("lora", {})
    return LoraConfig(**{key: value for key, value in recorded.items() if key in LoraConfig.__dataclass_fields__})


def _run(result: dict[str, Any], path: Path) -> Training:
    config = _config(path)
    hardware = config.get("hardware", {})
    if "seconds" not in result:
        raise UserError(f"{path}: the run {result['status']} before it trained, so it has no cost; name another run")
    if result.get("status") not in (None, "finished"):
        log.warning("%s: %s; its cost covers what it did until then", path, result["status"])
    data = read_record(path / "data.json").values if (path / "data.json").is_file() else {}
    return Training(
        name=_short(path),
        label=MEASURED,
        source=str(path),
        slice=hardware.get("name", LOCAL),
        hours=result["seconds"] / 3600,
        real_tokens=result["real_tokens"],
        real_tokens_per_second=result.get("real_tokens_per_second"),
        usd_per_hour=hardware.get("usd_per_hour"),
        kind=kind_of(HardwareConfig(**{key: hardware.get(key, False) for key in ("spot", "flex_start")})),
        region=hardware.get("region"),
        model=_model(config.get("model", {}).get("name", "")),
        lora=_lora(config),
        mean_tokens=data.get("train", {}).get("length_tokens", {}).get("mean") or 1.0,
    )


def _plan(plan: dict[str, Any], path: Path) -> Figures:
    """A plan, with its band; one that does not fit costs nothing and is skipped."""
    if not plan.get("fits"):
        log.warning("%s: skipped, the plan does not fit", path)
        return Figures()
    price = plan["price"]
    rate, hours, ends = plan["real_tokens_per_second"]["mid"], plan["hours"]["mid"], plan["hours"]
    by, reached = plan.get("step_band") or {}, plan["utilization"]
    said = f"at {reached['low']:.0%} to {reached['high']:.0%} of the roofline, assumed"
    if by:
        said = f"its schedule, times {by['low']:g} to {by['high']:g}"
    rank = plan["lora_rank"]
    lora = _lora(config_of(path)) if (path / CONFIG).is_file() else LoraConfig()
    made = Training(
        name=f"{plan['model']}, {plan['trained']}, {plan['slice']}, {MeshSizes.recorded(plan['mesh'])}",
        label=ESTIMATED,
        source=f"{path} ({said})",
        slice=plan["slice"],
        hours=hours,
        band=(min(ends.values()) / hours, max(ends.values()) / hours),
        real_tokens=rate * hours * 3600,
        real_tokens_per_second=rate,
        usd_per_hour=price.get("usd_per_hour") if CONFIGURED in plan["usd_estimate"] else None,
        kind=price.get("kind", ON_DEMAND),
        region=price.get("region"),
        model=_model(plan["model"]),
        lora=LoraConfig(enabled=False) if rank is None else replace(lora, enabled=True, rank=rank),
    )
    return Figures(trainings=[made])


def _evaluation(result: dict[str, Any], path: Path) -> Evaluation:
    problems, config = result["problems"].values(), _config(path)
    remote = bool(config.get("eval", {}).get("endpoint"))  # slice and model in the configuration are then the client's
    return Evaluation(
        name=f"{result['benchmark']}, {result['name']}, {_short(path)}",
        label=MEASURED,
        source=str(path),
        slice=ENDPOINT if remote else config.get("hardware", {}).get("name", LOCAL),
        model=None if remote else _model(config.get("model", {}).get("name", "")),
        seconds=result.get("generation_seconds"),
        tokens=result.get("tokens"),
        samples=sum(problem["n"] for problem in problems),
        passing=sum(problem["passed"] for problem in problems),
    )
