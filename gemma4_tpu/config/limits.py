"""Choices and ranges of single values, which the types of `schema.py` can't express."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from gemma4_tpu.config.durations import FORMS, seconds_of
from gemma4_tpu.config.keys import did_you_mean

MAX_WEIGHT = 1000
"""Most visits of a row in an epoch."""

CHOICES: dict[str, tuple[str, ...]] = {
    "hardware.flags": ("none", "tuned"),
    "lora.init": ("default", "pissa", "olora"),
    "lora.quantize": ("nf4", "int8", "int8_compute"),
    "data.packing": ("true", "false", "buckets"),
    "data.thoughts": ("drop", "train"),
    "data.train_on": ("all", "last"),
    "objective.kind": ("sft", "dpo", "ipo", "orpo", "grpo", "expert_iteration", "distill", "distill_offline"),
    "objective.divergence": ("reverse", "forward"),
    "rollouts.advantages": ("mean", "std"),
    "optimizer.kind": ("adamw", "adafactor", "lion", "muon", "schedule_free"),
    "optimizer.schedule": ("cosine", "linear", "constant", "wsd"),
    "trainer.remat": ("none", "products", "attention", "decoder", "auto"),  # from most memory to most arithmetic
    "trainer.attention": ("auto", "splash", "chunked", "einsum"),
    "trainer.compute_dtype": ("auto", "bfloat16", "float32"),
    "checkpoint.resume": ("auto", "never"),
    "tracker.kind": ("none", "wandb", "mlflow", "trackio", "tensorboard", "jsonl"),
    "tracker.mode": ("auto", "online", "offline"),
    "export.format": ("merged", "peft", "both", "int8", "fp8", "int8_weight_only", "fp8_weight_only"),
    "export.peft_experts": ("fused", "per_expert"),
    "export.verify": ("true", "stream", "false"),
    "eval.adapter": ("run", "none", "both"),
    "eval.thoughts": ("drop", "train"),
    "eval.compute_dtype": ("auto", "bfloat16", "float32"),
    "eval.judge.sandbox": ("auto", "bubblewrap", "landlock"),
    "bench.arrivals": ("poisson", "fixed"),
    "serving.runner": ("docker", "process", "embedded", "gke"),
    "serving.weight_dtype": ("bfloat16", "fp8", "float32"),
    "serving.kv_cache_dtype": ("auto", "bfloat16", "fp8"),
}

_POSITIVE = (lambda v: 0 < v < math.inf, "a number more than 0")
_FROM_0 = (lambda v: 0 <= v < math.inf, "a number of at least 0")
_FROM_1 = (lambda v: 1 <= v < math.inf, "at least 1")
_DECAY = (lambda v: 0 <= v < 1, "at least 0 and less than 1")
_PART = (lambda v: 0 < v <= 1, "more than 0 and at most 1")
_SHARE = (lambda v: 0 <= v <= 1, "between 0 and 1")


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hardware.usd_per_hour": _FROM_0,
    "mesh.dp": _FROM_1, "mesh.fsdp": _FROM_1, "mesh.tp": _FROM_1, "mesh.cp": _FROM_1,
    "lora.rank": _FROM_1, "lora.expert_rank": _FROM_1, "lora.alpha": _POSITIVE, "lora.dropout": _DECAY,
    "data.heldout_fraction": _DECAY, "data.max_rows": _FROM_1, "data.max_drop_fraction": _SHARE,
    "data.sequence_length": (lambda v: v >= 2, "at least 2"),
    "objective.beta": _POSITIVE, "objective.clip_low": _PART, "objective.clip_high": _POSITIVE,
    "objective.max_drift": _POSITIVE,
    "rollouts.reward_timeout_seconds": _POSITIVE, "rollouts.prompts": _FROM_1,
    "rollouts.samples": _FROM_1,
    "rollouts.resample": _FROM_1, "rollouts.prompt_tokens": _FROM_1, "rollouts.new_tokens": _FROM_1,
    "rollouts.slots": _FROM_1, "rollouts.off_policy": _FROM_0,
    "rollouts.overlong_tokens": _FROM_0, "rollouts.overlong_penalty": _FROM_0,
    "rollouts.validation_prompts": _FROM_0, "rollouts.validation_every": _FROM_1, "rollouts.check_every": _FROM_1,
    "rollouts.max_logprob_difference": _POSITIVE, "rollouts.max_kl": _POSITIVE,
    "rollouts.entropy_low": _SHARE, "rollouts.entropy_high": _FROM_1, "rollouts.max_malformed": _FROM_0,
    "objective.teacher_top": _FROM_1,
    "objective.label_smoothing": (lambda v: 0 <= v < 0.5, "at least 0 and less than 0.5"),
    "optimizer.learning_rate": _POSITIVE, "optimizer.b1": _DECAY, "optimizer.b2": _DECAY, "optimizer.eps": _POSITIVE,
    "optimizer.decay_rate": _POSITIVE, "optimizer.clipping_threshold": _FROM_1, "optimizer.beta": _DECAY,
    "optimizer.ns_steps": _FROM_1, "optimizer.consistent_rms": _POSITIVE,
    "optimizer.weight_decay": _FROM_0, "optimizer.warmup_updates": _FROM_0, "optimizer.end_fraction": _SHARE,
    "optimizer.warmup_fraction": _SHARE, "optimizer.decay_fraction": _PART,
    "optimizer.max_grad_norm": (lambda v: v > 0, "more than 0 (null: off)"),
    "trainer.max_updates": _FROM_1, "trainer.epochs": _POSITIVE, "trainer.global_batch_tokens": _FROM_1,
    "trainer.global_batch_sequences": _FROM_1, "trainer.microbatches": _FROM_1, "trainer.eval_every": _FROM_0,
    "trainer.seed": (lambda v: 0 <= v < 2**32, "at least 0 and less than 2**32"),
    "trainer.sample_prompts": _FROM_0, "trainer.sample_tokens": _FROM_1,
    "trainer.log_every": _FROM_1, "trainer.loss_chunk_tokens": _FROM_1,
    "trainer.spike_factor": (lambda v: 1 < v < math.inf, "more than 1 (null: off)"),
    "trainer.ema_decay": (lambda v: 0 < v < 1, "more than 0 and less than 1 (null: off)"),
    "trainer.patience": _FROM_1, "trainer.min_delta": _FROM_0,
    "storage.deadline": (lambda v: (seconds_of(v) or 0) > 0, f"a time of more than 0: {FORMS}"),
    "trainer.time_limit": (lambda v: (seconds_of(v) or 0) > 0, f"a time of more than 0: {FORMS}"),
    "trainer.stall_seconds": _POSITIVE,
    "distributed.num_processes": _FROM_1, "distributed.process_id": _FROM_0,
    "checkpoint.every": _FROM_1, "checkpoint.keep": _FROM_1,
    "plan.rows": _FROM_1, "plan.mean_tokens": _FROM_1, "plan.p99_tokens": _FROM_1, "plan.answer_tokens": _FROM_1,
    "plan.utilization_low": _PART, "plan.utilization_high": _PART, "plan.max_attempts": _FROM_0,
    "plan.max_candidates": _FROM_1, "plan.parallel": _FROM_1, "plan.search_schedules": _FROM_1,
    "plan.hours_between_preemptions": _POSITIVE, "plan.restart_minutes": _FROM_0,
    "eval.max_problems": _FROM_1, "eval.n": _FROM_1, "eval.temperature": _FROM_0,
    "eval.top_p": (lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    "eval.max_new_tokens": _FROM_1, "eval.batch_size": _FROM_1, "eval.concurrency": _FROM_1, "eval.retries": _FROM_0,
    "eval.seed": (lambda v: 0 <= v < 2**32, "at least 0 and less than 2**32"),
    "eval.request_timeout_seconds": _POSITIVE,
    "eval.stimulus_seed": (lambda v: 0 <= v < 2**32, "at least 0 and less than 2**32"),
    "eval.answers.extract": (_is_pattern, "a regular expression"), "eval.lm_eval.shots": _FROM_0,
    "eval.columns": (lambda v: {*v} <= {"lint", "size"}, "a list of lint and size"),
    "eval.judge.workers": _FROM_1, "eval.judge.cpu_seconds": _FROM_1, "eval.judge.file_mib": _FROM_1,
    "eval.judge.output_kib": _FROM_1,
    "eval.judge.memory_mib": (lambda v: v >= 128, "at least 128, which the simulator itself needs"),
    "bench.shared_tokens": _FROM_0, "bench.turns": _FROM_1,
    "bench.requests": _FROM_1, "bench.warmup_requests": _FROM_0, "bench.temperature": _FROM_0,
    "bench.seed": (lambda v: 0 <= v < 2**32, "at least 0 and less than 2**32"),
    "bench.max_model_len": _FROM_1, "bench.request_timeout_seconds": _POSITIVE,
    "serving.tensor_parallel_size": _FROM_1, "serving.data_parallel_size": _FROM_1, "serving.max_model_len": _FROM_1,
    "serving.max_num_seqs": _FROM_1, "serving.max_num_batched_tokens": _FROM_1, "serving.gpu_memory_utilization": _PART,
    "port": (lambda v: 0 <= v <= 65535, "between 0 and 65535"),
    "serving.port": (lambda v: 1 <= v <= 65535, "between 1 and 65535"), "serving.shm_size_gib": _FROM_1,
    "serving.ready_timeout_seconds": _POSITIVE,
    "serving.gke.min_replicas": _FROM_1, "serving.gke.max_replicas": _FROM_1, "serving.gke.waiting_requests": _FROM_1,
    "eval.judge.processes": (lambda v: v >= 8, "at least 8, which the compiler itself needs"),
}  # fmt: skip


def limit_problems(root: Any, more: Mapping[str, tuple[str, ...]] | None = None) -> list[str]:
    """One message for each value of a root configuration that is not a choice or is out of range.

    Args:
      root: the configuration.
      more: choices from a package's own table, such as its benchmarks.
    """
    messages = []
    for key, choices in {**(more or {}), **CHOICES}.items():
        value = _get(root, key)
        if value is not None and value not in choices:
            hint = did_you_mean(str(value), choices, (key + "={}").format)
            messages.append(f"{key}={value}: not a choice{hint} (choices: {', '.join(choices)})")
    for key, (fits, wanted) in RANGES.items():
        value = _get(root, key)
        if value is not None and not fits(value):
            messages.append(f"{key}={value}: must be {wanted}")
    return messages


def _get(root: Any, key: str) -> Any:
    """The value of a key; None if this entry point does not have the group."""
    value = root
    for name in key.split("."):
        value = getattr(value, name, None)
    return value
