"""Plans every size on every slice and renders the table of this folder's README.

    python experiments/plans/make_table.py                      # all cells; hours on two cores, resumable
    python experiments/plans/make_table.py --size gemma4_e2b --slice v6e4
    python experiments/plans/make_table.py --render             # only the table

Each plan is one `python -m gemma4_tpu.plan …` in a process of its own; its plan.json is kept in `results/` and not made
again while it is there. A cell's row is the best of up to five meshes: the cheapest per million real tokens that fits,
of those with a schedule where there are such.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_tpu.architectures import ARCHITECTURES, Architecture
from gemma4_tpu.hardware import SLICES, MeshSizes, Slice, option_name
from gemma4_tpu.markdown import table
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.reporting.plan_rows import band, usd_per_million
from gemma4_tpu.tracking.records import read_record
from gemma4_tpu.training.meshes import legal_meshes

HERE = Path(__file__).resolve().parent
RESULTS, TABLE = HERE / "results", HERE / "README.md"
SIZES = ("gemma4_31b", "gemma4_26b_a4b", "gemma4_12b", "gemma4_e4b", "gemma4_e2b")
SMALL = ("gemma4_12b", "gemma4_e4b", "gemma4_e2b")
"""Those that one chip of 32 GB can hold."""
MACHINES = ("v5p-8", "v5p-32", "v6e-4", "v6e-8", "v5e-16")
TRAINED = {"lora": "default", "qlora": "qlora_nf4"}
COMMON = ("lora.rank=64", "lora.alpha=64", "trainer.remat=auto", "plan.max_attempts=0")
LENGTH, LONGER = 4096, (8192, 16384)
"""Tokens in a row: of the table, and of the plans with longer rows."""
FITS, MISFIT = 0, 1

INTRODUCTION = """\
The table is for LoRA (and QLoRA, nf4) of rank 64 on packed rows of 4096 tokens. Each update has one row per position on
the axes dp and fsdp; remat is the first policy that fits. Each cell is the cheapest of its meshes that have been
planned (of those that were compiled to the end where there are such): weights split over all chips or, with each tp,
only as far as leaves half of HBM free. Where that is known, whole copies on every chip are fastest.

All figures are *estimated*: memory by the TPU compiler, which compiles the whole training step without a TPU; time from
the compiler's schedule, times a band of measured over scheduled time (`docs/planning.md`); dollars from the prices in
`gemma4_tpu/prices.yaml`. A cell that is not fully compiled yet has no time, only its roofline, which is a lower bound.
Minutes and dollars are for the paper's job: 9,959 rows of 922 tokens on average, one epoch. Most cells were compiled
before adapters with the same input shared a product, which makes a layer of 31B on a v5p-8 an *estimated* 0.7% faster
([`docs/step.md`](../../docs/step.md)), and those of a v5e-16, except 31B's, before its chips had a preset of flags,
which makes 31B's 4% faster. The rooflines of QLoRA for 26B-A4B, E2B and a v5p-32 count HBM traffic up to a fifth too
high. Nothing here ran on a TPU."""

PAPER = {"seconds_per_sample": 1.21, "hours": 3.34, "usd": 56.11, "samples": 9959, "mean_tokens": 922}
"""Quoted: the paper's run of 31B with LoRA on a v5p-8; the tokens are those of its rows, padded to 3072."""


@dataclass(frozen=True)
class PlanCell:
    """One plan: a size on a slice with a mesh, and rows of a length."""

    size: str
    machine: str
    trained: str
    mesh: MeshSizes
    length: int = LENGTH

    @property
    def path(self) -> Path:
        mesh = str(self.mesh).replace("=", "").replace(" ", "_")
        name = f"{self.size}_{option_name(self.machine)}_{self.trained}_{mesh}"
        return RESULTS / f"{name}.json" if self.length == LENGTH else RESULTS / "longer" / f"{name}_{self.length}.json"

    @property
    def words(self) -> list[str]:
        return [
            f"hardware={option_name(self.machine)}", f"model={self.size}", f"lora={TRAINED[self.trained]}", *COMMON,
            f"data.sequence_length={self.length}", *self.mesh.overrides,
        ]  # fmt: skip


def cells(sizes: list[str], machines: list[str], trained: list[str]) -> Iterator[PlanCell]:
    """Every cell with each of its meshes."""
    for size in sizes:
        for machine in machines:
            for kind in trained:
                for mesh in meshes(ARCHITECTURES[size], SLICES[machine]):
                    yield PlanCell(size, machine, kind, mesh)


