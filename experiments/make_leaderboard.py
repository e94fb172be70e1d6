"""Writes what was run, planned and quoted: `experiments/README.md`, and the head of each `conf/experiment/*.yaml`.

    python -m experiments.make_leaderboard

Every figure is read from a record next to it: `result.json` and `sweep.csv` of runs, `plan.json` of plans, and
`paper_costs/figures.yaml` for what others published. A test compares the committed files with what this makes.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.plans.recipes import EXPERIMENTS, GIB, RECIPES, PlanRecipe
from gemma4_tpu.markdown import table
from gemma4_tpu.reporting.plan_rows import band
from gemma4_tpu.tracking.records import read_record

CONF = EXPERIMENTS.parent / "conf/experiment"
PAGE = EXPERIMENTS / "README.md"
FIELD = "# Expected "
"""How the lines in a recipe's head begin that are written here."""
INTRODUCTION = """\
# Recipes and results

Each folder is one experiment: a recipe (`conf/experiment/<name>.yaml`), the command, and the result, recorded or
expected. *Measured* is what ran, so far on CPUs with tiny models; *estimated* follows from the TPU compiler's schedule
or, for plans without one, from the roofline; *quoted* is what others published. **Nothing here has run on a TPU yet.**

Made by `python -m experiments.make_leaderboard` from the records in these folders. To add a row, commit the record:
[how](../docs/records.md#experiments)."""


@dataclass(frozen=True)
class PlannedRecipe:
    """All runs of a recipe, as planned."""

    slice: str
    runs: int
    minutes: dict[str, float]
    """At `low` and `high`, of all runs."""
    usd: dict[str, float] | None
    hbm_gib: float
    """Of the run that takes most, per chip."""
    share_of_roofline: str | None
    """In percent, where a plan has no schedule: assumed."""

    def told(self, sweep: bool) -> str:
        """In words; `sweep`: the recipe is one of several runs."""
        cost = f", ${band(self.usd, '{:.2f}')} on demand" if self.usd else ""
        runs = f" for {self.runs} runs" if self.runs > 1 else " for a run" if sweep else ""
        return f"{band(self.minutes, '{:,.0f}')} minutes{cost}{runs} on a {self.slice}"


def planned(name: str) -> PlannedRecipe | None:
    """From the recipe's committed plans."""
    recipe = next((recipe for recipe in RECIPES if recipe.name == name), PlanRecipe(name, name))
    jobs = list(recipe.jobs) if recipe.runs else list(recipe.jobs)[:1]  # the first of alternatives is the recipe itself
    runs, paths = recipe.runs or 1, [recipe.path(label) for label in jobs]
    plans = [read_record(path).values for path in paths if path.is_file()]
    plans = [plan for plan in plans if plan["fits"]]
    if not plans:
        return None
    usd = [plan["usd_estimate"].get("on_demand") for plan in plans]
    return PlannedRecipe(
        plans[0]["slice"],
        runs * len(plans),
        _sum([plan["hours"] for plan in plans], 60 * runs),
        _sum(usd, runs) if all(usd) else None,
        max(plan["hbm_bytes_per_chip"] for plan in plans) / GIB,
        None if all(plan.get("step_seconds") for plan in plans) else band(plans[0]["utilization"], times=100),
    )


def _sum(bands: list[dict[str, float]], times: float) -> dict[str, float]:
    return {end: times * sum(one[end] for one in bands) for end in ("low", "high")}


@dataclass(frozen=True)
class Ran:
    """A run that is recorded."""

    what: str
    updates: int
    first: float | None
    last: float
    """Held-out loss in nats per target token, before training and at its best."""
    seconds: float
    machine: str
    day: str

    @property
    def losses(self) -> str:
        return f"{self.first:.4f} → {self.last:.4f}" if self.first is not None else f"{self.last:.4f}"


