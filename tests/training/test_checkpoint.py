"""Checkpoints: which are kept, across restarts too, and that they restore exactly on any mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.config.schema import OptimizerConfig
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import get
from gemma4_tpu.step.optimizer import make_optimizer, next_average
from gemma4_tpu.step.train_step import Step
from gemma4_tpu.training.checkpoint import Checkpoints
from gemma4_tpu.training.saved import open_saved
from gemma4_tpu.training.setup import init_state
from gemma4_tpu.training.state_on_disk import saved_bytes
from tests.models import test_experts as experts
from tests.step.test_optimizer import KINDS
from tests.step.test_train_step import make, make_batch

POSITION = {"pipeline": {"place": 7}, "totals": {"seconds": 1.5}}


def open_folder(folder, step, keep_best=True, keep=2) -> Checkpoints:
    config = CheckpointConfig(keep=keep, keep_best=keep_best)
    return Checkpoints(folder, config, adapters.leaves(step.model.layout), step.model.mesh)


def save_several(folder, losses: dict[int, float]) -> None:
    """A checkpoint for each update, with its held-out loss."""
    step, _, trained = make()
    state = init_state(step, trained, jax.random.key(0), step.model.mesh)
    checkpoints = open_folder(folder, step, keep=len(losses))
    for update, loss in losses.items():
        checkpoints.save(state._replace(update=state.update * 0 + update), POSITION, loss)
    checkpoints.close()


@pytest.mark.parametrize(("keep_best", "kept"), [(True, [2, 5, 6]), (False, [5, 6])])
def test_the_latest_and_the_best_are_kept_across_restarts(tmp_path, keep_best, kept):
    step, _, trained = make()
    state = init_state(step, trained, jax.random.key(0), step.model.mesh)
    for losses in ({1: 3.0, 2: 1.0, 3: 2.0}, {4: 2.5, 5: None, 6: 1.5}):
        checkpoints = open_folder(tmp_path / "checkpoints", step, keep_best)
        for update, loss in losses.items():
            checkpoints.save(state._replace(update=state.update * 0 + update), POSITION, loss)
        checkpoints.wait()
        checkpoints.close()
    assert open_folder(tmp_path / "checkpoints", step).updates == kept


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1), (2, 2, 2)])
def test_restores_exactly_on_another_mesh(tmp_path, shape):
    step, _, trained = make(fsdp=2, tp=4)
    state = init_state(step, trained, jax.random.key(5), step.model.mesh)
    noise = iter(range(10_000))
    filled = jax.tree.map(
        lambda x: x + jax.random.normal(jax.random.key(next(noise)), x.shape) if x.ndim else x, state.optimizer
    )
    state = state._replace(optimizer=filled, update=state.update + 3)
    first = open_folder(tmp_path / "checkpoints", step)
    first.save(state, POSITION, 1.0)
    first.wait()
    first.close()

    other, _, fresh = make(fsdp=shape[0], tp=shape[1], cp=shape[2])
    like = init_state(other, fresh, jax.random.key(0), other.model.mesh)
    restored, position = open_folder(tmp_path / "checkpoints", other).restore(3, like)
    assert position == POSITION
    assert int(restored.update) == 3
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))
    for group in ("trained", "optimizer"):
        for mine, theirs, place in zip(
            *(jax.tree.leaves(getattr(s, group)) for s in (restored, state, like)), strict=True
        ):
            assert mine.sharding.is_equivalent_to(place.sharding, mine.ndim)
            if mine.ndim:  # AdamW's counters are those of the update
                np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.mark.parametrize(("kind", "ema_decay"), [*((kind, None) for kind in KINDS), ("muon", 0.9)])
def test_every_optimizer_goes_on_from_the_very_state_it_was_saved_in(tmp_path, kind, ema_decay):
    """Counters included; `trained` on disk, which merges read, is what the run stands for."""
    settings = {"optimizer": replace(KINDS[kind], warmup_updates=1), "ema_decay": ema_decay}
    step, _, trained = make(fsdp=2, tp=2, **settings)
    fresh = init_state(step, trained, jax.random.key(0), step.model.mesh)
    state = fresh
    for _ in range(2):
        state = updated(step, state)
    (tmp_path / "config.yaml").touch()
    first = open_folder(tmp_path / "checkpoints", step)
    first.save(state, POSITION)
    first.close()

    restored, _ = open_folder(tmp_path / "checkpoints", step).restore(2, fresh)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for (path, mine), theirs, place in zip(
        jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True
    ):
        if not jnp.issubdtype(mine.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(mine, theirs, err_msg=jax.tree_util.keystr(path))
        assert mine.sharding.is_equivalent_to(place.sharding, mine.ndim), path

    saved, leaf = open_saved(tmp_path, "latest"), next(adapters.leaves(step.model.layout))
    stands_for = leaf_of(state.evaluated(), leaf)
    np.testing.assert_array_equal(saved.read(leaf.tunix_names[0]), stands_for[0])
    averaged = ema_decay is not None or kind == "schedule_free"
    assert averaged == (not np.array_equal(stands_for, leaf_of(state.trained, leaf)))
    values = sum(x.size for x in jax.tree.leaves(trained)) * 4
    copies = {"adamw": 3, "adafactor": 2, "lion": 2, "muon": 2, "schedule_free": 4}[kind] + (ema_decay is not None)
    assert saved_bytes(state, adapters.leaves(step.model.layout)) == pytest.approx(copies * values, rel=0.01)


@jax.jit
def _gradients(trained):
    return jax.tree.map(lambda x: jnp.sin(100 * x), trained)


def updated(step, state):
    """After an update with gradients out of the air."""
    changes, optimizer = jax.jit(step.optimizer.update)(_gradients(state.trained), state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, changes)
    average = None if step.ema_decay is None else next_average(state.average, trained, step.ema_decay, state.update + 1)
    return state._replace(trained=trained, optimizer=optimizer, average=average, update=state.update + 1)


def leaf_of(tree, leaf) -> np.ndarray:
    return np.asarray(get(tree, leaf.path))


@pytest.mark.slow
def test_adapters_of_experts_go_on_to_the_bit(tmp_path):
    mesh = experts.mesh_of(2, 2, 2)
    layout, base, trained = experts.trained(experts.small(), experts.LORA, mesh)
    model = Model(layout=layout, compute_dtype=np.float32, mesh=mesh)
    step = Step(
        model, make_optimizer(OptimizerConfig(learning_rate=1e-3), 10, tuple(adapters.leaves(layout))), chunk_tokens=16
    )
    train, batch = jax.jit(step.train), make_batch(4)
    like = init_state(step, trained, jax.random.key(0), mesh)
    state, _ = train(like, base, batch)
    checkpoints = open_folder(tmp_path / "checkpoints", step)
    checkpoints.save(state, POSITION, 1.0)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, like)
    checkpoints.close()
    (whole, loss), (again, same_loss) = (train(one, base, batch) for one in (state, restored))
    assert float(loss.loss) == float(same_loss.loss)
    for mine, theirs in zip(jax.tree.leaves(again.trained), jax.tree.leaves(whole.trained), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
        assert mine.sharding == theirs.sharding
