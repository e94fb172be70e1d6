"""Optimizers on stacks of layers: each matrix as if it were alone; schedules; averages of the trained values."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.layout import Layout, Leaf, build_tree, get
from gemma4_tpu.models.weights import BY_NAME
from gemma4_tpu.step.optimizer import make_optimizer, make_schedule, next_average
from gemma4_tpu.step.optimizer_state import parts
from gemma4_tpu.step.train_step import TrainState
from gemma4_tpu.training.setup import state_places
from tests.step.test_train_step import make, make_batch, small

NONE_OF = {"b1": None, "b2": None, "eps": None}
KINDS = {
    "adamw": OptimizerConfig(),
    "adafactor": OptimizerConfig(kind="adafactor", **NONE_OF | {"eps": 1e-30}, decay_rate=0.8, clipping_threshold=1.0,
                                 multiply_by_parameter_scale=True, weight_decay=0.1),
    "lion": OptimizerConfig(kind="lion", b2=0.99, eps=None),
    "muon": OptimizerConfig(kind="muon", beta=0.95, ns_steps=5, consistent_rms=0.2, weight_decay=0.1),
    "schedule_free": OptimizerConfig(kind="schedule_free", schedule="constant"),
}  # fmt: skip
"""Without a global norm, which is of all arrays, where the test says so."""


def values(leaves, seed: int):
    rng = np.random.default_rng(seed)
    return build_tree((leaf.path, jnp.asarray(rng.standard_normal(leaf.array_shape), jnp.float32)) for leaf in leaves)


def some(leaves, *names: str) -> list[Leaf]:
    """Those of the weights whose names begin so, of the first layers: each shape takes a compilation."""
    chosen = [leaf for leaf in leaves if leaf.weight.name.startswith(names)]
    return [leaf for leaf in chosen if leaf.path[:3] in (("stages", 0, 0), chosen[0].path[:3])]


def after(optimizer, trained, gradients):
    """The trained values after an update for each of the gradients, and the state."""
    state = optimizer.init(trained)
    for gradient in gradients:
        changes, state = jax.jit(optimizer.update)(gradient, state, trained)
        trained = optax.apply_updates(trained, changes)
    return trained, state


def updated(kind: str, leaves, *, seeds=(1, 2), **changes):
    config = replace(KINDS[kind], max_grad_norm=None, learning_rate=1e-2, **changes)
    return after(make_optimizer(config, 10, leaves), values(leaves, 0), [values(leaves, seed) for seed in seeds])[0]


def test_muon_orthogonalises_each_product_of_each_layer_alone():
    """A [inputs…, r] and B [r, outputs…], flattened to matrices; B of K and V are two. fp32 against fp32."""
    leaves = some(adapters.leaves(Layout.of(small("tiny"), LoraConfig(rank=4))), "attn.attn_vec", "attn.kv", "mlp.down")
    config, found = KINDS["muon"], updated("muon", leaves)
    alone = optax.contrib.muon(
        make_schedule(replace(config, learning_rate=1e-2), 10), beta=0.95, weight_decay=0.1, consistent_rms=0.2
    )
    whole = [values(leaves, seed) for seed in (0, 1, 2)]

    def matrices(leaf: Leaf, tree) -> list:
        """[in, out] of each product of each layer, as PEFT would see them."""
        array = get(tree, leaf.path)
        if leaf.dims.endswith("r"):  # A
            return [layer.reshape(-1, layer.shape[-1]) for layer in array]
        if "c" in leaf.dims:  # B [r, c, k, h]
            return [layer[:, c].reshape(len(layer), -1) for layer in array for c in (0, 1)]
        return [layer.reshape(len(layer), -1) for layer in array]

    assert any("c" in leaf.dims for leaf in leaves) and any(len(leaf.shape) > 2 for leaf in leaves)
    for leaf in leaves:
        trained, *gradients = (matrices(leaf, tree) for tree in whole)
        expected, _ = after(alone, trained, gradients)
        for mine, theirs in zip(matrices(leaf, found), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-6, err_msg=str(leaf.path))


def test_muon_leaves_tables_norms_and_scales_to_adam():
    every = list(Layout.of(small("tiny_e2b")).leaves())
    leaves = some(every, "embedder.input", "skip", "attn.q_einsum")
    muon, adam = updated("muon", leaves), updated("adamw", leaves, weight_decay=0.1)
    by_adam = {leaf.weight.name for leaf in every if leaf.matrix is None}
    assert {
        "embedder.input_embedding",
        "embedder.per_layer_input_embedding",
        "skip_scale",
        "final_norm.scale",
    } <= by_adam
    assert by_adam & {"attn.q_einsum.w", "attn.kv_einsum.w", "mlp.down_proj.kernel", "per_layer_projection.w"} == set()
    nesterov, _ = after(
        optax.adamw(make_schedule(replace(KINDS["adamw"], learning_rate=1e-2), 10), weight_decay=0.1, nesterov=True),
        values(leaves, 0), [values(leaves, 1), values(leaves, 2)],
    )  # fmt: skip
    for leaf in leaves:
        mine, theirs = get(muon, leaf.path), get(nesterov if leaf.matrix is None else adam, leaf.path)
        assert np.allclose(mine, theirs, atol=1e-6) == (leaf.matrix is None), leaf.path


def test_adafactor_sees_one_layer_and_one_expert_at_a_time():
    """Also where there are more layers than a matrix has rows, which Optax would else take for the dim to factor."""
    gate, experts = BY_NAME["mlp.gate_proj.kernel"], BY_NAME["moe.linear"]
    leaves = [
        Leaf(("stages", 0, 0, "mlp", "a"), tuple(map(str, range(200))), (140, 130), True, gate, "dr"),
        Leaf(("stages", 0, 0, "moe", "w"), ("x", "y"), (150, 131, 129), True, experts, experts.dims),
        Leaf(("stages", 0, 0, "norm"), ("n",), (7,), True, BY_NAME["final_norm.scale"], "d"),
    ]
    config = replace(KINDS["adafactor"], max_grad_norm=None, learning_rate=1e-2)
    trained, state = after(make_optimizer(config, 10, leaves), values(leaves, 0), [values(leaves, s) for s in (1, 2)])
    shapes = {(p.field, p.path): x.shape for p, x in zip(parts(state, trained), jax.tree.leaves(state), strict=True)}
    assert shapes["v_row", leaves[0].path] == (200, 130) and shapes["v_col", leaves[0].path] == (200, 140)
    assert {shapes["v_row", leaves[1].path], shapes["v_col", leaves[1].path]} == {(2, 150, 131), (2, 150, 129)}
    rate = make_schedule(config, 10)
    alone = optax.adafactor(rate, weight_decay_rate=lambda count: 0.1 * rate(count))
    for leaf, places in zip(leaves, [[(0,), (199,)], [(0, 0), (1, 149)], [(0,)]], strict=True):
        for place in places:
            first, *gradients = (get(values(leaves, seed), leaf.path)[place] for seed in (0, 1, 2))
            expected, _ = after(alone, first, gradients)
            np.testing.assert_allclose(get(trained, leaf.path)[place], expected, atol=2e-6)


def test_schedule_free_stands_for_the_mean_of_its_iterates():
    """At a constant rate the average of z after t updates is their mean (Defazio et al., 2024)."""
    leaves = some(adapters.leaves(Layout.of(small("tiny"), LoraConfig(rank=4))), "attn.q_einsum")
    free, trained = make_optimizer(KINDS["schedule_free"], 10, leaves), values(leaves, 0)
    state, seen = TrainState(trained, free.init(trained), jnp.int32(0), jax.random.key(0)), []
    for seed in range(1, 5):
        changes, optimizer = jax.jit(free.update)(values(leaves, seed), state.optimizer, state.trained)
        state = state._replace(trained=optax.apply_updates(state.trained, changes), optimizer=optimizer)
        seen.append(optax.tree.get(optimizer, "z"))
    mean = jax.tree.map(lambda *z: np.mean(z, axis=0), *seen)
    for mine, theirs, trained in zip(*map(jax.tree.leaves, (state.evaluated(), mean, state.trained)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=3e-6)  # x = (y - 0.1 z) / 0.9 in fp32, values to 4
        assert not np.allclose(trained, theirs, atol=1e-5)


def test_the_average_weighs_values_by_age_and_the_initial_ones_not_at_all():
    decay, drawn = 0.9, np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    average = jnp.full(5, 1e6, jnp.float32)  # what the run began with
    one = jax.jit(partial(next_average, decay=decay))
    for update, trained in enumerate(drawn, 1):
        average = one(average, trained, update=jnp.int32(update))
        weights = decay ** np.arange(update)[::-1]
        expected = np.average(drawn[:update].astype(float), axis=0, weights=weights)
        np.testing.assert_allclose(average, expected, atol=1e-5)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_every_state_lies_where_its_values_lie(kind, ema_decay):
    step, _, trained = make(fsdp=2, tp=2, optimizer=KINDS[kind], ema_decay=ema_decay)
    key = jax.random.key(0)
    places = state_places(step, trained, key, step.model.mesh)
    shapes = jax.eval_shape(step.init, trained, key)
    split = 0
    for part, x, place in zip(
        parts(shapes.optimizer, trained), *(jax.tree.leaves(s.optimizer) for s in (shapes, places)), strict=True
    ):
        own = None if part.path is None else get(trained, part.path)
        if own is not None and own.shape == x.shape:
            assert place.is_equivalent_to(own.sharding, x.ndim)
            split += not place.is_fully_replicated
        else:
            assert place.is_fully_replicated and x.size <= max(trained_sizes(trained))
    assert split > 10  # something of the state is shaped like the trained values, and split
    assert (places.average is None) == (ema_decay is None)
    assert ema_decay is None or jax.tree.structure(shapes.average) == jax.tree.structure(trained)


def trained_sizes(trained):
    return [x.size for x in jax.tree.leaves(trained)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_update_changes_the_counters_only(kind):
    step, base, trained = make(optimizer=KINDS[kind], ema_decay=None if kind == "schedule_free" else 0.9)
    state = step.init(trained, jax.random.key(0))
    batch = {name: jnp.asarray(array) for name, array in make_batch(2).items()}
    skipped, _ = jax.jit(step.train)(state, base, batch, np.float32(0.5))
    for name in ("trained", "optimizer", "average"):
        for x, y in zip(*(jax.tree.leaves(getattr(s, name)) for s in (skipped, state)), strict=True):
            if jnp.issubdtype(x.dtype, jnp.integer):
                assert int(x) == int(y) + 1
            else:
                np.testing.assert_array_equal(x, y)


def test_the_schedules_reach_their_ends():
    config = OptimizerConfig(
        learning_rate=1.0, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2, end_fraction=0.25
    )
    rates = np.array([make_schedule(config, 100)(u) for u in range(100)])
    np.testing.assert_allclose(rates[[0, 5, 10]], [0, 0.5, 1])
    assert set(rates[10:80]) == {1.0} and rates[80] < 1
    np.testing.assert_allclose(np.diff(rates[79:]), -0.75 / 20, rtol=1e-4)
    np.testing.assert_allclose(rates[-1], 0.25)
    tenth = np.array([make_schedule(OptimizerConfig(schedule="wsd"), 50)(u) for u in range(50)])
    assert (tenth[:45] == tenth[0]).all() and tenth[-1] == 0 and (tenth[45:] < tenth[0]).all()
    for updates in (1, 2, 3):  # shorter than any share
        assert np.isfinite([make_schedule(config, updates)(u) for u in range(updates)]).all()
