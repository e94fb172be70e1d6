"""Plan checks: find the jobs that do not fit into their TPU slice before anything runs.

Each distinct program is compiled once, in a separate process: `python -m gemma4_tpu.sweeping.plan_check <config>
<answer>`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu.config.load import from_yaml
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.config.tasks import PlanConfig, PlanRoot
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import slice_of
from gemma4_tpu.tracking.files import plain, write_json, write_text
from gemma4_tpu.tracking.records import read_checked
from gemma4_tpu.tracking.typed import FLAG, TEXT, maybe
from gemma4_tpu.tracking.typed import fields as fields_of

log = logging.getLogger(__name__)

MODES = ("auto", "true", "false")
_KEY = "hydra.launcher.plan"
_COUNTS = {
    "hardware": ("name", "flags", "compiler_options"),
    "mesh": ("dp", "fsdp", "tp", "cp"),
    "model": ("name", "new_tokens"),
    "lora": (
        "enabled", "rank", "dropout", "targets", "expert_rank", "layers", "ranks", "modules_to_train", "dora",
        "quantize", "start", "init",
    ),
    "objective": ("kind",),
    "optimizer": ("kind",),
    "data": ("sequence_length", "packing", "buckets"),
    "trainer": (
        "global_batch_tokens", "global_batch_sequences", "microbatches", "remat", "attention", "loss_chunk_tokens",
        "compute_dtype", "ema_decay",
    ),
}  # fmt: skip
"""The keys that determine a step's memory; jobs that differ in others share a plan."""


@dataclass(frozen=True)
class Fit:
    """What is known of a job before it runs."""

    fits: bool | None
    """None: not checked."""
    told: str
    """The memory that it takes, why it does not fit, or why that was not checked."""


def check_fit(config: TrainRoot, mode: str, folder: Path, stopped: Callable[[], bool]) -> Fit:
    """Whether a job fits, from the cache in `folder` or by compiling its step (minutes for the large models).

    Args:
      config: of the job.
      mode: `hydra.launcher.plan`: `auto` checks what can be checked here, `true` requires it, `false` skips it.
      folder: of this sweep's plans.
      stopped: polled during a compilation; True ends it.

    Raises:
      UserError: `mode` is invalid, or it is `true` and this job cannot be checked here.
    """
    if str(mode).lower() not in MODES:
        raise UserError(f"{_KEY}={mode}: not a choice (choices: {', '.join(MODES)})")
    obstacle = _obstacle(config.hardware) if str(mode).lower() != "false" else f"{_KEY}=false"
    if obstacle:
        if str(mode).lower() == "true":
            raise UserError(f"{_KEY}=true: a job cannot be checked here ({obstacle}); use {_KEY}=auto")
        return Fit(None, f"not checked: {obstacle}")
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / f"{_key(config)}.json"
    if not answer.is_file():
        log.info("compiling for %s to see whether it fits …", config.hardware.name)
        _compile(config, answer, stopped)
    if not answer.is_file():
        return Fit(None, f"not checked: the compiling process failed ({answer.with_suffix('.log')})")
    told = _read_answer(answer)
    return Fit(told["fits"], told["told"])


def _read_answer(path: Path) -> dict[str, Any]:
    shape = fields_of({"fits": maybe(FLAG), "told": TEXT})
    return dict(read_checked(path, shape, "delete it: the next start checks again"))


def _obstacle(hardware: HardwareConfig) -> str | None:
    """Why this job cannot be planned here."""
    wanted = slice_of(hardware)
    if wanted is None:
        return "hardware=local is not a slice"
    if wanted.topology is None:
        return f"{wanted.name} has GPUs, for which there is no compiler here"
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (pip install 'gemma4-tpu[tpu]')"
    return None


def _key(config: TrainRoot) -> str:
    values = asdict(config)
    counted: dict[str, Any] = {group: [values[group][name] for name in names] for group, names in _COUNTS.items()}
    for package in ("gemma4-tpu", "jax", "libtpu"):
        try:
            counted[package] = version(package)
        except PackageNotFoundError:
            counted[package] = None
    # Not sorted: the order of lora.ranks matters.
    return hashlib.sha256(json.dumps(counted).encode()).hexdigest()[:12]


def _compile(config: TrainRoot, answer: Path, stopped: Callable[[], bool]) -> None:
    request = answer.with_suffix(".yaml")
    # Without secrets, which a compilation does not need.
    write_text(request, yaml.safe_dump(plain(asdict(config)), sort_keys=False))
    command = [sys.executable, "-m", "gemma4_tpu.sweeping.plan_check", str(request), str(answer)]
    with answer.with_suffix(".log").open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while True:
            try:
                process.wait(0.2)
                return
            except subprocess.TimeoutExpired:
                if stopped():
                    os.killpg(process.pid, signal.SIGKILL)  # including the compiler's process
                    process.wait()
                    return


def main(request: Path, answer: Path) -> None:
    """Plans what the request describes."""
    from gemma4_tpu.planning.attempt import plan_one
    from gemma4_tpu.planning.checks import examine_plan, normalise_plan
    from gemma4_tpu.planning.misfit import format_bytes, misfit_line
    from gemma4_tpu.planning.planned import Planned
    from gemma4_tpu.tracking.logs import setup_logging

    setup_logging()
    config = from_yaml(request.read_text(encoding="utf-8"), TrainRoot)
    given = {field.name: getattr(config, field.name) for field in fields(TrainRoot)}
    root = normalise_plan(PlanRoot(**given, plan=PlanConfig(max_attempts=0, schedule=False)))
    checked, problems = examine_plan(root)
    if checked is None:
        told = "; ".join(problem.message for problem in problems)
        return write_json(answer, Fit(None, f"not checked: {told}"))
    try:
        result = plan_one(Planned.of(root, checked))
    except UserError as refusal:
        return write_json(answer, Fit(None, f"not checked: {refusal}"))
    if not result.fits:
        return write_json(answer, Fit(False, misfit_line(result)))
    used, limit = result.hbm_bytes_per_chip or 0, result.hbm_limit_bytes_per_chip
    told = f"fits: {format_bytes(used)} of {format_bytes(limit)} HBM per chip (estimated by the TPU compiler)"
    return write_json(answer, Fit(True, told))


def _end_with_parent() -> None:
    """Ends the compiler when the sweep is killed."""
    while os.read(sys.stdin.fileno(), 4096):  # unbuffered: a buffer's lock would cause trouble at exit
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
