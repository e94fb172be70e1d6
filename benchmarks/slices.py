"""The train step on every slice of the plan table, by the TPU compiler: ours and the published recipe's.

    python -m benchmarks.slices [--size gemma4_31b] [--slice v5p-8]   # compiles what is missing of the recipe's
    python -m benchmarks.slices --render                             # only prints the table

Ours are the LoRA plans in `experiments/plans/results`. The recipe's step (`seed_recipe.py`, rows padded to 3,072, one
row for each place on the fsdp axis, tp as large as the heads allow, for 12B, E4B and E2B 1) is compiled up to where
memory is assigned and kept in `results/`, one small file for each cell, not made again while it is there. Small models
first; 31B takes minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.step import PADDED, lengths
from experiments.plans.make_table import MACHINES, SIZES, SMALL, known
from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.hardware import SLICES, MeshSizes
from gemma4_tpu.markdown import table
from gemma4_tpu.planning.estimate import roofline
from gemma4_tpu.planning.topology import absent_devices, set_environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
RANK = 64
Cell = tuple[str, str]
"""Model and slice."""


def path_of(cell: Cell) -> Path:
    """Where the recipe's figures of a cell are kept."""
    return RESULTS / f"recipe_{cell[0]}_{cell[1].replace('-', '')}.json"


