"""int8 products of frozen weights: against the values that codes stand for, on meshes, and in the train step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.int8 import runs
from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models import int8, quantize, sharding
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.weights import BY_NAME
from tests.step.test_adapter_kinds import make
from tests.step.test_train_step import gradients, make_batch, relative_difference

LORA = LoraConfig(rank=4, quantize="int8_compute")


def first_layers(mesh):
    """(its row, its part of a quantised stack) of every kind of weight that is adapted."""
    found = {}
    for leaf in Layout.of(ARCHITECTURES["tiny"], LORA).leaves():
        if quantize.is_quantized(leaf, LORA) and leaf.weight.name not in found:
            drawn = jax.random.normal(jax.random.key(len(found)), leaf.array_shape, jnp.float32) / 16
            held = quantize.quantizer(leaf, "int8_compute", mesh)(drawn)
            assert isinstance(held, int8.Int8Weight)
            found[leaf.weight.name] = leaf.weight, jax.tree.map(lambda x: x[0], held)
    return list(found.values())


@pytest.mark.parametrize(("fsdp", "tp"), [(1, 4), (2, 2)])
def test_products_are_those_of_the_values_that_codes_stand_for(fsdp, tp):
    """Values, and gradients as though x were not rounded; a token of zeros, which has no scale."""
    weights = first_layers(sharding.make_mesh(fsdp, tp, jax.devices()[: fsdp * tp]))
    rows, held = zip(*weights, strict=True)
    sizes = [dict(zip(row.dims, own.shape, strict=True)) for row, own in weights]
    shapes = [(2, 8, *(size[dim] for dim in row.inputs)) for row, size in zip(rows, sizes, strict=True)]
    inputs = [jax.random.normal(jax.random.key(i), shape).at[0, 0].set(0.0) for i, shape in enumerate(shapes)]
    mesh = held[0].qvalue.sharding.mesh

    def ours(x, own, row):
        return int8.products((row,), mesh, row.inputs == "d", x, [own])[0]

    def by_values(x, own, row):
        codes, scale = int8.quantised(x, range(2, x.ndim))
        x = x + jax.lax.stop_gradient(codes * scale - x)
        return jnp.einsum(row.equations[0], x, quantize.dense(own, jnp.float32))

    def of_all(product, inputs, held):
        made = []
        for x, own, row in zip(inputs, held, rows, strict=True):
            y, back = jax.vjp(lambda x, own=own, row=row: product(x, own, row), x)
            made.append((y, *back(jnp.cos(y))))
        return made

    found, wanted = (jax.jit(of_all, static_argnums=0)(product, inputs, held) for product in (ours, by_values))
    for row, both, values in zip(rows, found, wanted, strict=True):
        for got, value in zip(both, values, strict=True):
            # fp32: sums of up to 256 addends in another order, the gradient's of values that differ by as much
            np.testing.assert_allclose(got, value, atol=5e-6 * float(jnp.abs(value).max()), err_msg=row.name)


def test_codes_travel_between_chips_and_int32_does_not():
    """Of tokens one byte for a value, of sums the compute dtype's."""
    mesh = sharding.make_mesh(1, 4, jax.devices()[:4])

    def array(dtype, shape, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    up, down = BY_NAME["mlp.up_proj.kernel"], BY_NAME["mlp.down_proj.kernel"]
    of_up = int8.Int8Weight(array("int8", (64, 256), None, "tp"), array("float32", (1, 256), None, "tp"))
    of_down = int8.Int8Weight(array("int8", (256, 64), "tp"), array("float32", (1, 64)))

    def mlp(x, of_up, of_down):
        (y,) = int8.products((up,), mesh, True, sharding.constrain(jnp.sin(x), "BSD", mesh), [of_up])
        return sharding.constrain(int8.products((down,), mesh, False, jnp.tanh(y), [of_down])[0], "BSD", mesh)

    text = jax.jit(mlp).lower(array("float32", (2, 16, 64), None, "tp"), of_up, of_down).compile().as_text()
    sent = re.findall(r" = (\w+)\[2,16,64\]\S* (all-gather|all-reduce|reduce-scatter)\(", text)
    assert len(sent) == 2 and dict(sent)["s8"] == "all-gather" and "s32" not in dict(sent)


@pytest.mark.slow
def test_meshes_and_remat_change_only_what_falls_on_the_edge_of_a_code():
    """Sums in another order (1e-7) can move a code by one: 1/127 of a token's largest value, in one of 64 addends."""
    batch = make_batch(2)
    alone = gradients(*make(LORA), batch)
    for fsdp, tp, remat in ((1, 4, "products"), (2, 2, "decoder")):
        step, base, trained = make(LORA, fsdp=fsdp, tp=tp, remat=remat)
        place = sharding.batch(step.model.mesh)
        split = gradients(step, base, trained, {name: jax.device_put(value, place) for name, value in batch.items()})
        np.testing.assert_allclose(split[0], alone[0], rtol=1e-4)
        assert relative_difference(split[1], alone[1]) < 0.01


@pytest.mark.slow
def test_adapters_that_add_nothing_leave_the_base_as_it_is():
    """A reference runs without adapters, by another way; the first loss of DPO compares both."""
    step, base, _ = make(LORA)
    rows = {name: value[0] for name, value in make_batch(2).items()}
    fresh = adapters.init(step.model.layout, jax.random.key(1), base)
    with_none = jax.jit(lambda tree: step.summed_loss(tree, base, rows, None)[0])
    np.testing.assert_allclose(with_none(fresh), with_none({}), rtol=1e-6)


@pytest.mark.slow
def test_a_run_ends_where_it_would_in_bf16():
    """The held-out loss after the same updates is nearer to bf16's than those of bf16 runs with other seeds are."""
    short = ("data.max_rows=200", "data.heldout=[]", "data.heldout_fraction=0.2")
    plain, (ours,) = runs("bf16", 10, range(3), *short), runs("int8_compute", 10, [0], *short)
    between = [one.after for one in plain]
    spread = max(between) - min(between)
    assert ours.after < 0.5 * plain[0].before  # it has learned
    assert abs(ours.after - plain[0].after) < spread, (ours, plain)
