"""The shapes of records, by kind: what their writers write, as far as anything reads it.

A key is needed if every version has written it and something relies on it. `tests/tracking/test_shapes.py` compares
them with the dataclasses that are written.
"""

from __future__ import annotations

import math
from typing import Any

from gemma4_tpu.tracking.typed import (
    AMOUNT,
    ANYTHING,
    COUNT,
    FINITE,
    FLAG,
    NUMBER,
    POSITIVE,
    TEXT,
    WHOLE,
    Shape,
    both,
    choice,
    each,
    either,
    fields,
    known,
    leaf,
    listed,
    maybe,
    of_one,
    when,
)

_FIGURE, _SECONDS = maybe(NUMBER), maybe(AMOUNT)
_MAPPING = each(ANYTHING)
_ENDED = of_one(maybe(TEXT), "status error")


def _unless_failed(shape: Shape) -> Shape:
    """Work that failed says only why."""
    return when(lambda values: values.get("status") == "failed", known(**_ENDED), shape)


# ── training ───────────────────────────────────────────────────────────────────────────────────────────────────────

_UNFINISHED = known(
    status=TEXT, measures=each(NUMBER), **of_one(maybe(TEXT), "ended error predicted_by"),
    **of_one(AMOUNT, "seconds timed_seconds overhead_seconds"),
    **of_one(COUNT, "updates skipped_updates real_tokens target_tokens slots timed_tokens"),
    **of_one(maybe(COUNT), "heldout_update_best lora_parameters in_full_parameters adapted_modules hbm_peak_bytes"),
    **of_one(_FIGURE, "train_loss_first train_loss_last heldout_loss_first heldout_loss_last heldout_loss_best fill"
             " goodput mfu"),
    **of_one(_SECONDS, "real_tokens_per_second update_seconds update_seconds_predicted measured_over_predicted"
             " measured_over_predicted_low measured_over_predicted_high usd"),
)  # fmt: skip
_TRAINED = fields({"status": TEXT, "seconds": AMOUNT, **of_one(COUNT, "updates real_tokens target_tokens")})


def _together(first: str, *others: str) -> Shape:
    """Figures that are known if the first one is."""
    return when(lambda values: values.get(first) is not None, fields(of_one(NUMBER, " ".join(others))))


TRAINING: Shape = both(
    _UNFINISHED, fields({"status": TEXT}),
    when(lambda values: values["status"] == "failed", _MAPPING, _TRAINED),
    _together("measured_over_predicted", "measured_over_predicted_low", "measured_over_predicted_high"),
)  # fmt: skip
DATA: Shape = known(**of_one(maybe(known(
    **of_one(_FIGURE, "examples real_tokens target_tokens"), length_tokens=each(_FIGURE),
    dropped=maybe(each(fields({"count": COUNT, "meaning": TEXT}))),
)), "train heldout"))  # fmt: skip
PROVENANCE: Shape = known(
    **of_one(TEXT, "started python platform host"), command=listed(TEXT),
    code=known(sha256=TEXT, git_commit=maybe(TEXT), git_dirty=maybe(FLAG)),
    hardware=known(**of_one(TEXT, "slice kind xla_flags libtpu_init_args"), devices=COUNT), seeds=_MAPPING,
    packages=_MAPPING, fingerprints=maybe(known(**of_one(TEXT, "base start"))), resumed=listed(_MAPPING),
)  # fmt: skip
_POLICY = fields({"update": COUNT}, of_one(NUMBER, "reward mean_tokens entropy malformed"))
CERTIFICATE: Shape = fields({
    "holds": FLAG, "broken": listed(TEXT), **of_one(COUNT, "updates adapters"), "max_loss_error": _FIGURE,
    "compared": both(
        fields({"updates": listed(COUNT), "tokens": COUNT}),
        when(lambda values: values["tokens"], fields(
            of_one(NUMBER, "mean_difference limit max_difference surprise_z surprise_limit"))),
    ),
    "groups": fields(of_one(COUNT, "live dead")), "answers": fields(of_one(COUNT, "answers distinct truncated")),
    "by_kind": each(fields({"answers": COUNT, "mean_reward": NUMBER})),
    "kl": both(fields(of_one(_FIGURE, "mean max")), _together("max", "mean")),
    "first": _POLICY, "last": _POLICY,
}, {"max_lag": COUNT})  # fmt: skip
REPLAY: Shape = known(losses=_MAPPING, differences=each(listed(TEXT)))

