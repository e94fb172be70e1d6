"""Adapters of experts: in the step they are what the weights W + scale · B·A would be, gradients included."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.architectures import ARCHITECTURES, GLOBAL, SLIDING, Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import quantize, sharding
from gemma4_tpu.models.gemma4 import Model, hidden_states
from gemma4_tpu.models.layout import Layout, build_tree, get
from gemma4_tpu.models.params import random_params

LORA = LoraConfig(rank=6, alpha=6.0, targets=["attention", "experts"])
"""Of experts: rank 3, two of which a token passes through, hence scale 2."""
T = 16


def small(**sizes: int) -> Architecture:
    """The tiny mixture of experts with two layers of each kind, so that some run in a loop."""
    return replace(
        ARCHITECTURES["tiny_moe"], num_layers=4, layer_types=(SLIDING, GLOBAL) * 2, sliding_window=8, **sizes
    )


def mesh_of(dp: int, fsdp: int, tp: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(fsdp, tp, jax.devices()[: dp * fsdp * tp], dp=dp)


def rows() -> dict[str, np.ndarray]:
    """Four packed rows, two segments in each; the last has padding."""
    rng = np.random.default_rng(0)
    cut = np.array([[3], [9], [12], [5]])
    places = np.arange(T)[None]
    segments = np.where(places >= cut, 2, 1)
    segments[3, 11:] = 0
    return {
        "tokens": rng.integers(3, 500, (4, T)),
        "segment_ids": segments,
        "positions": np.where(places >= cut, places - cut, places),
    }


def trained(arch: Architecture, lora: LoraConfig, mesh: jax.sharding.Mesh):
    """(layout, base weights as they are held, adapters with B that is not zero)."""
    layout = Layout.of(arch, lora)

    def held(leaf, array):
        return quantize.quantizer(leaf, lora.quantize, mesh)(array) if quantize.is_quantized(leaf, lora) else array

    base = random_params(arch, layout, sharding.places(layout, mesh), jnp.float32, 0, held)
    place = adapters.shardings(layout, mesh)
    initial = jax.jit(partial(adapters.init, layout), out_shardings=place)(jax.random.key(1))
    b = [jax.random.normal(jax.random.key(x.size), x.shape) * 0.1 for x in jax.tree.leaves(initial)]
    values = [x if np.asarray(x).any() else jax.device_put(y, x.sharding)
              for x, y in zip(jax.tree.leaves(initial), b, strict=True)]  # fmt: skip
    return layout, base, jax.tree.unflatten(jax.tree.structure(initial), values)


def merged(layout: Layout, base, lora, dtype=jnp.float32):
    """The base with the adapters of experts in it, written out from the arrays' shapes alone; the other adapters."""
    weights, rest = jax.tree.map(lambda x: x, base), []
    weights = layout.tree(lambda leaf: quantize.dense(get(weights, leaf.path), dtype))
    for adapter in adapters.adapters(layout):
        a, b = (get(lora, leaf.path) for leaf in (adapter.a, adapter.b))
        if adapter.base.weight.name == "moe.gating_einsum":  # A [R, E, D, r], B [R, E, r, 2, F]
            delta = jnp.einsum("Redr,Rercf->Recfd", a, b)
        elif adapter.base.weight.name == "moe.linear":  # A [R, E, F, r], B [R, E, r, D]
            delta = jnp.einsum("Refr,Rerd->Refd", a, b)
        else:
            rest += [(adapter.a.path, a), (adapter.b.path, b)]
            continue
        node = get(weights, adapter.base.path[:-1])
        node[adapter.base.path[-1]] = node[adapter.base.path[-1]] + 2.0 * delta
    return weights, build_tree(iter(rest))


def value_and_grad(model: Model, base, lora, merge: bool):
    """A scalar of the final hidden states, and its gradient with respect to the adapters."""
    batch = rows()
    weights = np.random.default_rng(1).standard_normal((4, T, model.arch.embed_dim)).astype(np.float32)
    weights[batch["segment_ids"] == 0] = 0

    @jax.jit
    @jax.value_and_grad
    def run(lora, base):
        params, rest = merged(model.layout, base, lora) if merge else (base, lora)
        return jnp.sum(hidden_states(model, params, rest, **batch) * weights)

    value, grads = run(lora, base)
    return np.asarray(value), jax.tree.map(np.asarray, grads)


