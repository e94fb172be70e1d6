"""One launch: everything from which its commands and script are made, recorded for watching and deleting it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.hardware import Slice, slice_of
from gemma4_tpu.launch.after import FollowUp
from gemma4_tpu.launch.schema import PlaceConfig, TpuVmConfig
from gemma4_tpu.prices import ON_DEMAND, SPOT, Price, price_in_zone
from gemma4_tpu.tracking.files import write_json
from gemma4_tpu.tracking.records import read_checked
from gemma4_tpu.tracking.typed import ANYTHING, FLAG, TEXT, each, fields, listed, maybe, of_one
from gemma4_tpu.train import load_train

PREFIX = "gemma4-tpu-"
"""Prefix of the names of everything launched here."""
RECORDS = Path("outputs/launches")
"""Contains one folder for each launch, named by its id."""
MODEL_IN_MEMORY = "/dev/shm/gemma4-tpu-model"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One training run on one slice."""

    id: str
    """Name of the queued resource and of its node."""
    project: str
    zone: str
    slice: str
    """Key of `hardware.SLICES`."""
    spot: bool
    run_dir: str
    """gs:// run folder, the same on every host and after every preemption."""
    launch_dir: str
    """gs:// folder for the sources, the logs of the hosts and the outcome."""
    train: list[str]
    """Command line of `python -m gemma4_tpu.train`."""
    after: list[dict[str, Any]]
    """Stages after training, as `after.FollowUp`."""
    model_source: str | None
    """gs:// checkpoint to copy to `MODEL_IN_MEMORY`."""
    launch: dict[str, Any]
    """The `launch.` keys."""
    created: str
    """UTC, ISO 8601."""

    @property
    def config(self) -> TpuVmConfig:
        return TpuVmConfig(**self.launch)

    @property
    def stages(self) -> list[FollowUp]:
        return [FollowUp(**stage) for stage in self.after]

    @property
    def hardware(self) -> Slice:
        found = slice_of(HardwareConfig(name=self.slice))
        assert found is not None  # the checks
        return found

    @property
    def folder(self) -> Path:
        """The record: `job.json`, `startup.sh`."""
        return RECORDS / self.id

    def save(self) -> None:
        """Writes the record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "job.json", self)


_SHAPE = fields({
    **of_one(TEXT, "id project zone slice run_dir launch_dir created"), "spot": FLAG, "train": listed(TEXT),
    "after": listed(fields({"name": TEXT, "words": listed(TEXT)}, of_one(maybe(TEXT), "problems served"))),
    "model_source": maybe(TEXT), "launch": each(ANYTHING),
})  # fmt: skip


def saved() -> dict[str, Launch]:
    """The records of this folder, by id."""
    found = {}
    for path in sorted(RECORDS.glob("*/job.json")):
        advice = "bring back a copy, or delete the folder once nothing of it runs (launch.tpu_vm list)"
        told = read_checked(path, _SHAPE, advice)
        found[path.parent.name] = Launch(**{key: told[key] for key in Launch.__dataclass_fields__ if key in told})
    return found


def name_and_folder(name: str, run_dir: str | None, place: PlaceConfig, now: datetime) -> tuple[str, str]:
    """(id of a new launch, its run folder on gs://)."""
    moment = f"{now:%Y%m%d-%H%M%S}"
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:30].strip("-")
    return f"{PREFIX}{plain}-{moment}", run_dir or f"{place.bucket}/{name}/{moment}"


def train_words(overrides: list[str], run_dir: str) -> list[str]:
    """The command line for train on the slice: without the launcher's words, with the run folder.

    Raises:
      UserError: train refuses them.
    """
    ours = ("launch.", "run_dir=")
    words = [word for word in overrides if not word.lstrip("+").startswith(ours)]
    return load_train([*words, f"run_dir={run_dir}"]).overrides


def cost(launched: Launch) -> str:
    """The price of an hour and the most that the time limit allows, in words; estimated."""
    hours, what = launched.config.max_hours, "spot" if launched.spot else "on demand"
    given = next((w.partition("=")[2] for w in launched.train if w.startswith("hardware.usd_per_hour=")), None)
    price = price_in_zone(launched.hardware, SPOT if launched.spot else ON_DEMAND, launched.zone)
    if given not in (None, "null"):
        price = Price(usd_per_hour=float(given), date="this run", source="hardware.usd_per_hour")
    if price is None:
        return "unknown: this slice has no price with a source; hardware.usd_per_hour=… sets one"
    limit = f", at most ${price.usd_per_hour * hours:,.2f} for one slice by launch.max_hours={hours:g}" if hours else ""
    where = f", {price.region}" if price.region else ""
    return f"${price.usd_per_hour:,.2f} per hour {what}{where} ({price.date}, {price.source}){limit}; estimated"