def longer() -> list[PlanCell]:
    """31B on a v5p-8 with longer rows, on the mesh of `experiment=v5p8` and on one that leaves more room."""
    return [
        PlanCell("gemma4_31b", "v5p-8", "lora", mesh, length)
        for length in (LENGTH, *LONGER)
        for mesh in (MeshSizes(2, 1, 2), MeshSizes(1, 1, 4))
    ]


def meshes(arch: Architecture, wanted: Slice) -> list[MeshSizes]:
    """The likeliest ones: weights split over all chips, and for each tp only as far as leaves half of HBM free.

    tp is at most 2 for small models.
    """
    legal = legal_meshes(arch, wanted.devices)
    weights_bytes = 2 * sum(math.prod(leaf.array_shape) for leaf in Layout.of(arch).leaves())
    split = weights_bytes / (wanted.chip.hbm_bytes / 2)
    largest = 1 if arch.name in SMALL else max(arch.legal_tp(wanted.devices))
    chosen = [mesh for mesh in legal if mesh.tp == largest][:1]
    for tp in (tp for tp in arch.legal_tp(wanted.devices) if tp <= max(2, largest)):
        chosen += [mesh for mesh in legal if mesh.tp == tp and mesh.fsdp * mesh.tp >= split][-1:]
    return list(dict.fromkeys(chosen))


def make(cell: PlanCell) -> str:
    """Plans one cell; returns the outcome in words."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "plan"
        command = [sys.executable, "-m", "gemma4_tpu.plan", *cell.words, f"run_dir={run_dir}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode not in (FITS, MISFIT) or not (run_dir / "plan.json").is_file():
            return f"failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run_dir / "plan.json", cell.path.with_suffix(".part"))
        cell.path.with_suffix(".part").replace(cell.path)
    return "fits" if done.returncode == FITS else "does not fit"


def best(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan that stands for a cell: the cheapest that fits (the fastest, without a price), else the smallest.

    Of those with a schedule, where there are such: an assumed utilization does not compare with it.
    """
    fitting = [plan for plan in plans if plan["fits"]]
    fitting = [plan for plan in fitting if plan.get("step_seconds")] or fitting
    if fitting:
        return min(fitting, key=lambda p: p["usd_per_million_real_tokens"] or 1e9 / p["real_tokens_per_second"]["mid"])
    return min(plans, key=lambda p: p["hbm_bytes_per_chip"] or float("inf"))


def known() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(size, slice, lora or qlora) → its best plan, of those in `results/`."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for size in SIZES:
        for machine in MACHINES:
            for kind in TRAINED:
                for path in sorted(RESULTS.glob(f"{size}_{option_name(machine)}_{kind}_*.json")):
                    grouped.setdefault((size, machine, kind), []).append(read_record(path).values)
    return {key: best(plans) for key, plans in grouped.items()}


HEADS = (
    "size", "slice", "trained", "dp × fsdp × tp", "remat", "rows", "fits", "GiB per chip", "bound by", "roofline ms",
    "schedule ms", "real tokens/s", "minutes", "$ for the job", "$ per million real tokens",
)  # fmt: skip


def row(key: tuple[str, str, str], plan: dict[str, Any]) -> list[str]:
    """Of the table."""
    size, machine, kind = key
    mesh = MeshSizes.recorded(plan["mesh"]).product
    needed = plan["hbm_bytes_per_chip"]
    memory = f"{needed / 2**30:.1f} of {plan['hbm_limit_bytes_per_chip'] / 2**30:.2f}" if needed else "too much"
    cells_ = [size, machine, kind, mesh, plan["remat"], str(plan["rows_per_update"]), "yes" if plan["fits"] else "no"]
    if not plan["fits"]:
        return [*cells_, memory, *["–"] * 7]
    cells_ += [memory, plan["bound_by"], f"{plan['roofline_seconds']['update'] * 1e3:,.0f}"]
    if not plan.get("step_seconds"):
        return [*cells_, *["–"] * 5]
    cells_ += [
        f"{plan['step_seconds'] * 1e3:,.0f}",
        band(plan["real_tokens_per_second"]),
        band(plan["hours"], times=60),
        band(usd, "{:.2f}") if (usd := plan["usd_estimate"].get("on_demand")) else "no price",
        _price(plan),
    ]
    return cells_


def _price(plan: dict[str, Any]) -> str:
    usd = usd_per_million(plan["usd_per_million_real_tokens"], plan["seconds_per_update"])
    return "no price" if usd is None else band(usd, "{:.3f}")


