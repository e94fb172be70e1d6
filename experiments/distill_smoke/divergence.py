"""How far a run's distribution is from a teacher's on its own answers to held-out prompts, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.forms import CONVERSATIONS
from gemma4_tpu.evals.any_model import find_model
from gemma4_tpu.evals.generate import checkpoint_stop_ids, padded_width
from gemma4_tpu.models.sharding import make_mesh
from gemma4_tpu.rollouts.batch import BatchShape, Placed, assembled
from gemma4_tpu.rollouts.collecting import sample_seed
from gemma4_tpu.rollouts.policy_tasks import of_rows
from gemma4_tpu.rollouts.sampler import Sampler, SamplerShapes, Wanted
from gemma4_tpu.rollouts.scoring import Scorer
from gemma4_tpu.step.distill import Distill
from gemma4_tpu.step.objective import TEACHER
from gemma4_tpu.step.objective_kinds import REVERSE
from gemma4_tpu.step.train_step import Step

HELDOUT = "embedded:verilog_smoke/heldout.jsonl.gz"
ROWS, DRAWS = 8, 2_000


def divergences(runs: Sequence[str], teacher: str, *, prompts: int, new_tokens: int) -> dict[str, dict[str, Any]]:
    """Run → mean KL(run ‖ teacher) in nats per token, with its 95% interval over prompts, and the tokens it is of."""
    taught = find_model(teacher)
    mesh = make_mesh(1, 1)
    its = taught.load(mesh, "float32")
    rows = build_data(
        DataConfig(train=[DataSource(path=HELDOUT)], sequence_length=256), taught.tokenizer, CONVERSATIONS
    )
    tasks = of_rows(rows.train, taught.tokenizer)[:prompts]
    stops = checkpoint_stop_ids(taught.base, taught.tokenizer)
    width = padded_width([task.ids for task in tasks])
    shape = BatchShape(1, ROWS, width + new_tokens)
    found = {}
    for run in runs:
        own = find_model(run).load(mesh, "float32")
        step = Step(own.model, optax.identity(), objective=Distill(REVERSE), teacher=its.model)
        # Without adapters all weights are what a step calls trained.
        trained, frozen = (own.lora, own.params) if own.lora is not None else (own.params, {})
        base = {**frozen, TEACHER: {"params": its.params, "lora": its.lora}}
        sampler = Sampler(step, stops, SamplerShapes(len(tasks), len(tasks), width, new_tokens))
        wanted = [Wanted(i, 0, sample_seed(0, "held-out", task.name, 0)) for i, task in enumerate(tasks)]
        drawn = {one.wanted.prompt: one for one in sampler(trained, base, [task.ids for task in tasks], wanted)}
        answers = [Placed(task, drawn[i]) for i, task in enumerate(tasks)]
        sums, counts = [], []
        for start in range(0, len(answers), ROWS):
            part = answers[start : start + ROWS]
            batch = assembled(part, shape, 0.0, rows=[[i] for i in range(len(part))])  # a row for each
            each = Scorer(step).divergences(trained, base, batch.arrays)[0]
            sums += list(each.sum(axis=1)[: len(part)])
            counts += list(batch.arrays["target_mask"][0].sum(axis=1)[: len(part)])
        found[run] = _mean(np.array(sums, np.float64), np.array(counts, np.float64))
    return found


def _mean(sums: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """The mean per token, and its interval by redrawing prompts."""
    weights = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=DRAWS)
    low, high = np.quantile(weights @ sums / (weights @ counts), [0.025, 0.975])
    return {
        "kl": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high), "tokens": int(counts.sum()),
        "prompts": len(sums),
    }  # fmt: skip
