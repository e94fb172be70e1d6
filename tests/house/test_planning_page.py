"""docs/planning.md: its figures are those of the committed plans, its assumptions those of the code."""

import json
import re

import pytest

from gemma4_tpu.planning import calibration, kept_programs
from tests.house.scripts import ROOT

PAGE = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
EXPERIMENTS = ROOT / "experiments"
PLANS = {
    "31B, v5p-8, one row": "plans/results/gemma4_31b_v5p8_lora_fsdp1_tp4.json",
    "31B, v6e-4, one row": "plans/results/gemma4_31b_v6e4_lora_fsdp1_tp4.json",
    "26B-A4B, v5p-8, two rows": "plans/results/gemma4_26b_a4b_v5p8_lora_fsdp2_tp2.json",
    "26B-A4B, v5p-8, four rows": "plans/results/gemma4_26b_a4b_v5p8_lora_dp4_fsdp1_tp1.json",
    "the same with adapters on the experts": "26b_a4b_experts/plan.json",
    "12B, v6e-1, one row, remat `decoder`": "12b_v6e1/plan.json",
    "E4B, v6e-1, one row": "e4b_v6e1/plan.json",
    "E2B, v6e-4, two rows": "plans/results/gemma4_e2b_v6e4_lora_dp2_fsdp1_tp2.json",
}
"""Row of the table of schedules → its plan."""
COLUMNS = (
    ["base_products"],
    ["lora"],
    ["attention", "attention_glue"],
    ["elementwise", "optimizer"],
    ["collectives_exposed"],
)


def read(path):
    return json.loads((EXPERIMENTS / path).read_text(encoding="utf-8"))


def shown(seconds):
    return f"{seconds * 1000:.0f}" if seconds else "–"


@pytest.mark.parametrize("run", PLANS)
def test_schedules_are_those_of_the_plans(run):
    plan = read(PLANS[run])
    parts = [shown(sum(plan["step_parts"].get(part, 0) for part in column)) for column in COLUMNS]
    cells = [f"{shown(plan['step_seconds'])} ms", f"{plan['utilization']['schedule_compute']:.0%}", *parts]
    assert re.search(rf"^\| {re.escape(run)} \| [^|]+ \| {re.escape(' | '.join(cells))} \|$", PAGE, re.MULTILINE)


def test_figures_in_the_text_are_those_of_the_plans():
    page = " ".join(PAGE.split())
    told = [
        plan["utilization"]
        for path in EXPERIMENTS.glob("plans/results/*.json")
        if (plan := read(path)).get("step_parts")
    ]
    assert f"reach {min(one['low'] for one in told):.0%} to {max(one['high'] for one in told):.0%}" in page
    four, sharded = read("v6e8_qlora/plan.json"), read("plans/results/gemma4_31b_v6e8_qlora_fsdp2_tp4.json")
    plain = read("plans/results/gemma4_31b_v6e8_lora_dp2_fsdp1_tp4.json")
    assert f"takes {shown(four['step_seconds'])} ms for two rows" in page
    assert f"and {shown(plain['step_seconds'])} in bfloat16" in page
    decoded, not_decoded = (shown(plan["step_parts"]["elementwise"]) for plan in (four, plain))
    assert f"which decode weights: {decoded} ms instead of {not_decoded}." in page
    exposed = shown(sharded["step_parts"]["collectives_exposed"])
    assert f"it takes {shown(sharded['step_seconds'])}, {exposed} of them in exposed collectives" in page
    dp = read("plans/results/gemma4_31b_v5p32_lora_dp4_fsdp1_tp4.json")
    assert f"takes {shown(dp['step_seconds'])} ms, six more than one row on a v5p-8" in page
    assert round(1000 * dp["step_seconds"]) - round(1000 * read(PLANS["31B, v5p-8, one row"])["step_seconds"]) == 6
    assert f"its {dp['hbm_bytes_per_chip'] / 2**30:.1f} GiB fit" in page


def test_what_is_assumed_is_what_the_code_assumes():
    page, band = " ".join(PAGE.split()), calibration.BAND
    assert f"at {calibration.HBM_REACHED:.0%} of HBM's bandwidth" in page
    assert (
        f"its links × {calibration.LINK_REACHED:.0%} of a link) + {calibration.SYNCHRONOUS_SECONDS * 1e6:g} µs" in page
    )
    assert f"+ {calibration.ASYNCHRONOUS_SECONDS * 1e6:g} µs; the core waits at its end" in page
    assert "at half the peak" in page and calibration.KERNEL_REACHED == 0.5
    assert f"took {band.low} to {band.high} times its schedule" in page
    assert f"at most {kept_programs.KEPT_BYTES // 2**30} GiB" in page