@cache
def expected(quantized: str | None = None, **sizes: int):
    """By the merged weights, on one device."""
    layout, base, lora = trained(small(**sizes), replace(LORA, quantize=quantized), mesh_of(1, 1, 1))
    model = Model(layout=layout, compute_dtype=jnp.float32)
    return value_and_grad(model, jax.tree.map(np.asarray, base), jax.tree.map(np.asarray, lora), merge=True)


def same(found, wanted) -> None:
    # A sum of n hidden states of about 1 times weights of both signs: off by eps of what its addends are in size, 0.64
    # on average, however small the sum itself is.
    n = 4 * T * 64
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=np.finfo(np.float32).eps * 0.64 * n)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(wanted[1]), strict=True
    ):
        # the same products in fp32, summed in another order: some hundred addends of both signs
        assert np.abs(one - other).max() <= 5e-5 * np.abs(other).max(), path
        assert np.abs(other).max() > 0, path


@pytest.mark.parametrize(
    ("shape", "settings"), [((1, 1, 1), {}), ((2, 2, 2), {"remat": "decoder"}), ((1, 4, 1), {"remat": "products"})]
)
def test_values_and_gradients_are_those_of_the_merged_weights(shape, settings):
    mesh = mesh_of(*shape)
    layout, base, lora = trained(small(), LORA, mesh)
    model = Model(layout=layout, compute_dtype=jnp.float32, mesh=mesh, **settings)
    same(value_and_grad(model, base, lora, merge=False), expected())


def test_experts_are_the_same_read_where_they_lie():
    """By the TPU kernel, which finds a layer's experts in the stack; interpreted here."""
    mesh = mesh_of(1, 2, 2)
    layout, base, factors = trained(small(), LORA, mesh)
    found, wanted = (
        value_and_grad(
            Model(layout=layout, compute_dtype=jnp.float32, mesh=mesh, remat="decoder", expert_kernel=kernel),
            base, factors, merge=False,
        )
        for kernel in (True, False)
    )  # fmt: skip
    same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"expert_dim": 30}, {"embed_dim": 66}], ids=["hidden units", "model dim"])
def test_dims_that_the_mesh_does_not_divide_stay_whole(sizes):
    mesh = mesh_of(2, 2, 2)
    layout, base, lora = trained(small(**sizes), LORA, mesh)
    model = Model(layout=layout, compute_dtype=jnp.float32, mesh=mesh)
    same(value_and_grad(model, base, lora, merge=False), expected(**sizes))


@pytest.mark.slow
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_quantised_experts_have_the_same_values_on_every_mesh(qtype):
    """The tiles of scales must not be cut by the mesh: 32 hidden units of an expert lie on four chips."""
    mesh = mesh_of(2, 2, 2)
    layout, base, lora = trained(small(), replace(LORA, quantize=qtype), mesh)
    model = Model(layout=layout, compute_dtype=jnp.float32, mesh=mesh)
    same(value_and_grad(model, base, lora, merge=False), expected(qtype))


@pytest.mark.parametrize(
    ("lora", "rank", "scale"),
    [
        (LoraConfig(rank=16, alpha=16.0), 2, 8.0),
        (LoraConfig(rank=4, alpha=4.0), 1, 4.0),  # less than the experts of a token: 1
        (LoraConfig(rank=16, alpha=16.0, expert_rank=6), 6, 16 / 6),
        (LoraConfig(rank=16, alpha=16.0, expert_rank=4, rslora=True), 4, 8.0),
    ],
)
def test_rank_and_scale_of_experts(lora, rank, scale):
    """The scale follows the rank as everywhere (alpha/r), so that a learning rate suits both."""
    layout = Layout.of(ARCHITECTURES["gemma4_26b_a4b"], replace(lora, targets=["attention", "mlp", "experts"]))
    how = layout.adapted["layers.3.moe.linear"]
    assert (how.rank, how.scale) == (rank, scale)
    assert layout.adapted["layers.3.mlp.up_proj.kernel"].rank == lora.rank


def test_the_size_of_26b_a4b_s():
    """29.74 M parameters for each rank: 128 · (2816 + 1408 + 704 + 2816) · 30."""
    layout = Layout.of(ARCHITECTURES["gemma4_26b_a4b"], LoraConfig(rank=8, targets=["experts"], expert_rank=8))
    assert adapters.parameter_count(layout) == 8 * 29_736_960
    assert adapters.module_counts(layout) == {"moe.gating_einsum": 30, "moe.linear": 30}
