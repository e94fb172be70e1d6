"""Rows split over `cp`: attention of either kind against the same rows on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu import Gemma4
from gemma4_tpu.config.load import load
from gemma4_tpu.config.machines import MeshConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evaluate import EVALUATE
from gemma4_tpu.models import sharding
from gemma4_tpu.models.attention import einsum_attention
from gemma4_tpu.models.context_parallel import blockwise_attention, exchanged_places
from gemma4_tpu.models.splash import _grid, _kernel, splash_attention
from gemma4_tpu.planning.kernels import Mask
from gemma4_tpu.train import load_train
from tests.house.scripts import ROOT


def value_and_gradients(attention, q, k, v, segments, window, weight):
    def total(q, k, v):
        return (attention(q, k, v, segments, window) * weight * (segments > 0)[..., None, None]).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)


def arrays(length, width, kv_heads, segments):
    rng = np.random.default_rng(0)
    q, weight = (jnp.asarray(rng.normal(size=(2, length, 4, width)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, length, kv_heads, width)) / 8, jnp.float32) for _ in range(2))
    ids = np.array([np.repeat(np.arange(1, len(segments) + 1), segments), np.ones(length)], np.int32)
    ids[0, -segments[-1] :] = 0  # padding
    return q, k, v, jnp.asarray(ids), weight


def close(ours, wanted):
    np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-4)
    for got, gradient in zip(ours[1], wanted[1], strict=True):
        # fp32 both, sums of up to T terms in another order: relative rounding of about 1e-6 per product
        np.testing.assert_allclose(got, gradient, atol=1e-5 * float(jnp.abs(gradient).max()))


@pytest.mark.parametrize(("dp", "fsdp", "cp", "tp"), [(1, 1, 8, 1), (2, 1, 2, 2)])
@pytest.mark.parametrize("window", [None, 5, 40])
def test_products_on_split_rows_are_those_on_whole_rows(window, dp, fsdp, cp, tp):
    """Windows within a chip's tokens, over several chips', and longer than all before them."""
    mesh = sharding.make_mesh(fsdp, tp, jax.devices()[: dp * fsdp * cp * tp], dp=dp, cp=cp)
    given = arrays(48, 8, 2, [13, 9, 7, 11, 8])
    q, k, v, segments, weight = given
    ours = value_and_gradients(partial(blockwise_attention, mesh=mesh), q, k, v, segments, window, weight)
    close(ours, value_and_gradients(einsum_attention, q, k, v, segments, window, weight))


@pytest.mark.slow
@pytest.mark.parametrize(("cp", "tp", "window"), [(2, 2, None), (4, 1, 300)])
def test_the_tpu_kernel_on_split_rows_equals_whole_rows(window, cp, tp):
    """The kernel runs in Pallas' interpreter; a window of 300 takes two chips' tokens of 256."""
    mesh = sharding.make_mesh(1, tp, jax.devices()[: cp * tp], cp=cp)
    q, k, v, segments, weight = arrays(1024, 128, 2, [190, 30, 250, 384, 170])
    ours = value_and_gradients(partial(splash_attention, mesh=mesh, interpret=True), q, k, v, segments, window, weight)
    close(ours, value_and_gradients(einsum_attention, q, k, v, segments, window, weight))


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_every_chip_has_as_many_pairs_of_tokens(parts):
    places = exchanged_places(48 * parts, parts).reshape(parts, -1)
    assert sorted(places.reshape(-1)) == list(range(48 * parts))
    assert len({int(chip.sum()) for chip in places}) == 1


def test_what_decodes_refuses_split_rows_in_one_message():
    told = r"^mesh\.cp=2: .*, which needs whole rows; set mesh\.cp=1(\n\(python|$)"
    with pytest.raises(UserError, match=told):
        Gemma4.load("embedded:tiny", mesh=MeshConfig(cp=2))
    with pytest.raises(UserError, match=told):
        load(["model.path=embedded:tiny", "mesh.cp=2"], EVALUATE)
    with pytest.raises(UserError, match=told):
        load_train(["objective=grpo", "rollouts.reward=a.b:c", "hardware=v5p8", "mesh.cp=2", "mesh.tp=2"])


LENGTH, BLOCK = 131_072, 512


def work_of_blocks(rng, mean):
    """Blocks of keys that each block of queries meets in a global layer, in a packed row of random examples."""
    left, lengths = LENGTH, []
    while left:
        drawn = LENGTH if mean == LENGTH else rng.lognormal(np.log(mean) - 0.7**2 / 2, 0.7)
        lengths.append(int(min(left, max(1, drawn))))
        left -= lengths[-1]
    example = np.repeat(np.arange(len(lengths)), lengths).reshape(-1, BLOCK)
    i, j = np.tril_indices(len(example))
    met = (example[i, 0] <= example[j, -1]) & (example[j, 0] <= example[i, -1])
    return np.bincount(i[met], minlength=len(example))


@pytest.mark.parametrize("mean", [LENGTH, 32_000, 8_000, 1_000])
def test_work_of_the_busiest_chip_is_as_the_page_says(mean):
    page = (ROOT / "docs/long_context.md").read_text(encoding="utf-8")
    rng, shown = np.random.default_rng(0), []
    rows = [work_of_blocks(rng, mean) for _ in range(30)]
    for parts in (2, 4, 8, 16):
        places = exchanged_places(LENGTH, parts).reshape(parts, -1)[:, ::BLOCK] // BLOCK
        chips = [row[places].sum(axis=1) for row in rows]
        shown.append(f"{np.mean([chip.max() / chip.mean() for chip in chips]):.2f}")
    name = f"{mean:,} tokens{' on average' if mean < LENGTH else ''}".replace(" tokens on", " on")
    assert f"| {name} | {' | '.join(shown)} |" in page


@pytest.mark.parametrize("window", [None, 300])
def test_a_plan_counts_the_blocks_that_the_kernel_visits_on_each_chip(window):
    length, parts = 4096, 4
    grid = _grid(length, parts, window)
    visited = np.asarray(_kernel(grid, 1, 1, parts, interpret=True).fwd_mask_info.block_mask) > 0
    chips = parts if window is None else 1  # in sliding layers all have the same table
    keys = length if window is None else length // parts + grid.halo
    mask = Mask(window, grid.blocks.block_q, grid.blocks.block_kv)
    assert (visited.reshape(chips, -1).sum(axis=1) == mask.of_chip(length // parts, keys)).all()
