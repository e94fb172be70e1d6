"""Plans every committed recipe and writes the figures into its README, between the marks.

    python experiments/plans/recipes.py                  # all of them, some minutes on two cores
    python experiments/plans/recipes.py v5p8 rank_sweep
    python experiments/plans/recipes.py --assumed        # compiles nothing: time and dollars of kept plans again

`--assumed` is for after a change of the assumed utilization: plans without a schedule get today's.

Each job is one `python -m gemma4_tpu.plan experiment=…`; its plan.json is kept next to the README (a sweep has one for
each job, `plans/<job>.json`) with a picture of HBM per chip.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma4_tpu.config.load import load
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.markdown import table
from gemma4_tpu.plan import PLAN
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.planning.money import chosen_price, preemptions, usd_estimate
from gemma4_tpu.reporting.memory_bars import plot_hbm
from gemma4_tpu.reporting.plan_rows import band, usd_per_million
from gemma4_tpu.tracking.records import PLAN as PLAN_RECORD
from gemma4_tpu.tracking.records import read_record, write_record

EXPERIMENTS = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- plan: python experiments/plans/recipes.py -->", "<!-- end of plan -->"
GIB = 2**30


@dataclass(frozen=True)
class PlanRecipe:
    """A committed experiment and the jobs that are planned for it."""

    name: str
    base: str
    """Value of `experiment=` that `plan` takes."""
    jobs: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})
    """Label → overrides; one without a label is the recipe itself."""
    runs: int = 1
    """Runs as long as each planned one; 0: the jobs are alternatives."""

    def path(self, label: str) -> Path:
        folder = EXPERIMENTS / self.name
        return folder / "plans" / f"{label.replace(' ', '_')}.json" if label else folder / "plan.json"


TUNED = "plan.rows=87000", "plan.mean_tokens=3500", "plan.p99_tokens=8000"
ANSWERED = (
    "trainer.global_batch_sequences=128", "trainer.microbatches=64", "plan.answer_tokens=3000",
)  # fmt: skip
LONG = "plan.schedule=false", "plan.rows=1000", "plan.mean_tokens=131072", "plan.p99_tokens=131072"

RECIPES = (
    PlanRecipe("v5p8", "v5p8"),
    PlanRecipe("v6e8_qlora", "v6e8_qlora"),
    PlanRecipe("26b_a4b_v5p8", "26b_a4b_v5p8"),
    PlanRecipe("26b_a4b_experts", "26b_a4b_experts"),
    PlanRecipe("12b_v6e1", "12b_v6e1"),
    PlanRecipe("e4b_v6e1", "e4b_v6e1"),
    PlanRecipe(
        "rank_sweep", "v5p8", {f"rank {r}": (f"lora.rank={r}", f"lora.alpha={r}") for r in (16, 32, 64, 128)}, 2
    ),
    PlanRecipe("lr_sweep", "v5p8", {"each trial": ()}, 8),
    PlanRecipe(
        "mesh_sweep",
        "v5p8",
        {
            f"tp {tp}, {microbatches} microbatches": (
                "mesh=auto", f"mesh.tp={tp}", "trainer.global_batch_sequences=4",
                f"trainer.microbatches={microbatches}", "trainer.max_updates=20", "trainer.epochs=null",
                "optimizer.warmup_updates=0",
            )
            for tp, microbatches in ((4, 4), (4, 2), (4, 1), (2, 2), (2, 1), (1, 1))
        },
    ),
    PlanRecipe(
        "codev_r1_distill_rl",
        "codev_r1_distill_rl",
        {
            "E4B tuned on v6e-4": TUNED,
            "12B tuned on v6e-4": (*TUNED, "model=gemma4_12b", "mesh.tp=4"),
            "E4B from 12B on v6e-4": (
                "objective=distill", "objective.teacher_model=gemma4_12b", *ANSWERED, "trainer.max_updates=200",
            ),
            "E4B by rewards on v6e-4": ("objective=grpo", *ANSWERED, "trainer.max_updates=100"),
            "12B by rewards on v6e-8": (
                "objective=grpo", "model=gemma4_12b", "hardware=v6e8", "mesh.tp=4", *ANSWERED,
                "trainer.max_updates=100",
            ),
        },
        runs=0,
    ),
    PlanRecipe(
        "long_context",
        "long_context",
        {
            "31B on v6e-16": LONG,
            "31B on v5p-16": (*LONG, "hardware=v5p16", "mesh.cp=2"),
            "E4B on v6e-4": (*LONG, "hardware=v6e4", "model=gemma4_e4b", "mesh.cp=2", "mesh.tp=2"),
            "31B on v5p-32": (*LONG, "hardware=v5p32", "trainer.remat=attention"),
        },
        runs=0,
    ),
)  # fmt: skip


def plan(words: list[str], to: Path) -> None:
    """One plan, whether it fits or not."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "plan"
        command = [sys.executable, "-m", "gemma4_tpu.plan", *words, "plan.max_attempts=0", f"run_dir={run_dir}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if not (run_dir / "plan.json").is_file():
            sys.exit(f"{' '.join(words)}: {done.stderr.strip()}")
        to.parent.mkdir(exist_ok=True)
        shutil.copy(run_dir / "plan.json", to)


def assume_again(words: list[str], kept: Path) -> None:
    """Time and dollars of a kept plan without a schedule, by the utilization that is assumed today."""
    told = read_record(kept).values
    if not told["fits"] or told.get("step_seconds"):
        return
    config = load(words, PLAN).root
    low, high = config.plan.utilization_low, config.plan.utilization_high
    shares = {"low": low, "mid": (low + high) / 2, "high": high}
    tokens, updates = told["real_tokens_per_update"], told["updates"]
    each = {end: told["roofline_seconds"]["update"] / share for end, share in shares.items()}
    hours = {end: seconds * updates / 3600 for end, seconds in each.items()}
    usd = usd_estimate(config.hardware, config.plan, config.checkpoint, hours, updates)
    again = {
        "utilization": shares,
        "seconds_per_update": each,
        "real_tokens_per_second": {end: tokens / seconds for end, seconds in each.items()},
        "hours": hours,
        "usd_estimate": usd,
        "usd_per_million_real_tokens": usd["on_demand"]["mid"] / updates / tokens * 1e6,
        "price": chosen_price(config.hardware),
        "preemptions": preemptions(config.plan, config.checkpoint, max(hours.values()), updates),
    }
    write_record(kept, PLAN_RECORD, told | again)


HEADS = (
    "job", "dp × fsdp × tp", "remat", "rows × microbatches", "GiB of HBM per chip", "roofline ms per update",
    "bound by", "schedule ms", "real tokens/s", "updates", "minutes", "$", "$ per million real tokens",
)  # fmt: skip


def section(recipe: PlanRecipe, plans: dict[str, dict[str, Any]]) -> list[str]:
    """The part of the README between the marks."""
    first = next(iter(plans.values()))
    shares = [f"{first['utilization'][end]:.0%}" for end in ("low", "high")]
    versions = f"JAX {first['versions']['jax']}, libtpu {first['versions']['libtpu']}"
    by = "`python -m gemma4_tpu.plan`" if recipe.jobs.keys() == {""} else "`python -m gemma4_tpu.plan` for each job"
    lines = [
        f"*Estimated* by {by} ({versions}); nothing here has run on a TPU. Tokens, minutes and dollars",
        *(
            ("are ranges: the schedule times the band of measured over scheduled time (`docs/planning.md`).",)
            if all(told.get("step_seconds") for told in plans.values() if told["fits"])
            else (f"are ranges: their values at {' and at '.join(shares)} of the binding roofline (assumed).",)
        ),
        "",
    ]
    table_rows = []
    for label, told in plans.items():
        mesh = MeshSizes.recorded(told["mesh"]).product
        rows = f"{told['rows_per_update'] // told['microbatches']} × {told['microbatches']}"
        limit = f"{told['hbm_limit_bytes_per_chip'] / GIB:.2f}"
        cells = [label or "the run", mesh, f"`{told['remat']}`", rows]
        if not told["fits"]:
            table_rows.append([*cells, f"does not fit {limit}", *["–"] * 8])
            continue
        usd = told["usd_estimate"].get("on_demand")
        million = usd_per_million(told["usd_per_million_real_tokens"], told["seconds_per_update"])
        scheduled = told.get("step_seconds")
        cells += [
            f"{told['hbm_bytes_per_chip'] / GIB:.1f} of {limit}",
            f"{told['roofline_seconds']['update'] * 1e3:,.0f}",
            told["bound_by"],
            f"{scheduled * 1e3:,.0f}" if scheduled else "–",
            band(told["real_tokens_per_second"]),
            f"{told['updates']:,}",
            band(told["hours"], "{:,.1f}", times=60),
            "no price" if usd is None else band(usd, "{:.2f}"),
            "no price" if million is None else band(million, "{:.3f}"),
        ]
        table_rows.append(cells)
    lines += list(table(HEADS, table_rows, "lllllrlrrrrrr"))[:-1]
    fitting = [told for told in plans.values() if told["fits"]]
    prices = [told["usd_estimate"].get("on_demand") for told in fitting]
    if recipe.runs and recipe.jobs.keys() != {""} and all(prices):
        hours, usd = ({end: recipe.runs * sum(one[end] for one in values) for end in ("low", "high")}
                      for values in ([told["hours"] for told in fitting], prices))  # fmt: skip
        times = f", each job {recipe.runs} times" if recipe.runs > 1 else ""
        lines += [
            "",
            f"The whole sweep{times}: {band(hours, '{:.1f}')} h, ${band(usd, '{:.2f}')}, if no job stops early.",
        ]
    return [*lines, "", "![HBM per chip](hbm.png)"]


def main() -> None:
    """Plans the recipes that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *(recipe.name for recipe in RECIPES)])
    parser.add_argument("--assumed", action="store_true", help="compile nothing: kept plans, today's utilization")
    arguments = parser.parse_args()
    names = arguments.names
    for recipe in RECIPES:
        if names and recipe.name not in names:
            continue
        for label, words in recipe.jobs.items():
            again = assume_again if arguments.assumed else plan
            again([f"experiment={recipe.base}", *words], recipe.path(label))
            print(recipe.name, label, flush=True)
        plans = {label: read_record(recipe.path(label)).values for label in recipe.jobs}
        folder = EXPERIMENTS / recipe.name
        plot_hbm([PlanResult(**told) for told in plans.values()], folder / "hbm.png")
        readme = folder / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        readme.write_text("\n".join([before + BEGIN, *section(recipe, plans), END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
