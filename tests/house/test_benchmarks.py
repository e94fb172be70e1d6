"""Tables that are made of the figures that are kept: every size on every slice, and the step against its targets."""

import numpy as np
import pytest

from benchmarks import slices, step, targets
from gemma4_tpu.planning.kernels import Mask

GIB = 2**30


@pytest.fixture
def plan():
    """A plan of ours: 8 GFLOP, 2 MB per real token and chip, 4 ms."""
    return {
        "fits": True, "mesh": {"dp": 1, "fsdp": 1, "tp": 4}, "hbm_limit_bytes_per_chip": 31 * GIB,
        "hbm_bytes_per_chip": 20 * GIB, "flops_per_real_token_and_chip": 8e9,
        "hbm_traffic_bytes_per_real_token_and_chip": 2e6, "real_tokens_per_update": 4000.0,
        "roofline_seconds": {"update": 4e-3},
    }  # fmt: skip


def test_ratios_are_per_real_token(plan):
    recipe = {
        "fits": True, "mesh": {"fsdp": 1, "tp": 4}, "hbm_bytes_per_chip": 10 * GIB, "real_tokens": 1000.0,
        "flops": 918e12 * 8e-3, "hbm_traffic_bytes": 1e10, "collectives": {},
    }  # fmt: skip
    line = slices._row("gemma4_31b", "v6e-4", plan, recipe)
    # 8 ms at v6e's peak for 1,000 tokens beside 4 ms for 4,000: eight times as long per token
    assert line[6:] == ["7.34", "8.00", "0.9×", "10.0", "2.00", "5.0×", "8.0×", "–", "–", "–"]
    assert line[:6] == ["31b", "v6e-4", "1 × 1 × 4, 1 × 1 × 4", "10.0", "20.0", "31.0"]


def test_a_step_that_does_not_fit_has_no_ratio(plan):
    recipe = {"fits": False, "mesh": {"fsdp": 1, "tp": 4}, "hbm_bytes_per_chip": 40 * GIB, "message": "OutOfMemory"}
    line = slices._row("gemma4_31b", "v6e-4", plan, recipe)
    assert line[3:5] == ["**does not fit** 40.0", "20.0"] and line[6:] == ["–", "8.00", "–", "–", "2.00", *["–"] * 5]


def test_every_cell_that_is_kept_has_its_line():
    cells = [(size, machine) for size in slices.SIZES for machine in slices.MACHINES]
    kept = sum(slices.path_of(cell).is_file() for cell in cells)
    assert len(slices.rows()) == kept


def test_a_step_is_compared_with_its_target_as_that_counts():
    """Per row; what is missing and what is over says so."""
    plan = {"step_seconds": 0.8, "rows_per_update": 2, "flops_per_real_token_and_chip": 0.0338e12,
            "real_tokens_per_update": 8000.0, "utilization": {"schedule_compute": 0.35}}  # fmt: skip
    plans = {("gemma4_31b", "v5p-8"): plan, ("gemma4_26b_a4b", "v5p-8"): plan}
    told = {line[0]: line[2:] for line in targets.verdicts(plans)}
    assert told["31b on a v5p-8, ms per row"] == ["400", "**met**"]
    assert told["26b_a4b on a v5p-8, ms per row"] == ["400", "not met: 220% over"]
    assert told["26b_a4b on a v5p-8, share of the peak FLOP/s"] == ["35%", "**met**"]
    assert told["31b on a v6e-4, ms per row"] == ["–", "not compiled to the end"]
    assert told["31b on a v5p-8, TFLOP per real token and chip"][1] == "**met**"


def test_attention_skips_what_belongs_to_other_examples():
    """Four examples of two blocks each: within the causal half of 8 × 8 blocks, 3 of 36 for each."""
    row = np.full(4, 1024)
    fill = step.packed_fill(row, [row])
    mask = Mask(window=None, block_q=512, block_kv=512)
    assert fill.share_visited(mask, 4096) == pytest.approx(12 / 36)
