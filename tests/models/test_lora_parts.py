"""PiSSA and OLoRA: what adapters take out of their weights, against decompositions of whole matrices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.architectures import ARCHITECTURES, GLOBAL, SLIDING
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import quantize, sharding
from gemma4_tpu.models.layout import Layout, get
from gemma4_tpu.models.lora_parts import ITERATIONS, SPARE, Parts
from gemma4_tpu.models.params import random_params
from gemma4_tpu.training.setup import holding

ARCH = replace(ARCHITECTURES["tiny"], num_layers=4, layer_types=(SLIDING, GLOBAL) * 2)
EPSILON = np.finfo(np.float32).eps


def load(lora, fsdp=1, tp=1, parts=None, dtype=jnp.float32):
    """(layout, weights on the mesh, parts)."""
    mesh = sharding.make_mesh(fsdp, tp, jax.devices()[: fsdp * tp])
    layout = Layout.of(ARCH, lora)
    parts = parts or Parts(lora.init, mesh, jax.random.key(0))
    weights = random_params(ARCH, layout, sharding.places(layout, mesh), dtype, 0, holding(lora, mesh, parts))
    return layout, weights, parts


def matrices(layout, weights, parts):
    """(adapter, W as loaded [out, in], what is left of it, A₀ [r, in], B₀ [out, r]) of each layer; pieces together."""
    whole = random_params(ARCH, layout, sharding.places(layout, sharding.make_mesh(1, 1, jax.devices()[:1])),
                          jnp.float32, 0)  # fmt: skip
    for adapter in adapters.adapters(layout):
        row = adapter.base.weight
        order = [row.dims.index(dim) for dim in row.outputs + row.inputs]
        for of_layer in range(len(adapter.base.tunix_names)):
            both = [np.asarray(get(tree, adapter.base.path), np.float32)[of_layer] for tree in (whole, weights)]
            if len(row.hf_names) > 1:
                both = [x[list(adapter.how.pieces)] for x in both]
            a, b = (np.asarray(get(parts.factors, leaf.path))[of_layer] for leaf in (adapter.a, adapter.b))
            a, b = a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T
            yield adapter, *(x.transpose(order).reshape(b.shape[0], a.shape[1]) for x in both), a, b


@pytest.mark.parametrize(("init", "split"), [("pissa", (1, 1)), ("pissa", (2, 2)), ("olora", (2, 2))])
def test_products_are_those_of_whole_decompositions_on_any_mesh(init, split):
    """The products, since signs of singular vectors are anyone's. `v` alone is a piece of an array with K."""
    lora = LoraConfig(rank=4, alpha=6.0, init=init, targets=["v", "o", "down"], ranks={"v": 3})
    for adapter, w, left, a, b in matrices(*load(lora, *split)):
        rank, scale = adapter.how.rank, adapter.how.scale
        values = np.linalg.svd(w, compute_uv=False)
        if init == "pissa":
            u, s, vt = np.linalg.svd(w, full_matrices=False)
            expected, room = (u[:, :rank] * s[:rank]) @ vt[:rank] / scale, rank + SPARE
            # the angle to the subspace shrinks by σ_{q+1}/σ_r with each product; norms of W are 1 to 2 here
            missed = 4 * (s[room] / s[rank - 1]) ** (2 * ITERATIONS) if room < len(s) else 0
            gap = (s[rank - 1] - s[rank]) / s[0]
            np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-4)
        else:
            q, r = np.linalg.qr(w)
            expected, missed, gap = q[:, :rank] @ r[:rank], 0, 0.1
        np.testing.assert_allclose(b @ a, expected, atol=missed + 50 * EPSILON * values[0] / gap / scale)
        np.testing.assert_allclose(left + scale * (b @ a), w, atol=8 * EPSILON * values[0])


def test_the_part_that_is_left_is_what_is_quantised_and_saved_factors_leave_the_same():
    lora = LoraConfig(rank=4, init="pissa", targets=["q"], quantize="int8")
    layout, weights, parts = load(lora)
    saved = {
        name: np.asarray(get(parts.factors, leaf.path))[i]
        for leaf in adapters.factors(layout) for i, name in enumerate(leaf.tunix_names)
    }  # fmt: skip
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    _, again, _ = load(lora, parts=Parts("pissa", mesh, jax.random.key(9), saved.__getitem__))
    jax.tree.map(np.testing.assert_array_equal, weights, again)  # a run that goes on has the same bits
    dense = load(replace(lora, quantize=None))[1]
    path = next(adapter.base.path for adapter in adapters.adapters(layout))
    step = np.abs(np.asarray(get(dense, path))).max() / 127
    near = quantize.dense(get(weights, path), jnp.float32)
    np.testing.assert_allclose(near, get(dense, path), atol=step)


def test_a_rank_that_a_weight_does_not_have_is_refused():
    arch = replace(ARCH, embed_dim=8)
    with pytest.raises(
        UserError, match=r"lora\.init=olora: rank 9, but layers\.0\.self_attn\.q_proj\.weight has only 8"
    ):
        Layout.of(arch, LoraConfig(rank=9, init="olora"))
    assert Layout.of(arch, LoraConfig(rank=9)).adapted
