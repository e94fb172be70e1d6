"""Objectives over pairs: against their definitions and PyTorch's gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.config.schema import ObjectiveConfig
from gemma4_tpu.models import sharding
from gemma4_tpu.step.objective import REFERENCE_NLL, means
from gemma4_tpu.step.objective_kinds import KINDS
from gemma4_tpu.step.objectives import make_objective
from gemma4_tpu.step.preference import pair_sums
from gemma4_tpu.tracking.metrics import measures_of
from tests.step.test_train_step import T, gradients, make, regroup, relative_difference

PAIR_LENGTHS = [[(5, 9), (4, 3)], [(8, 8)], [(2, 2), (3, 10), (6, 4)], []]
"""Slots of both sides of the pairs of each row; the last row is padding."""
CONFIGS = {
    "dpo": ObjectiveConfig(kind="dpo", beta=0.3, label_smoothing=0.1),
    "ipo": ObjectiveConfig(kind="ipo", beta=0.3),
    "orpo": ObjectiveConfig(kind="orpo", beta=0.3),
}


def pairs_batch(vocab: int = 500, seed: int = 0) -> dict[str, np.ndarray]:
    """[1, 4, T]: packed pairs, about two thirds of each side with loss."""
    rng, shape = np.random.default_rng(seed), (1, len(PAIR_LENGTHS), T)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    batch["target_mask"] = np.zeros(shape, bool)
    for row, pairs in enumerate(PAIR_LENGTHS):
        start = 0
        for segment, length in enumerate([side for pair in pairs for side in pair], 1):
            ids, at = rng.integers(3, vocab, length + 1), slice(start, start + length)
            batch["tokens"][0, row, at], batch["targets"][0, row, at] = ids[:-1], ids[1:]
            batch["segment_ids"][0, row, at], batch["positions"][0, row, at] = segment, np.arange(length)
            batch["target_mask"][0, row, at] = np.arange(length) >= length // 3
            start += length
    return batch


def sides_of(batch):
    """((row, mask of the chosen side), (row, mask of the rejected one)) of each pair."""
    for row, ids in enumerate(batch["segment_ids"][0]):
        for pair in range(ids.max() // 2):
            yield [(row, ids == 2 * pair + side + 1) for side in (0, 1)]


def test_sums_of_pairs_and_their_gradient():
    rng = np.random.default_rng(0)
    batch = pairs_batch()
    ids, values = jnp.asarray(batch["segment_ids"][0]), jnp.asarray(rng.normal(size=(4, T)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(4, T // 2, 2)), jnp.float32)
    sums, pull = jax.vjp(lambda x: pair_sums(x, ids), values)
    expected, slopes = np.zeros(sums.shape), np.zeros(values.shape)
    for row, segments in enumerate(batch["segment_ids"][0]):
        for t, segment in enumerate(segments):
            if segment:
                pair, side = divmod(segment - 1, 2)
                expected[row, pair, side] += values[row, t]
                slopes[row, t] = weights[row, pair, side]
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pull(weights)[0], slopes.astype(np.float32))


def torch_dpo(logp, reference, beta, smoothing):
    """The papers' formulae on summed log-probabilities [(chosen, rejected)]: (mean loss, margins)."""
    import torch

    margins = torch.stack([beta * ((p[0] - r[0]) - (p[1] - r[1])) for p, r in zip(logp, reference, strict=True)])
    losses = -(1 - smoothing) * torch.nn.functional.logsigmoid(margins)
    return (losses - smoothing * torch.nn.functional.logsigmoid(-margins)).mean(), margins


def torch_ipo(logp, reference, beta):
    """On means over an answer's tokens."""
    import torch

    gaps = torch.stack([(p[0] - r[0]) - (p[1] - r[1]) for p, r in zip(logp, reference, strict=True)])
    return ((gaps - 1 / (2 * beta)) ** 2).mean(), beta * gaps