NUMBERED: Shape = fields({"update": COUNT})
"""Rows of any file that belong to an update."""
METRICS: Shape = both(NUMBERED, each(_FIGURE))
VALIDATED: Shape = both(
    fields({"update": COUNT, "reward": NUMBER, "rewards": listed(NUMBER)}, of_one(NUMBER, "difference low high")),
    when(lambda row: "difference" in row or "low" in row, fields(of_one(NUMBER, "difference low high"))),
)  # fmt: skip
SAMPLED: Shape = both(
    NUMBERED, known(**{
        **of_one(NUMBER, "loss expected_loss allowed_error kl"), "adapter": TEXT, "lag": COUNT,
        "compared": fields({"tokens": COUNT, **of_one(NUMBER, "mean_difference max_difference surprise variance")}),
        "kinds": each(listed(NUMBER)), "delivered": FLAG, **of_one(NUMBER, "reward malformed"),
    }),
    when(lambda row: "answers" in row, fields({
        **of_one(COUNT, "answers distinct truncated tokens live dead"), **of_one(NUMBER, "mean_tokens entropy"),
        "delivered": FLAG, "adapter": TEXT,
    })),
    when(lambda row: "expected_loss" in row, fields(of_one(NUMBER, "loss allowed_error"))),
)  # fmt: skip
"""Rows of `certificate.json`."""

# ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_ENDS = fields(of_one(AMOUNT, "low high"), {"mid": AMOUNT})
_MIDDLE = fields(of_one(POSITIVE, "low mid high"))
_AMOUNTS = each(AMOUNT)
_PHASE = fields({
    **of_one(AMOUNT, "hbm_bytes_per_chip hbm_traffic_bytes_per_chip roofline_seconds"), "bound_by": TEXT,
    "collective_bytes_per_chip": _AMOUNTS,
}, {"schedule_seconds": AMOUNT})  # fmt: skip
_ROLLOUTS = when(lambda told: told and "misfit" not in told, fields({
    **of_one(AMOUNT, "decoding_steps answer_tokens kv_cache_bytes_per_chip"), "phases": each(_PHASE),
    "seconds": fields({"mid": _AMOUNTS}),
}, {"idle_slots": AMOUNT}))  # fmt: skip
_PLANNED = fields({
    "fits": FLAG, **of_one(TEXT, "slice model trained remat"),
    "mesh": both(fields(of_one(COUNT, "fsdp tp")), each(COUNT)),
    **of_one(COUNT, "chips sequence_length rows_per_update microbatches"), "hbm_limit_bytes_per_chip": POSITIVE,
    "hbm_bytes_per_chip": _SECONDS, "lora_rank": maybe(COUNT),
}, {
    **of_one(TEXT, "objective flags data message"), **of_one(maybe(TEXT), "teacher bound_by"),
    **of_one(_AMOUNTS, "hbm_parts_bytes_per_chip flops_parts_per_chip attention_blocks_visited roofline_seconds"
             " step_parts utilization seconds_per_update real_tokens_per_second hours preemptions"),
    "cost_analysis": each(NUMBER),  # XLA's, which counts −1 for what it does not know
    **of_one(_SECONDS, "flops_per_chip analytic_flops_per_chip flops_over_analytic hbm_traffic_bytes_per_chip"
             " hbm_read_again_bytes_per_chip bytes_accessed_per_chip flops_per_real_token_and_chip"
             " hbm_traffic_bytes_per_real_token_and_chip bytes_accessed_per_real_token_and_chip"
             " real_tokens_per_update fill step_seconds step_seconds_low step_seconds_high lowering_seconds"
             " usd_per_million_real_tokens compile_seconds"),
    "collectives": each(_AMOUNTS), "updates": maybe(COUNT), "step_band": _MAPPING, "rollouts": _ROLLOUTS,
    "top_operations": listed(_MAPPING), "usd_estimate": each(_ENDS), "not_counted": listed(TEXT),
    "price": known(usd_per_hour=maybe(AMOUNT), **of_one(maybe(TEXT), "date source kind region")),
    "compiled_before": FLAG, "alternatives": listed(_MAPPING), **of_one(_MAPPING, "estimated_by versions"),
})  # fmt: skip
_FITTING = fields({
    **of_one(POSITIVE, "flops_per_chip analytic_flops_per_chip hbm_traffic_bytes_per_chip bytes_accessed_per_chip"
             " real_tokens_per_update flops_over_analytic"), "fill": POSITIVE, "updates": COUNT,
    "flops_parts_per_chip": fields(of_one(AMOUNT, "matmul kernel")), "hbm_parts_bytes_per_chip": _AMOUNTS,
    "collectives": each(fields(of_one(AMOUNT, "count bytes"))), "data": TEXT, "bound_by": TEXT,
    "roofline_seconds": fields(of_one(AMOUNT, "compute hbm interconnect")), "utilization": _ENDS,
    **of_one(_MIDDLE, "seconds_per_update real_tokens_per_second hours"), **of_one(_MAPPING, "usd_estimate price"),
    **of_one(AMOUNT, "lowering_seconds compile_seconds"),
}, {"preemptions": when(bool, fields({"expected": AMOUNT}))})  # fmt: skip
_SCHEDULED = fields({
    "step_seconds": POSITIVE, "step_band": fields(of_one(POSITIVE, "low high")),
    "step_parts": fields({"collectives_hidden": AMOUNT}),
    "utilization": fields(of_one(AMOUNT, "schedule_compute schedule_hbm schedule_interconnect")),
})  # fmt: skip
_PRICED = fields({"price": fields({"usd_per_hour": AMOUNT, "source": TEXT})})
PLAN: Shape = both(
    _PLANNED, when(lambda plan: plan["fits"], both(
        _FITTING, when(lambda plan: plan.get("step_seconds") is not None, _SCHEDULED),
        when(lambda plan: plan.get("usd_per_million_real_tokens") is not None, _PRICED),
    )),
)  # fmt: skip

