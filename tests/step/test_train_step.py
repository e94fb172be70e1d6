"""The train step: accumulation, adapters' gradients, meshes, rematerialisation."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.architectures import ARCHITECTURES, GLOBAL, SLIDING, Architecture
from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import sharding
from gemma4_tpu.models.gemma4 import Model, hidden_states
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.params import random_params
from gemma4_tpu.models.splash import make_attention
from gemma4_tpu.step.optimizer import make_optimizer
from gemma4_tpu.step.train_step import Step
from gemma4_tpu.training.setup import init_state

LORA = LoraConfig(rank=4, alpha=8.0)
T = 32


def small(kind: str) -> Architecture:
    """An architecture of `ARCHITECTURES` cut to one sliding and one global layer (two of each where KV is shared)."""
    arch = ARCHITECTURES[kind]
    shared = 2 if arch.num_kv_shared_layers else 0
    types = (SLIDING, GLOBAL) * (2 if shared else 1)
    return replace(arch, num_layers=len(types), layer_types=types, num_kv_shared_layers=shared, sliding_window=8)


def mesh_of(fsdp: int, tp: int, cp: int = 1, dp: int = 1) -> jax.sharding.Mesh:
    """A mesh of fake devices."""
    return sharding.make_mesh(fsdp, tp, jax.devices()[: dp * fsdp * cp * tp], dp=dp, cp=cp)


def make(
    kind: str = "tiny", *, fsdp: int = 1, tp: int = 1, cp: int = 1, dp: int = 1, lora: LoraConfig = LORA,
    full: bool = False, rate: float = 1e-2, optimizer: OptimizerConfig | None = None, ema_decay: float | None = None,
    **settings,
):  # fmt: skip
    """(step, base, trained) in fp32 with non-zero lora_b."""
    mesh, what = mesh_of(fsdp, tp, cp, dp), replace(lora, enabled=not full)
    settings = {"attention": make_attention("auto", mesh)} | settings
    model = Model(layout=Layout.of(small(kind), what), compute_dtype=jnp.float32, mesh=mesh, **settings)
    leaves = adapters.trained_leaves(model.layout)
    optimizer = make_optimizer(optimizer or OptimizerConfig(learning_rate=rate), 10, leaves)
    step = Step(model, optimizer, chunk_tokens=16, ema_decay=ema_decay)
    base, trained = weights(kind, fsdp, tp, cp, dp)
    return (step, {}, base) if full else (step, base, trained)


@cache
def weights(kind: str, *shape: int):
    """(base, adapters): made once, since that compiles a program for each shape; no test here donates them."""
    layout, mesh = Layout.of(small(kind), LORA), mesh_of(*shape)
    place = sharding.places(layout, mesh)
    base = random_params(small(kind), layout, place, jnp.float32, 0)
    init = jax.jit(partial(adapters.init, layout), out_shardings=adapters.shardings(layout, mesh))
    trained = jax.tree.map(
        lambda x: jax.device_put(jax.random.normal(jax.random.key(x.size), x.shape) * 0.05, x.sharding)
        if not x.any() else x, init(jax.random.key(1)),
    )  # fmt: skip
    return base, trained


def make_batch(rows: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows [1, rows, T] with very uneven targets: from one token to all."""
    rng = np.random.default_rng(seed)
    cut = rng.integers(8, T - 8, rows)
    places = np.arange(T)
    second = places[None] >= cut[:, None]
    batch = {
        "tokens": rng.integers(3, 500, (rows, T)),
        "targets": rng.integers(3, 500, (rows, T)),
        "segment_ids": np.where(second, 2, 1),
        "positions": np.where(second, places[None] - cut[:, None], places[None]),
    }
    mask = places[None] < np.maximum(1, (np.arange(rows) * T // rows))[:, None]
    return {k: v.astype(np.int32)[None] for k, v in batch.items()} | {"target_mask": mask[None]}


def regroup(batch, microbatches: int):
    return {k: v.reshape(microbatches, -1, T) for k, v in batch.items()}


def started(step, trained):
    """The state before the first update, every array in its place: elsewhere the second update would compile again."""
    return init_state(step, trained, jax.random.key(0), step.model.mesh)


def gradients(step, base, trained, batch, key=0):
    return compiled(step)(step.init(trained, jax.random.key(key)), base, batch)


@cache
def compiled(step):
    """`step.gradients`; another `jax.jit` of it would compile it again."""
    return jax.jit(step.gradients)


def relative_difference(a, b) -> float:
    """Largest difference of any two leaves over the largest value of the leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max() / (np.abs(np.asarray(y)).max() + 1e-30)) for x, y in pairs
    )


@pytest.mark.slow
def test_eight_microbatches_of_one_row_equal_one_of_eight():
    step, base, trained = make()
    batch = make_batch()
    batch["target_mask"][0, 5:] = False  # the last rows of a partial window are empty
    batch["segment_ids"][0, 5:] = 0
    whole = gradients(step, base, trained, batch)
    split = gradients(step, base, trained, regroup(batch, 8))
    assert whole[2] == split[2] == batch["target_mask"].sum()
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-6)
    # the same products summed in another order: fp32 rounding of 160 addends
    assert relative_difference(split[1], whole[1]) < 2e-5


@pytest.mark.parametrize("kind", ["tiny", "tiny_moe", "tiny_e2b"])
@pytest.mark.slow
def test_every_adapted_module_gets_a_gradient(kind):
    step, base, trained = make(kind)
    layout = step.model.layout
    _, grads, _, _ = gradients(step, base, trained, make_batch(4))
    flat = {n: g for leaf in adapters.leaves(layout) for n, g in _named(leaf, grads)}
    arch = step.model.arch
    shared = arch.num_kv_shared_layers
    # q, o, gate, up, down everywhere; one of kv/k where keys are computed; two arrays each
    assert len(flat) == 2 * (5 * arch.num_layers + (arch.num_layers - shared))
    assert any("k_einsum" in n for n in flat) == arch.k_eq_v
    dead = [n for n, g in flat.items() if not np.abs(g).max() > 0]
    assert not dead


def _named(leaf, tree):
    node = tree
    for key in leaf.path:
        node = node[key]
    return zip(leaf.tunix_names, np.asarray(node), strict=True)


@pytest.mark.parametrize("remat", ["products", "attention", "decoder"])
@pytest.mark.parametrize("kind", ["tiny", "tiny_e2b"])
def test_remat_changes_nothing_but_memory(kind, remat):
    plain, again = without_remat(kind), gradients(*make(kind, remat=remat), make_batch(2))
    np.testing.assert_allclose(again[0], plain[0], rtol=1e-6)
    assert relative_difference(again[1], plain[1]) < 1e-5  # recomputed in fp32, fused otherwise


def test_loops_of_as_many_rounds_keep_arrays_of_other_shapes():
    """Where they had the same, the TPU compiler would fill all of them with zeros first, see `remat.keep`."""
    arch = replace(
        ARCHITECTURES["tiny_e2b"], num_layers=10, layer_types=(SLIDING, GLOBAL) * 5, num_kv_shared_layers=4,
        kv_shared_hidden_dim=None,
    )  # fmt: skip
    model = Model(layout=Layout.of(arch, LORA), compute_dtype=jnp.float32, remat="products")
    assert [stage.repeats for stage in model.layout.stages] == [2, 1, 2]
    params = model.layout.tree(lambda leaf: jax.ShapeDtypeStruct(leaf.array_shape, jnp.float32))
    lora = jax.eval_shape(partial(adapters.init, model.layout), jax.random.key(0))
    row = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def summed(lora, params, tokens):
        return hidden_states(model, params, lora, tokens, tokens, tokens).sum()

    program = jax.make_jaxpr(jax.grad(summed))(lora, params, row)
    loops = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    first, second = ({out.aval.shape for out in loop.outvars if out.aval.ndim > 3} for loop in loops[:2])
    for wide in ((2, 1, T, arch.embed_dim), (2, 1, T, arch.hidden_dim)):
        assert wide in first and wide not in second


@cache
def without_remat(kind):
    return gradients(*make(kind), make_batch(2))


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (4, 1), (2, 2)])
@pytest.mark.slow
def test_losses_agree_across_meshes(shape):
    np.testing.assert_allclose(losses_on(*shape), losses_on(1, 1), atol=1e-5)


@cache
def losses_on(fsdp: int, tp: int) -> list[float]:
    """Of three updates on a mesh.

    Adam moves a weight by the learning rate however small its gradient: where that is rounding, another order of adding
    (which threads choose anew in each run) moves it elsewhere. At 1e-2 losses of 7 differ by up to 1.4e-5 for that.
    """
    step, base, trained = make(fsdp=fsdp, tp=tp, rate=1e-3)
    state, train = started(step, trained), jax.jit(step.train)
    losses = []
    for seed in range(3):
        place = sharding.batch(step.model.mesh)
        arrays = {k: jax.device_put(v, place) for k, v in make_batch(seed=seed).items()}
        state, metrics = train(state, base, arrays)
        losses.append(float(metrics.loss))
    return losses


def test_dropout_is_reproducible_and_off_in_evaluation():
    lora = replace(LORA, dropout=0.5)
    step, base, trained = make(lora=lora, lora_dropout=0.5)
    batch = make_batch(4)
    first, again, other = (float(gradients(step, base, trained, batch, key)[0]) for key in (0, 0, 1))
    assert first == again != other
    dry, dry_base, _ = make(lora=lora)
    expected, count, _ = jax.jit(dry.evaluate)(trained, dry_base, batch)
    summed, _, _ = jax.jit(step.evaluate)(trained, base, batch)
    assert summed == expected
    assert first != pytest.approx(float(expected) / int(count), rel=1e-6)


def test_dropout_differs_between_layers_modules_and_microbatches():
    """With everything else equal, masks drawn from one key would repeat; the update must see independent ones."""
    step, base, trained = make(lora_dropout=0.5)
    row = {k: v[:, :1] for k, v in make_batch(1).items()}
    twice = {k: np.concatenate([v, v]) for k, v in row.items()}  # two microbatches of the same row
    state = step.init(trained, jax.random.key(0))
    single, double = (float(compiled(step)(state, base, b)[0]) for b in (row, twice))
    assert single != double


def test_full_fine_tuning_trains_every_weight():
    step, base, trained = make(full=True)
    state = step.init(trained, jax.random.key(0))
    before = jax.tree.map(np.asarray, trained)
    state, metrics = jax.jit(step.train)(state, base, make_batch(4))
    assert np.isfinite(metrics.loss) and metrics.grad_norm > 0
    unmoved = [str(path) for (path, a), b in
               zip(jax.tree_util.tree_leaves_with_path(state.trained), jax.tree.leaves(before), strict=True)
               if (np.asarray(a) == b).all()]  # fmt: skip
    assert not unmoved


def test_loss_falls_on_one_batch():
    step, base, trained = make()
    state, train, batch = started(step, trained), jax.jit(step.train), make_batch(4)
    losses = []
    for _ in range(8):
        state, metrics = train(state, base, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("kind", ["tiny", "tiny_moe", "tiny_e2b"])
def test_packed_rows_have_the_total_loss_of_padded_ones(kind):
    step, base, trained = make(kind)
    rng = np.random.default_rng(2)
    lengths = [13, 7, 11]
    pieces = [(rng.integers(3, 500, n), rng.integers(3, 500, n), rng.random(n) < 0.7) for n in lengths]

    def rows(groups):
        batch = {k: np.zeros((len(groups), T), np.int32) for k in ("tokens", "targets", "segment_ids", "positions")}
        batch["target_mask"] = np.zeros((len(groups), T), bool)
        for row, group in enumerate(groups):
            start = 0
            for segment, (tokens, targets, mask) in enumerate(group, 1):
                part = slice(start, start + len(tokens))
                values = (tokens, targets, mask, segment, np.arange(len(tokens)))
                for key, value in zip(
                    ("tokens", "targets", "target_mask", "segment_ids", "positions"), values, strict=True
                ):
                    batch[key][row, part] = value
                start = part.stop
        return batch

    loss = jax.jit(lambda batch: step.summed_loss(trained, base, batch, None)[0])
    packed, padded = loss(rows([pieces])), loss(rows([[piece] for piece in pieces]))
    np.testing.assert_allclose(packed, padded, rtol=1e-5)  # fp32: the same 20-odd terms, masked zeros between them