def torch_orpo(logp, beta):
    """On means over an answer's tokens."""
    import torch

    odds = [[x - torch.log1p(-torch.exp(x)) for x in pair] for pair in logp]
    margins = torch.stack([chosen - rejected for chosen, rejected in odds])
    learnt = -torch.stack([chosen for chosen, _ in logp])
    return (learnt - beta * torch.nn.functional.logsigmoid(margins)).mean(), margins


@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_gradients_and_figures_are_those_of_the_papers_formulae(kind):
    import torch

    rng, batch = np.random.default_rng(1), pairs_batch()
    nll, reference = (rng.exponential(2, (4, T)).astype(np.float32) for _ in range(2))
    objective, rows = make_objective(CONFIGS[kind]), {name: jnp.asarray(value[0]) for name, value in batch.items()}
    count = int(objective.denominator({name: jnp.asarray(value) for name, value in batch.items()}))
    assert count == 6

    def ours(nll):
        loss, stats = objective.loss(nll, rows | {REFERENCE_NLL: jnp.asarray(reference)})
        return loss / count, stats

    (loss, stats), slopes = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(nll))
    theirs, masks = torch.tensor(nll, requires_grad=True), batch["target_mask"][0]
    at = [[(row, torch.tensor(side & masks[row])) for row, side in pair] for pair in sides_of(batch)]
    summed, held = (
        [[-x[row][side].sum() for row, side in pair] for pair in at] for x in (theirs, torch.tensor(reference))
    )
    mean, held_mean = ([[-x[row][side].mean() for row, side in pair] for pair in at]
                       for x in (theirs, torch.tensor(reference)))  # fmt: skip
    expected, margins = {
        "dpo": lambda: torch_dpo(summed, held, 0.3, 0.1),
        "ipo": lambda: torch_ipo(mean, held_mean, 0.3),
        "orpo": lambda: torch_orpo(mean, 0.3),
    }[kind]()
    expected.backward()
    # fp32 sums of up to 10 values on both sides
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(slopes, theirs.grad.numpy(), rtol=1e-4, atol=1e-7)
    told = means(stats)
    np.testing.assert_allclose(told["margin"], margins.mean().item(), rtol=1e-4)
    np.testing.assert_allclose(told["accuracy"], (margins > 0).float().mean().item())
    np.testing.assert_allclose(told["chosen_logp"], np.mean([chosen.item() for chosen, _ in summed]), rtol=1e-5)
    if objective.reference:
        np.testing.assert_allclose(told["margin"], told["chosen_reward"] - told["rejected_reward"], rtol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_kind_tells_what_its_class_does(kind):
    """Names that mean something already would be taken for it in plots."""
    objective = make_objective(CONFIGS[kind])
    assert objective.reference == KINDS[kind].reference and hash(objective) is not None
    rows = {name: jnp.asarray(value[0]) for name, value in pairs_batch().items()}
    nll = jnp.ones((4, T))
    loss, stats = objective.loss(nll, rows | {REFERENCE_NLL: nll})
    told = means(stats)
    assert np.isfinite(float(loss)) and set(measures_of([told])) == set(told) == set(KINDS[kind].measures)
    if objective.reference:  # the model is the reference: margins of 0 are ties
        assert (told["margin"], told["accuracy"]) == (0, 0.5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.slow
def test_microbatches_and_meshes_change_nothing(kind):
    step, base, trained = make()
    step = replace(step, objective=make_objective(CONFIGS[kind]))
    loss, grads, _, stats = gradients(step, base, trained, pairs_batch())
    apart = gradients(step, base, trained, regroup(pairs_batch(), 4))
    meshed, mesh_base, mesh_trained = make(fsdp=2, cp=2, tp=2)
    meshed = replace(meshed, objective=step.objective)
    place = sharding.batch(meshed.model.mesh)
    spread = {name: jax.device_put(value, place) for name, value in pairs_batch().items()}
    for again in (apart, gradients(meshed, mesh_base, mesh_trained, spread)):
        np.testing.assert_allclose(again[0], loss, rtol=1e-5)  # fp32: sums of some 20 values in another order
        assert relative_difference(again[1], grads) < 5e-5
        np.testing.assert_allclose(means(again[3])["margin"], means(stats)["margin"], rtol=1e-3)