# ── after training ─────────────────────────────────────────────────────────────────────────────────────────────────

MERGE: Shape = _unless_failed(known(
    **_ENDED, **of_one(maybe(COUNT), "update changed_weights"), seconds=_SECONDS, targets=maybe(each(TEXT)),
    parity=maybe(known(passed=maybe(FLAG), logits=maybe(fields({
        **of_one(NUMBER, "merged_to_lora rounded_to_lora base_to_lora top1_agreement"), "dtype": TEXT, "tokens": COUNT,
    })))),
    quantised=maybe(fields({"scheme": TEXT, "mean_error": NUMBER}, {"logits": maybe(fields({
        **of_one(NUMBER, "max_logprob_difference mean_logprob_difference top1_agreement"), "tokens": COUNT,
    }))})),
))  # fmt: skip
_PROBLEM = both(
    fields({"n": leaf("a count above 0", lambda n: COUNT(n, "") is None and n > 0), **of_one(COUNT, "passed truncated"),
            "official": maybe(COUNT), "classes": each(COUNT)},
           {"confirmed": maybe(COUNT), "category": maybe(TEXT)}),
    lambda problem, key: next((
        f"{key}.{name} is {problem[name]}, more than the {problem['n']} samples"
        for name in ("passed", "official", "confirmed") if (problem.get(name) or 0) > problem["n"]), None),
)  # fmt: skip
EVALUATION: Shape = _unless_failed(fields({
    **of_one(TEXT, "name benchmark"), "settings": _MAPPING,
    "problems": both(each(_PROBLEM), leaf("a problem or more", bool)),
}, {
    **_ENDED, **of_one(maybe(COUNT), "tokens"), **of_one(_SECONDS, "generation_seconds judging_seconds"),
    "selfcheck": _MAPPING, "cannot_pass": each(TEXT), "vacuous": each(listed(TEXT)), "benches": listed(TEXT),
    "second": known(disagreements=listed(fields({"second": TEXT}))), "answers": _MAPPING,
}))  # fmt: skip
HARNESS: Shape = _unless_failed(fields({
    **of_one(TEXT, "model lm_eval"), "settings": _MAPPING,
    "tasks": each(fields({
        "version": TEXT, "documents": maybe(COUNT), "shots": maybe(COUNT),
        "metrics": each(fields({"value": NUMBER, "stderr": maybe(NUMBER), "higher_is_better": maybe(FLAG)})),
    })),
}, {**_ENDED, "seconds": _SECONDS}))  # fmt: skip


