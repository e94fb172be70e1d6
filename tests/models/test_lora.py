"""Adapters: which modules get one, how they lie on the mesh, and that Tunix + Qwix read them as their own."""

import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from gemma4_tpu.architectures import ARCHITECTURES, from_hf_config
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import sharding
from gemma4_tpu.models.gemma4 import Model, hidden_states, logits
from gemma4_tpu.models.layout import Layout, get
from gemma4_tpu.models.params import by_name, load_params
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.models.tunix_bridge import to_tunix
from tests.models.checkpoints import make_batch, make_checkpoint

RANK_64 = LoraConfig(rank=64, alpha=64.0)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # 31B: 50 sliding layers with one fused K/V projection, 10 global ones whose K is V
        ("gemma4_31b", {"q_einsum": 60, "kv_einsum": 50, "k_einsum": 10, "attn_vec_einsum": 60, "mlp": 180}),
        ("gemma4_12b", {"q_einsum": 48, "kv_einsum": 40, "k_einsum": 8, "attn_vec_einsum": 48, "mlp": 144}),
        # 26B-A4B: the dense MLP beside the experts is adapted, router and experts are not
        ("gemma4_26b_a4b", {"q_einsum": 30, "kv_einsum": 25, "k_einsum": 5, "attn_vec_einsum": 30, "mlp": 90}),
        # E-series: KV-shared layers project no keys and values
        ("gemma4_e4b", {"q_einsum": 42, "kv_einsum": 24, "k_einsum": 0, "attn_vec_einsum": 42, "mlp": 126}),
        ("gemma4_e2b", {"q_einsum": 35, "kv_einsum": 15, "k_einsum": 0, "attn_vec_einsum": 35, "mlp": 105}),
    ],
)
def test_every_intended_module_is_adapted(name, counts):
    found = adapters.module_counts(Layout.of(ARCHITECTURES[name], RANK_64))
    mlp = sum(n for kind, n in found.items() if kind.startswith("mlp."))
    assert {k: found.get(f"attn.{k}", 0) for k in counts if k != "mlp"} | {"mlp": mlp} == counts


def test_the_paper_s_adapters_have_the_size_measured_for_them():
    """About 472 M parameters for rank 64 on 31B."""
    assert adapters.parameter_count(Layout.of(ARCHITECTURES["gemma4_31b"], RANK_64)) == 472_514_560


def test_scale():
    def scales(**settings):
        return {how.scale for how in Layout.of(ARCHITECTURES["tiny"], LoraConfig(**settings)).adapted.values()}

    assert scales(rank=16, alpha=32.0) == {2.0}
    assert scales(rank=16, alpha=32.0, rslora=True) == {8.0}


def test_no_targets_is_refused():
    with pytest.raises(UserError, match="adapts no module"):
        Layout.of(ARCHITECTURES["tiny"], LoraConfig(targets=[]))


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (4, 1), (2, 2)])
def test_every_adapter_of_31b_is_sharded_by_its_own_shape(shape):
    mesh = sharding.make_mesh(*shape, jax.devices()[: math.prod(shape)])
    layout = Layout.of(ARCHITECTURES["gemma4_31b"], RANK_64)
    places = adapters.shardings(layout, mesh)
    for leaf in adapters.leaves(layout):
        spec = get(places, leaf.path).spec
        assert len(spec) <= len(leaf.array_shape)
        assert sharding.replicated(mesh, leaf) == []
        assert any(spec) or all(mesh.shape[axis] == 1 for axis in leaf.axes if axis)


def test_initial_values_do_not_depend_on_mesh_or_the_other_tensors():
    arch, key = ARCHITECTURES["tiny"], jax.random.key(3)
    only_mlp, layout = Layout.of(arch, LoraConfig(rank=4, targets=["mlp"])), Layout.of(arch, LoraConfig(rank=4))
    alone = adapters.init(only_mlp, key)
    mesh = sharding.make_mesh(2, 4, jax.devices())
    both = jax.jit(partial(adapters.init, layout), out_shardings=adapters.shardings(layout, mesh))(key)
    for leaf in adapters.leaves(only_mlp):
        np.testing.assert_array_equal(get(alone, leaf.path), np.asarray(get(both, leaf.path)))
        if leaf.path[-1].endswith("_b"):
            assert not np.asarray(get(both, leaf.path)).any()
        else:
            values = np.asarray(get(both, leaf.path))
            assert np.abs(values).max() <= math.sqrt(1 / math.prod(leaf.shape[:-1]))
            assert values.dtype == np.float32


@pytest.mark.parametrize("kind", ["dense", "e2b"])
@pytest.mark.slow
def test_tunix_with_qwix_takes_our_adapters_and_computes_the_same_logits(kind):
    """Names, shapes, stacking and scale agree with the libraries' own."""
    folder = make_checkpoint(kind)
    arch = from_hf_config(json.loads((folder / "config.json").read_text()), name=kind)
    config = LoraConfig(rank=4, alpha=8.0)
    layout, mesh = Layout.of(arch, config), sharding.make_mesh(1, 1, jax.devices()[:1])
    place = sharding.places(layout, mesh)
    base = load_params(Checkpoint(str(folder)), arch, layout, place, jnp.float32)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32),
                        jax.eval_shape(partial(adapters.init, layout), jax.random.key(0)))  # fmt: skip

    tokens, mask = make_batch(batch=2, length=24)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    model = Model(layout=layout, compute_dtype=jnp.float32)
    ours = jax.jit(lambda b, a: logits(model, b, hidden_states(model, b, a, tokens, mask.astype(np.int32), positions)))

    theirs = to_tunix(by_name(base, layout), arch)
    causal = np.broadcast_to(np.tril(np.ones((24, 24), bool)), (2, 24, 24)) & mask[:, None, :]
    provider = qwix.LoraProvider(
        module_path=r".*(q_einsum|kv_einsum|k_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)",
        rank=config.rank, alpha=config.alpha,
    )  # fmt: skip
    adapted = qwix.apply_lora_to_model(theirs, provider, tokens, positions, None, causal, rngs=nnx.Rngs(0))
    state = nnx.state(adapted, nnx.LoRAParam)
    names = {n: get(lora, leaf.path)[i] for leaf in adapters.leaves(layout) for i, n in enumerate(leaf.tunix_names)}
    seen = set()
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if name not in names:  # Tunix projects keys of KV-shared layers too and throws them away
            assert arch.is_kv_shared(int(re.search(r"layers\.(\d+)", name)[1])), name
            continue
        assert variable.get_value().shape == names[name].shape, name
        variable.set_value(names[name])
        seen.add(name)
    assert seen == names.keys()
    nnx.update(adapted, state)
    expected, _ = adapted(tokens, positions, None, causal)
    # fp32, 12 to 20 layers; Qwix contracts (x, A, B) in one einsum, we in two
    assert np.abs(np.asarray(ours(base, lora)) - np.asarray(expected))[mask].max() < 3e-4
