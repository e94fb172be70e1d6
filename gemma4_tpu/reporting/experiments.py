"""`python -m gemma4_tpu.report check=experiments/<name>`: runs a recorded experiment again and compares.

An experiment's folder is a run folder cut down to `config.yaml`, `provenance.json`, `metrics.jsonl` and `result.json`,
plus a `check.yaml` that says how much losses may differ on another machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu.children import end_with_parent
from gemma4_tpu.config.lists import as_word
from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.files import read_json
from gemma4_tpu.tracking.records import check_shape, read_record
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.tracking.typed import COUNT, TEXT, fields
from gemma4_tpu.training.checks import PARTS
from gemma4_tpu.training.replay import FILE, Unequal

NEEDED = ("config.yaml", "provenance.json", "metrics.jsonl", "result.json", "check.yaml")
SAME = ("status", "updates", "real_tokens", "target_tokens", "slots", "lora_parameters", "adapted_modules")
"""Keys of the result that must be equal on every machine."""

_MADE_ON = fields({"hardware": fields({"slice": TEXT, "devices": COUNT, "kind": TEXT})})


def check_experiment(folder: str) -> int:
    """Runs a recorded experiment again, in `outputs/checks`, and prints the comparison.

    Losses must be bit-identical if code, packages, data and machine are as recorded, else within the `loss_tolerance`
    (nats per target token) of the experiment's `check.yaml`.

    Returns the exit code: 0 if the results agree, 1 if not, or that of the training run if it ended with another.

    Raises:
      UserError: nothing is recorded there, or the run was on hardware that this machine lacks.
    """
    place = Path(folder).expanduser()
    _refuse_unrecorded(folder, place)
    tolerance = _tolerance(place)
    made_on = read_record(place / "provenance.json").values
    check_shape(made_on, _MADE_ON, place / "provenance.json")
    hardware = made_on["hardware"]
    _refuse_other_hardware(folder, hardware)
    run_dir = f"outputs/checks/{place.absolute().name}/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    given = {"replay": folder, "replay_allow": list(PARTS), "run_dir": run_dir, "tracker": "none"}
    words = [as_word(key, value) for key, value in given.items()]
    command = [sys.executable, "-m", "gemma4_tpu.train", *words]
    code = subprocess.run(command, env=_environment(hardware), check=False, preexec_fn=end_with_parent).returncode
    if code:
        print(f"\n{folder}: the run ended with code {code}, see {run_dir}", file=sys.stderr)
        return code
    failures = _compare(place, Path(run_dir), tolerance)
    print("\nfailed: " + "\n        ".join(failures) if failures else "\npassed")
    return 1 if failures else 0


def _compare(recorded: Path, now: Path, tolerance: float) -> list[str]:
    """Prints what was compared; returns the failures."""
    replay = read_json(now / FILE)
    before, after = (Result.read(folder / "result.json") for folder in (recorded, now))
    losses, parts = replay["losses"], replay["differences"]
    print(f"\n{recorded}, repeated in {now}")
    for part, differences in parts.items():
        print(f"  not as recorded: {part}: {'; '.join(differences)}")
    failures = [
        f"{key}: {getattr(after, key)} (recorded: {getattr(before, key)})"
        for key in SAME
        if getattr(before, key) != getattr(after, key)
    ]
    if losses["compared"] < max(1, losses["recorded"]):
        failures.append(f"only {losses['compared']} of {losses['recorded']} recorded losses were reproduced")
    first = losses["first_difference"]
    told = f"  {losses['compared']} losses compared: "
    if first is None:
        print(f"{told}bit-identical")
        return failures
    first = Unequal(**first)
    print(f"{told}at most {losses['largest']:.3g} apart (allowed: {tolerance:g}); first at {first}")
    if not parts:
        failures.append(f"nothing has changed since it was recorded, but its losses have: {first}")
    elif not losses["largest"] <= tolerance:  # NaN fails
        failures.append(f"losses are up to {losses['largest']:.3g} apart; {tolerance:g} is allowed")
    return failures


def _refuse_unrecorded(folder: str, place: Path) -> None:
    if not place.is_dir():
        raise UserError(f"check={folder}: no such folder; give an experiment, such as experiments/smoke")
    if missing := [name for name in NEEDED if not (place / name).is_file()]:
        recorded = sorted(p.parent.name for p in place.absolute().parent.glob("*/check.yaml"))
        raise UserError(
            f"check={folder}: has no {', '.join(missing)}, so it records no run to repeat (a plan is an estimate); give"
            f" one that does: {', '.join(recorded) or 'none here'}"
        )


def _tolerance(place: Path) -> float:
    try:
        stated: Any = yaml.safe_load((place / "check.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        stated = None
    tolerance = stated.get("loss_tolerance") if isinstance(stated, dict) else None
    if not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise UserError(
            f"{place / 'check.yaml'}: loss_tolerance={tolerance}: give the largest accepted difference of a loss on"
            " another machine, such as 1.0e-4 (nats per target token)"
        )
    return float(tolerance)


def _refuse_other_hardware(folder: str, recorded: dict[str, Any]) -> None:
    """A run recorded on accelerators needs the same ones."""
    if recorded["kind"] == "cpu":
        return
    asked = "import jax; print(jax.device_count(), jax.devices()[0].device_kind)"
    found = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=False, preexec_fn=end_with_parent
    )
    here = (found.stdout.strip().splitlines() or ["no device that JAX can use"])[-1]
    if here != f"{recorded['devices']} {recorded['kind']}":
        raise UserError(
            f"check={folder}: recorded on {recorded['devices']} {recorded['kind']} ({recorded['slice']}); this machine"
            f" has {here}. On the recorded hardware: python -m gemma4_tpu.report check={folder}"
        )


def _environment(recorded: dict[str, Any]) -> dict[str, str]:
    """This process's environment with the compiler settings as recorded; on the CPU if the run was."""
    names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    flags = {name: recorded[name.lower()] for name in names if recorded.get(name.lower())}
    platform = {"JAX_PLATFORMS": "cpu"} if recorded["kind"] == "cpu" else {}
    return {key: value for key, value in os.environ.items() if key not in names} | flags | platform