def make(cell: Cell, seconds: float) -> dict[str, Any]:
    """Compiles the recipe's step for a cell in a process of its own, and keeps the outcome."""
    set_environment()  # before the process imports JAX
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_compile, args=(there, *cell), daemon=True)
    process.start()
    there.close()
    found: dict[str, Any] = {"fits": None}
    try:
        if here.poll(seconds):
            found = here.recv()
        else:
            found["message"] = f"no answer from the compiler in {seconds:.0f} s"
    except EOFError:
        found["message"] = "the compiling process ended without an answer"
    finally:
        process.kill()  # it would go on to generate code
        process.join()
    found |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "load": round(os.getloadavg()[0], 1)}
    RESULTS.mkdir(exist_ok=True)
    path_of(cell).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _compile(pipe: Any, size: str, machine: str) -> None:
    """Sends what the compiler says of the recipe's step."""
    from importlib.metadata import version

    from benchmarks import seed_recipe
    from gemma4_tpu.models import sharding
    from gemma4_tpu.planning import compile as planning
    from gemma4_tpu.planning import counts, hlo, program

    arch, wanted = ARCHITECTURES[size], SLICES[machine]
    tp = 1 if size in SMALL else max(arch.legal_tp(wanted.chips))
    fsdp = wanted.chips // tp
    mesh = sharding.make_mesh(fsdp, tp, absent_devices(wanted))
    limit = planning.hbm_limit_bytes(mesh.devices.flat[0])
    found: dict[str, Any] = {
        "fits": True,
        "mesh": {"fsdp": fsdp, "tp": tp},
        "real_tokens": float(lengths(9_959).mean()) * fsdp,
        "hbm_limit_bytes_per_chip": limit,
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            train, given = seed_recipe.absent_step(arch, mesh, PADDED, RANK)
            compiled = program.until_assigned(train.lower(*given), Path(folder), limit)
        except program.OutOfMemory as error:
            found |= {"fits": False, "hbm_bytes_per_chip": error.needed_bytes, "message": _short(error)}
        except Exception as error:  # whatever Qwix, Tunix and the compiler raise: it is the cell's result
            found |= {"fits": None, "message": _short(error)}
        else:
            plain = counts.count(hlo.parse(compiled.text)).plain()
            found["hbm_bytes_per_chip"] = compiled.peak_bytes
            names = ("flops", "matmul_flops", "hbm_traffic_bytes", "collectives", "not_counted")
            found |= {name: plain[name] for name in names}
    found["seconds"] = round(time.perf_counter() - started, 1)
    found["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["versions"] = {name: version(name) for name in ("jax", "libtpu", "google-tunix", "qwix")}
    pipe.send(found)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


HEADS = (
    "size", "slice", "dp × fsdp × tp: recipe's, ours", "GiB per chip: recipe's", "ours", "limit",
    "GFLOP per real token and chip: recipe's", "ours", "ratio", "HBM MB per real token and chip: recipe's", "ours",
    "ratio", "real tokens/s at the roofline: ours beside recipe's", "ours by the schedule: rows per update", "ms",
    "µs per real token",
)  # fmt: skip


def rows() -> list[list[str]]:
    """Of the table; only cells for which both are there."""
    plans = known()
    found = []
    for size in SIZES:
        for machine in MACHINES:
            plan, path = plans.get((size, machine, "lora")), path_of((size, machine))
            if plan is not None and path.is_file():
                found.append(_row(size, machine, plan, json.loads(path.read_text(encoding="utf-8"))))
    return found


def _row(size: str, machine: str, plan: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    limit = plan["hbm_limit_bytes_per_chip"]
    meshes = ", ".join(_mesh(one["mesh"]) if one.get("mesh") else "–" for one in (recipe, plan))
    cells = [size.removeprefix("gemma4_"), machine, meshes, _memory(recipe), _memory(plan), f"{limit / 2**30:.1f}"]
    if not recipe["fits"]:
        ours = _per_token(plan) if plan["fits"] else ("–", "–")
        return [*cells, "–", _figure(ours[0]), "–", "–", _figure(ours[1]), "–", "–", *_by_schedule(plan)]
    theirs = recipe["flops"] / recipe["real_tokens"] / 1e9, recipe["hbm_traffic_bytes"] / recipe["real_tokens"] / 1e6
    for own, other in zip(_per_token(plan), theirs, strict=True):
        cells += [_figure(other), _figure(own), f"{other / own:.1f}×"]
    line = roofline(SLICES[machine], recipe["flops"], recipe["hbm_traffic_bytes"], recipe["collectives"])
    slower = line["update"] / recipe["real_tokens"]
    cells.append(f"{slower * plan['real_tokens_per_update'] / plan['roofline_seconds']['update']:.1f}×")
    return [*cells, *_by_schedule(plan)]


def _by_schedule(plan: dict[str, Any]) -> list[str]:
    """Rows of an update of ours, its milliseconds, and microseconds per real token, if it was compiled to the end."""
    seconds = plan.get("step_seconds")
    if not seconds:
        return ["–", "–", "–"]
    each = 1e6 * seconds / plan["real_tokens_per_update"]
    return [str(plan["rows_per_update"]), f"{1e3 * seconds:.0f}", _figure(each)]


def _per_token(plan: dict[str, Any]) -> tuple[float, float]:
    """(GFLOP, MB of HBM traffic) per real token and chip of one of our plans."""
    traffic = plan["hbm_traffic_bytes_per_real_token_and_chip"]
    return plan["flops_per_real_token_and_chip"] / 1e9, traffic / 1e6


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _mesh(sizes: dict[str, int]) -> str:
    return MeshSizes.recorded(sizes).product


def _memory(one: dict[str, Any]) -> str:
    needed = one.get("hbm_bytes_per_chip")
    gib = f"{needed / 2**30:.1f}" if needed else ""
    return gib if one["fits"] else f"**does not fit** {gib}".strip() if one["fits"] is False else "not compiled"


def render() -> None:
    """Prints the table of what is kept."""
    made, all_ = len(found := rows()), len(SIZES) * len(MACHINES)
    if made < all_:
        print(f"{made} of {all_} cells are compiled so far; `python -m benchmarks.slices` compiles the rest.\n")
    print("\n".join(table(HEADS, found, "lll" + "r" * (len(HEADS) - 3))))


def main() -> None:
    """Compiles what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--slice", action="append", choices=MACHINES)
    parser.add_argument("--seconds", type=float, default=1800, help="longest wait for one compilation")
    parser.add_argument("--render", action="store_true", help="only print the table")
    asked = parser.parse_args()
    for machine in [] if asked.render else asked.slice or MACHINES:
        for size in asked.size or reversed(SIZES):
            if not path_of((size, machine)).is_file():
                found = make((size, machine), asked.seconds)
                told = {name: found.get(name) for name in ("fits", "seconds", "hbm_bytes_per_chip", "message")}
                print(size, machine, told, file=sys.stderr, flush=True)
    render()


if __name__ == "__main__":
    main()