def ran(name: str) -> Ran | None:
    """From the experiment's own `result.json`, or the best of its `sweep.csv`."""
    folder = EXPERIMENTS / name
    if (folder / "result.json").is_file():
        values = read_record(folder / "result.json").values
        about = read_record(folder / "provenance.json").values
        hardware = about["hardware"]
        machine = f"{hardware['cores']} CPU cores" if hardware["kind"] == "cpu" else hardware["slice"]
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return Ran(f"`model={config['model']['name']}`", *_figures(values), machine, about["started"][:10])
    if (folder / "sweep.csv").is_file():
        with (folder / "sweep.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        done = [row for row in rows if row["status"] == "finished"]
        best = min(done, key=lambda row: float(row["heldout_loss_best"]))
        swept = list(best)[1 : list(best).index("status")]
        what = f"best of {len(done)} finished runs of {len(rows)}: " + ", ".join(f"`{k}={best[k]}`" for k in swept)
        return Ran(what, *_figures(best), "see its page", "")
    return None


def _figures(values: dict[str, Any]) -> tuple[int, float | None, float, float]:
    first = values.get("heldout_loss_first")
    return int(values["updates"]), first, float(values["heldout_loss_best"]), float(values["seconds"])


def names() -> list[str]:
    """Of all recipes."""
    return sorted(path.stem for path in CONF.glob("*.yaml"))


def head(name: str) -> list[str]:
    """The lines about expectations in a recipe's head."""
    result, plan = ran(name), planned(name)
    own = result if (EXPERIMENTS / name / "result.json").is_file() else None  # a sweep.csv is of a smaller sibling
    lines = []
    if own is not None:
        where = f"experiments/{name}/result.json, {own.day}"
        lines.append(f"loss: held-out {own.losses} nats per target token (measured: {where}).")
    else:
        lines.append("loss: nothing recorded yet.")
    if plan is not None:
        share = plan.share_of_roofline
        by = f"{share}% of the roofline" if share else "the compiler's schedule"
        sweep = "sweeper:" in (CONF / f"{name}.yaml").read_text(encoding="utf-8")
        lines.append(f"time and cost: {plan.told(sweep)} (estimated by {by}: experiments/{name}).")
    elif own is not None:
        lines.append(f"time and cost: {own.seconds:,.0f} s on {own.machine} (measured, with the loss); no cost.")
    else:
        lines.append("time and cost: not planned yet.")
    return [FIELD + line for line in lines]


def with_head(name: str, text: str) -> str:
    """A recipe with these lines at the end of its first comments."""
    lines = [line for line in text.splitlines() if not line.startswith(FIELD)]
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join([*lines[:end], *head(name), *lines[end:]]) + "\n"


def page() -> str:
    """`experiments/README.md`."""
    results = {name: found for name in _folders() if (found := ran(name))}
    plans = {name: found for name in _folders() if (found := planned(name))}
    measured = [
        [
            _link(name),
            one.what,
            f"{one.updates:,}",
            one.losses,
            f"{one.seconds:,.0f}",
            ", ".join(filter(None, (one.machine, one.day))),
        ]
        for name, one in results.items()
    ]
    estimated = [
        [
            _link(name), one.slice, str(one.runs), f"{one.hbm_gib:.1f}", band(one.minutes),
            band(one.usd, "{:.2f}") if one.usd else "no price", "roofline" if one.share_of_roofline else "schedule",
        ]
        for name, one in plans.items()
    ]  # fmt: skip
    paper = yaml.safe_load((EXPERIMENTS / "paper_costs/figures.yaml").read_text(encoding="utf-8"))
    quoted = [
        [one["name"], one["slice"], one["model"], str(one["lora_rank"]), f"{one['hours']}",
         f"{one['real_tokens_per_second']:,}"]
        for one in paper["trainings"]
    ]  # fmt: skip
    heads = ("experiment", "run", "updates", "held-out loss", "seconds", "where, when")
    lines = [INTRODUCTION, "", "## Measured, on CPUs", ""]
    lines += ["Held-out loss before training (where recorded) and at its best, in nats per target token.", ""]
    lines += table(heads, measured, "llrlrl")
    lines += ["## Estimated, for TPUs", "", "Dollars on demand; a sweep is the sum of its runs.", ""]
    lines += table(
        ("experiment", "slice", "runs", "GiB of HBM per chip", "minutes", "$", "by"), estimated, "llrrrrl"
    )  # fmt: skip
    lines += ["Every size on every slice: [plans](plans/README.md).", "", "## Quoted", ""]
    source = paper["source"].replace("paper ", "", 1)
    lines += [f"LoRA on 9,959 Verilog examples, one epoch; from {source}.", ""]
    lines += table(("run", "slice", "model", "rank", "hours", "real tokens/s"), quoted, "lllrrr")
    lines += [
        "Their recipes, kept runnable: [on TPU](paper_v5p8/README.md), [on GPU](gpu_baseline_h100x2/README.md); their",
        "dollars: [costs](paper_costs/README.md); their throughputs compared with the",
        "hardware's limits: [plausibility](plausibility/README.md); published step times next to ours:",
        "[calibration](calibration/README.md).",
    ]
    return "\n".join(lines) + "\n"


def _folders() -> list[str]:
    return sorted(path.parent.name for path in EXPERIMENTS.glob("*/README.md"))


def _link(name: str) -> str:
    return f"[{name}]({name}/README.md)"


def made() -> dict[Path, str]:
    """Path → what is in it."""
    recipes = {CONF / f"{name}.yaml": name for name in names()}
    heads = {path: with_head(name, path.read_text(encoding="utf-8")) for path, name in recipes.items()}
    return {PAGE: page(), **heads}


if __name__ == "__main__":
    for each, content in made().items():
        each.write_text(content, encoding="utf-8")