def _probe(value: Any, key: str) -> str | None:
    """What a probe says; with adapters, what each one's says."""
    one = when(lambda probe: isinstance(probe.get("told"), dict | None), each(_probe), fields({"told": TEXT}))
    return maybe(one)(value, key)


SERVING: Shape = known(
    **_ENDED, slice=TEXT, **of_one(_SECONDS, "ready_seconds served_seconds"), probe=_probe,
    **of_one(maybe(TEXT), "endpoint model folder"),
)  # fmt: skip
LOAD_TEST: Shape = known(**_ENDED, **of_one(_SECONDS, "peak_output_throughput"), peak_cell=maybe(TEXT))
_RATE = leaf("a number above 0, or inf", lambda rate: rate in (None, "inf", math.inf) or POSITIVE(rate, "") is None)
LATENCIES = " ".join(f"{one}_{name}_ms" for one in ("median", "p99") for name in ("ttft", "tpot", "itl", "e2el"))
CELL: Shape = both(
    known(
        **of_one(TEXT, "state reason cell"), **of_one(COUNT, "attempt completed failed"),
        max_concurrency=maybe(POSITIVE), request_rate=_RATE,
        **of_one(_SECONDS, f"{LATENCIES} total_input_tokens total_output_tokens output_throughput"),
    ),
    when(lambda cell: "completed" in cell or cell.get("state") in ("ok", "overloaded"), fields(
        of_one(COUNT, "completed total_input_tokens total_output_tokens") | {"output_throughput": AMOUNT})),
)  # fmt: skip
SWEEP: Shape = fields({
    "entry": TEXT,
    "jobs": listed(fields({"name": TEXT, "values": each(TEXT), "words": listed(TEXT)}, {
        "status": TEXT, **of_one(COUNT, "starts restarts"), "pid": maybe(WHOLE), **of_one(maybe(TEXT), "error plan"),
    })),
}, {"metric": maybe(TEXT), "direction": maybe(choice("minimize", "maximize"))})  # fmt: skip
STIMULUS: Shape = fields({"seed": WHOLE})

# ── config.yaml ────────────────────────────────────────────────────────────────────────────────────────────────────

CONFIG: Shape = known(
    hardware=known(name=TEXT, usd_per_hour=maybe(AMOUNT), region=maybe(TEXT), **of_one(FLAG, "spot flex_start")),
    lora=known(
        **of_one(FLAG, "enabled rslora dora"), rank=COUNT, alpha=FINITE, dropout=FINITE, targets=listed(TEXT),
        expert_rank=maybe(COUNT), layers=maybe(listed(TEXT)), ranks=each(COUNT), modules_to_train=listed(TEXT),
        init=TEXT, quantize=maybe(TEXT), start=maybe(TEXT), start_checkpoint=TEXT,
    ),
    model=maybe(either(TEXT, known(**of_one(maybe(TEXT), "name path")))),
    eval=known(endpoint=maybe(TEXT)),
    serving=maybe(known(
        **of_one(maybe(TEXT), "slice host"), **of_one(TEXT, "weight_dtype kv_cache_dtype"), port=maybe(COUNT),
        data_parallel_size=POSITIVE, flags=maybe(_MAPPING), served_model_name=maybe(TEXT),
    )),
    **of_one(maybe(TEXT), "run served replay slice architecture"), adapters=maybe(listed(TEXT)),
)  # fmt: skip