def cheapest(plans: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    """For each size the slice with the lowest price per million real tokens, of those whose time is known."""
    lines = []
    for size in SIZES:
        priced = [
            (plan["usd_per_million_real_tokens"], machine, kind, _price(plan))
            for (its_size, machine, kind), plan in plans.items()
            if its_size == size and plan["fits"] and plan.get("step_seconds") and plan["usd_per_million_real_tokens"]
        ]
        if priced:
            _, machine, kind, told = min(priced)
            among = f"the lowest of {len(priced)} cells" if len(priced) > 1 else "the only cell"
            lines.append(f"- {size}: {machine} ({kind}), ${told} per million real tokens, {among} with a schedule")
    return lines


def _missing(planned: int) -> list[str]:
    total = len(SIZES) * len(MACHINES) * len(TRAINED)
    return [] if planned == total else [f"{planned} of {total} cells are planned so far.", ""]


def render() -> str:
    """The README: what was planned, the cheapest slices, the paper for comparison, and the table."""
    plans = known()
    tokens = PAPER["samples"] * PAPER["mean_tokens"]
    paper_usd = PAPER["usd"] / tokens * 1e6
    lines = [
        "# Every size on every slice",
        "",
        INTRODUCTION,
        "",
        "    python experiments/plans/make_table.py",
        "",
        "## Cheapest slice for each size",
        "",
        *(cheapest(plans) or ["Nothing planned yet."]),
        "",
        "## Compared with the paper",
        "",
        f"*Quoted*: 31B with LoRA of rank 64 on a v5p-8 took {PAPER['seconds_per_sample']} s per sample,"
        f" {PAPER['hours']} h and ${PAPER['usd']}, every row padded to 3072 tokens. With its rows' mean of 922 tokens"
        f" that is {PAPER['mean_tokens'] / PAPER['seconds_per_sample']:,.0f} real tokens/s and ${paper_usd:.2f} per"
        " million real tokens.",
    ]
    ours = plans.get(("gemma4_31b", "v5p-8", "lora"))
    if ours is not None and ours["fits"]:
        lines.append(
            "*Estimated* for the same slice and job here:"
            f" {band(ours['real_tokens_per_second'])} real tokens/s, {band(ours['hours'], times=60)} minutes,"
            f" ${band(ours['usd_estimate']['on_demand'], '{:.2f}')},"
            f" ${_price(ours)} per million real tokens."
        )
    lines += ["", *_longer_rows(), "## All cells", "", *_missing(len(plans))]
    lines += table(HEADS, [row(key, plan) for key, plan in plans.items()])
    return "\n".join(lines) + "\n"


def _longer_rows() -> list[str]:
    """The section about them: none of it while none is planned."""
    rows = []
    for cell in longer():
        if not cell.path.is_file() or not (plan := read_record(cell.path).values).get("step_seconds"):
            continue
        parts = [plan["step_parts"][part] for part in ("base_products", "attention", "collectives_exposed")]
        each = plan["rows_per_update"] * cell.length / LENGTH
        rows.append([
            f"{cell.length:,}", MeshSizes.recorded(plan["mesh"]).product, plan["remat"], str(plan["rows_per_update"]),
            f"{plan['hbm_bytes_per_chip'] / 2**30:.1f}", f"{plan['step_seconds'] * 1e3:,.0f}",
            *(f"{1e3 * seconds / each:.0f}" for seconds in (plan["step_seconds"], *parts)),
            band(plan["real_tokens_per_second"]),
        ])  # fmt: skip
    if len(rows) < 2:
        return []
    heads = (
        "tokens in a row", "dp × fsdp × tp", "remat", "rows", "GiB per chip", "schedule ms", "per 4,096 tokens",
        "of it base products", "attention", "collectives exposed", "real tokens/s",
    )  # fmt: skip
    told = "31B with LoRA on a v5p-8, the same examples in longer rows:"
    return ["## Longer rows", "", told, "", *table(heads, rows)]


def main() -> None:
    """Plans what is missing, and renders after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--slice", action="append", choices=[option_name(name) for name in MACHINES])
    parser.add_argument("--trained", action="append", choices=list(TRAINED))
    parser.add_argument("--render", action="store_true", help="only write the table")
    given = parser.parse_args()
    if not given.render:
        machines = [name for name in MACHINES if not given.slice or option_name(name) in given.slice]
        wanted = list(cells(given.size or list(SIZES), machines, given.trained or list(TRAINED)))
        asked = [one for one in longer() if one.size in (given.size or SIZES) and one.machine in machines]
        wanted += [one for one in asked if one not in wanted]
        for number, cell in enumerate(wanted, 1):
            if cell.path.is_file():
                continue
            started = time.monotonic()
            outcome = make(cell)
            print(
                f"{number}/{len(wanted)} {cell.path.stem}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True
            )
            TABLE.write_text(render(), encoding="utf-8")
    TABLE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
