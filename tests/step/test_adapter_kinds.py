"""Adapters of every kind in the step: meshes, rematerialisation, packed rows, checkpoints, QLoRA, plans."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from gemma4_tpu.architectures import ARCHITECTURES, GLOBAL, SLIDING
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig, TrainerConfig
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.models import dora, quantize, sharding
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import Layout, get
from gemma4_tpu.models.params import random_params
from gemma4_tpu.planning import compile as compiling
from gemma4_tpu.step.optimizer import make_optimizer
from gemma4_tpu.step.train_step import Step
from gemma4_tpu.training.checkpoint import Checkpoints
from gemma4_tpu.training.recipe import Recipe
from gemma4_tpu.training.setup import init_state
from tests.step.test_train_step import gradients, make_batch, relative_difference

ARCH = replace(ARCHITECTURES["tiny"], num_layers=6, layer_types=(SLIDING, GLOBAL) * 3, sliding_window=8)
KINDS = {
    "parts": LoraConfig(rank=4, targets=["v", "o", "down"], layers=["1-3"], ranks={"layers.3.*": 2, "o": 6}),
    "dora": LoraConfig(rank=4, dora=True, targets=["v", "o", "up"]),
}


def make(lora: LoraConfig, fsdp: int = 1, tp: int = 1, **settings):
    """(step, base, trained) in fp32 on a mesh of fake devices, with no B that is zero."""
    mesh = sharding.make_mesh(fsdp, tp, jax.devices()[: fsdp * tp])
    model = Model(layout=Layout.of(ARCH, lora), compute_dtype=jnp.float32, mesh=mesh, **settings)

    def then(leaf, array):
        return quantize.quantizer(leaf, lora.quantize, mesh)(array) if quantize.is_quantized(leaf, lora) else array

    base = random_params(ARCH, model.layout, sharding.places(model.layout, mesh), jnp.float32, 0, then)
    place = adapters.shardings(model.layout, mesh)
    trained = jax.jit(partial(adapters.init, model.layout), out_shardings=place)(jax.random.key(1), base)
    moved = iter(range(1000))
    trained = jax.tree.map(
        lambda x: x if x.any() else 0.05 * jax.random.normal(jax.random.key(next(moved)), x.shape), trained
    )
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 10, adapters.leaves(model.layout))
    return Step(model, optimizer, chunk_tokens=16), base, jax.device_put(trained, place)


@cache
def plain(kind: str):
    return gradients(*make(KINDS[kind]), make_batch(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_meshes_and_remat_change_nothing(kind):
    step, base, trained = make(KINDS[kind], fsdp=2, tp=2, remat="decoder")
    place = sharding.batch(step.model.mesh)
    batch = {name: jax.device_put(value, place) for name, value in make_batch(2).items()}
    loss, grads, *_ = gradients(step, base, trained, batch)
    np.testing.assert_allclose(loss, plain(kind)[0], rtol=1e-6)
    assert relative_difference(grads, plain(kind)[1]) < 2e-5  # sums in another order


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_gets_a_gradient(kind):
    for path, grad in jax.tree_util.tree_leaves_with_path(plain(kind)[1]):
        assert np.abs(np.asarray(grad)).max() > 0, path


def test_dora_begins_as_the_base_and_trains_directions_and_lengths_apart():
    """With B = 0 nothing is added; and a longer A·B does not make rows longer."""
    step, base, trained = make(KINDS["dora"])
    fresh = adapters.init(step.model.layout, jax.random.key(1), base)
    loss = jax.jit(lambda tree: step.summed_loss(tree, base, {k: v[0] for k, v in make_batch(2).items()}, None)[0])
    np.testing.assert_allclose(loss(fresh), loss({}), rtol=1e-6)
    for adapter in adapters.adapters(step.model.layout):
        weight = np.asarray(get(base, adapter.base.path))[0]
        if len(adapter.base.weight.hf_names) > 1:
            weight = weight[list(adapter.how.pieces)]
        a, b, m = (np.asarray(get(trained, leaf.path))[0] for leaf in adapter.leaves)
        merged = adapters.merged(adapter.base.weight, adapter.how, weight, (a, b, m))
        np.testing.assert_allclose(np.sqrt(dora.squared_lengths(adapter.base.weight, merged)), m, rtol=1e-5)


@pytest.mark.slow
def test_qlora_with_dora_is_dora_on_the_dequantised_base():
    lora = replace(KINDS["dora"], quantize="nf4")
    step, base, trained = make(lora)
    dense = jax.tree.map(lambda w: quantize.dense(w, jnp.float32), base, is_leaf=lambda w: isinstance(w, qwix.QArray))
    fresh = [adapters.init(step.model.layout, jax.random.key(1), held) for held in (base, dense)]
    assert relative_difference(*fresh) < 1e-6
    quantised, dequantised = (gradients(step, b, trained, make_batch(2)) for b in (base, dense))
    np.testing.assert_allclose(quantised[0], dequantised[0], rtol=1e-6)
    assert relative_difference(quantised[1], dequantised[1]) < 1e-5
    assert abs(float(quantised[0]) - float(plain("dora")[0])) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_restore_every_array(kind, tmp_path):
    step, _, trained = make(KINDS[kind], fsdp=2, tp=2)
    state = init_state(step, trained, jax.random.key(5), step.model.mesh)
    state = state._replace(update=state.update + 3)
    leaves = list(adapters.leaves(step.model.layout))
    saved = Checkpoints(tmp_path, CheckpointConfig(), leaves, step.model.mesh)
    saved.save(state, {}, 1.0)
    saved.close()
    other, _, fresh = make(KINDS[kind])
    like = init_state(other, jax.tree.map(jnp.zeros_like, fresh), jax.random.key(0), other.model.mesh)
    restored, _ = Checkpoints(tmp_path, CheckpointConfig(), leaves, other.model.mesh).restore(3, like)
    jax.tree.map(np.testing.assert_array_equal, restored.trained, state.trained)


def plan(lora: LoraConfig):
    recipe = Recipe(
        arch=ARCH, hardware=HardwareConfig(), lora=lora, optimizer=OptimizerConfig(), length=32, rows=1, updates=10,
        trainer=TrainerConfig(remat="none"), mesh=MeshSizes(1, 1, 1),
    )  # fmt: skip
    return compiling.shapes(recipe, sharding.make_mesh(1, 1, jax.devices()[:1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_what_is_trained(kind):
    given = plan(KINDS[kind])
    assert given.bytes_per_chip()["lora"] == 4 * adapters.parameter_count(Layout.of(ARCH, KINDS[kind]))
    assert "dot_general" in compiling.lower_step(given).as_text()


def test_no_gradient_goes_back_to_layers_before_the_first_adapted_one():
    """Their loop runs forward only, so that one loop less is in the program."""
    every, last = (compiling.lower_step(plan(LoraConfig(layers=layers))).as_text() for layers in (None, ["4-"]))
    assert last.count("stablehlo.while") == every.count("stablehlo.while") - 1
