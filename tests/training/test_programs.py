"""Programs are compiled once per row length; anything else is an error that shows the shapes."""

import jax
import pytest

from gemma4_tpu.training.programs import Programs, Recompilation
from gemma4_tpu.training.setup import init_state, to_mesh
from tests.step.test_train_step import make, make_batch


def test_other_shapes_are_an_error_that_shows_them():
    step, base, trained = make(fsdp=2, tp=2)

    def batch(rows):
        return to_mesh(make_batch(rows), step.model.mesh)

    state = init_state(step, trained, jax.random.key(0), step.model.mesh)
    programs = Programs(step, state, [32])
    state, _ = programs.train(state, base, batch(4))
    first = programs.compile_seconds
    assert first > 0
    state, _ = programs.train(state, base, batch(4))
    assert programs.compile_seconds == first
    with pytest.raises(Recompilation, match=r"\(1, 4, 32\).*given.*\(1, 2, 32\)"):
        programs.train(state, base, batch(2))
    longer = {name: array.repeat(2, axis=-1) for name, array in batch(4).items()}
    with pytest.raises(Recompilation, match="T=64"):
        programs.train(state, base, longer)


def test_a_state_in_other_places_is_an_error():
    step, base, trained = make(fsdp=2, tp=2)
    state = init_state(step, trained, jax.random.key(0), step.model.mesh)
    programs = Programs(step, state, [32])
    batch = to_mesh(make_batch(4), step.model.mesh)
    state, _ = programs.train(state, base, batch)
    everywhere = jax.sharding.NamedSharding(step.model.mesh, jax.sharding.PartitionSpec())
    with pytest.raises(Recompilation, match="placement"):
        programs.train(state, jax.device_put(base, everywhere), batch)
