"""The real TPU compiler on a small model with the released sizes' features: splash attention, loops, a mesh."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import gemma4_tpu
from gemma4_tpu.architectures import ARCHITECTURES, GLOBAL, SLIDING
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig, TrainerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import SLICES, MeshSizes
from gemma4_tpu.models import splash
from gemma4_tpu.models.grouped import InStack, grouped
from gemma4_tpu.models.sharding import make_mesh
from gemma4_tpu.planning import compile as compiling
from gemma4_tpu.planning import counts, hlo
from gemma4_tpu.planning.calibration import ScheduleRates
from gemma4_tpu.planning.kernels import TARGET
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.program import USED, OutOfMemory, compile_lowered, finish, until_assigned, used_bytes
from gemma4_tpu.planning.schedule import PARTS, from_plain
from gemma4_tpu.planning.topology import ENVIRONMENT, absent_devices
from gemma4_tpu.planning.walk import walk
from gemma4_tpu.training.meshes import legal_meshes
from gemma4_tpu.training.recipe import Recipe
from tests.tpu_compiler import needs_tpu_compiler

pytestmark = needs_tpu_compiler
ARCH = replace(
    ARCHITECTURES["gemma4_31b"], num_layers=2, layer_types=(SLIDING, GLOBAL), embed_dim=256, hidden_dim=512,
    num_heads=4, num_kv_heads=4, head_dim=128, num_global_kv_heads=2, global_head_dim=256, vocab_size=1024,
    sliding_window=256,
)  # fmt: skip
T = 512


@pytest.fixture(scope="module", autouse=True)
def environment():
    before = {key: os.environ.get(key) for key in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    yield
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


def shapes(slice_name, *, rows=2, fsdp=2, tp=2, quantize=None):
    recipe = Recipe(
        arch=ARCH, hardware=HardwareConfig(), lora=LoraConfig(rank=8, quantize=quantize), optimizer=OptimizerConfig(),
        trainer=TrainerConfig(remat="none"), mesh=MeshSizes(1, fsdp, tp), rows=rows, length=T, updates=10,
    )  # fmt: skip
    return compiling.shapes(recipe, make_mesh(fsdp, tp, absent_devices(SLICES[slice_name])))


def read(given, program, slice_name="v6e-4"):
    places = [device.coords for device in given.state.update.sharding.mesh.devices.flat]
    return compiling.read(program, given, Grid.of(SLICES[slice_name], places))


@pytest.mark.slow
@pytest.mark.parametrize("slice_name", ["v5p-8", "v6e-4"])
def test_a_real_step_compiles_for_a_slice_that_is_not_there(slice_name, tmp_path):
    given = shapes(slice_name)
    lowered = compiling.lower_step(given)
    told = read(given, finish(lowered, tmp_path / "whole"), slice_name)
    held = given.bytes_per_chip()
    assert sum(held.values()) <= told.argument_bytes < 1.1 * sum(held.values())  # the rest: layouts' padding
    assert told.argument_bytes < told.peak_bytes
    # No loop has more than one round here, so XLA's own count must agree, attention kernels aside.
    arithmetic = told.counts["matmul_flops"] + told.counts["other_flops"]
    assert arithmetic == pytest.approx(told.cost_analysis["flops"], rel=0.02)
    # Splash: one block in the sliding and the global layer; 2 + 3 + 4 products of [T, T, width], two heads per chip.
    assert told.counts["kernel_flops"] == 9 * 2 * 2 * T * T * (ARCH.head_dim + ARCH.global_head_dim)
    assert {one["window"]: one["flops"] for one in told.counts["attention"]} == {
        ARCH.sliding_window: 9 * 2 * 2 * T * T * ARCH.head_dim,
        None: 9 * 2 * 2 * T * T * ARCH.global_head_dim,
    }
    assert told.counts["hbm_traffic_bytes"] > held["base"]  # every weight is read at least once
    assert not told.counts["not_counted"]
    assert told.counts["collectives"]["reduce-scatter"]["count"] and told.counts["link_bytes"]

    # Stopped where memory is assigned, the compiler tells the same, but for its cycles.
    limit = compiling.hbm_limit_bytes(absent_devices(SLICES[slice_name])[0])
    early = read(given, until_assigned(lowered, tmp_path / "part", limit), slice_name)
    assert early.cost_analysis == {}, "the files of this compiler's dump are not known: plans take minutes"
    assert replace(early, **LATER) == replace(told, **LATER)
    check_schedule(told, slice_name)


LATER = {"cost_analysis": {}, "schedule": []}


def check_schedule(told, slice_name):
    """The compiler's schedule is read: what takes time has cycles, and a place in our source."""
    ops = from_plain(told.schedule)
    walked = walk(ops, ScheduleRates.of(SLICES[slice_name]))
    peak = SLICES[slice_name].chip.peak_flops_per_second
    assert walked.seconds > told.counts["flops"] / peak  # a roofline is a lower bound
    assert sum(walked.parts.values()) == pytest.approx(walked.seconds)
    assert set(walked.parts) <= set(PARTS)
    for part in ("base_products", "lora", "attention", "optimizer", "collectives_exposed"):
        assert walked.parts[part], part
    started = {op.starts for op in ops if op.starts}
    assert {op.waits_for for op in ops if op.waits_for} == started  # nothing is waited for in vain, or forgotten
    assert sum(op.transfer.sent_bytes for op in ops if op.transfer) == pytest.approx(
        sum(kind["bytes"] for kind in told.counts["collectives"].values())
    )
    placed = sum(seconds for (_, _, place), seconds in walked.operations.items() if place)
    assert placed > 0.8 * walked.seconds


@pytest.mark.slow
def test_a_program_over_the_limit_is_left_to_the_compilers_judgement(tmp_path):
    given = shapes("v6e-4")
    told = until_assigned(compiling.lower_step(given), tmp_path, 1)  # one byte of HBM
    assert told.cost_analysis  # compiled to the end


def test_quantised_weights_take_their_own_size():
    plain, nf4 = (shapes("v6e-4", quantize=q).bytes_per_chip() for q in (None, "nf4"))
    table = ARCH.vocab_size * ARCH.embed_dim * 2 / 4  # bfloat16 over four chips
    adapted = plain["base"] - table
    assert adapted / 5 < nf4["base"] - table < adapted / 3  # 4 bits, a scale for every 64, small unadapted arrays
    assert nf4["lora"] == plain["lora"]


@pytest.mark.slow
def test_a_step_that_does_not_fit(tmp_path):
    given = shapes("v6e-4", rows=2**18)  # 64 million tokens on each chip
    with pytest.raises(OutOfMemory) as caught:
        until_assigned(compiling.lower_step(given), tmp_path, int(31.25 * 2**30))
    assert caught.value.limit_bytes == 31.25 * 2**30
    assert caught.value.needed_bytes > 100 * 2**30
    # What the compiler holds against the limit is what we read of its files; it prints two decimals, of TiB here.
    (report,) = tmp_path.glob(USED)
    assert caught.value.needed_bytes == pytest.approx(used_bytes(report.read_text()), abs=0.005 * 2**40)


def test_out_of_memory_is_told_in_the_compilers_figures():
    place = jax.sharding.SingleDeviceSharding(absent_devices(SLICES["v6e-4"])[0])
    huge = jax.ShapeDtypeStruct((2**18, 2**18), jnp.float32, sharding=place)  # 256 GiB
    with pytest.raises(OutOfMemory) as caught:
        compile_lowered(jax.jit(lambda x: jnp.sin(x) @ x).lower(huge))
    assert caught.value.limit_bytes == 31.25 * 2**30
    assert 256 * 2**30 <= caught.value.needed_bytes <= 4 * 256 * 2**30


def test_an_option_that_the_compiler_does_not_have_is_refused():
    place = jax.sharding.SingleDeviceSharding(absent_devices(SLICES["v6e-4"])[0])
    small = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=place))
    with pytest.raises(UserError, match=r"hardware\.compiler_options: the compiler has no option 'xla_tpu_no_such'"):
        compile_lowered(small, {"xla_tpu_no_such": True})


@pytest.mark.parametrize(
    ("message", "needed", "limit"),
    [
        ("total memory required for HLO temporaries (602.31G) exceeds available HBM (31.25G).", 602.31, 31.25),
        ("Ran out of memory in memory space hbm. Used 40.12G of 31.25G hbm. Exceeded by 8.87G.", 40.12, 31.25),
        ("the total memory required for HLO arguments (1.5T) exceeds available HBM (95.74G).", 1536, 95.74),
    ],
)
def test_both_of_the_compilers_messages_are_read(message, needed, limit):
    error = OutOfMemory(f"RESOURCE_EXHAUSTED: {message}")
    assert error.needed_bytes == int(needed * 2**30)
    assert error.limit_bytes == int(limit * 2**30)


def test_a_kernel_that_asks_for_too_much_on_chip_memory_says_nothing_of_hbm():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.50M of 16.00M vmem."
    assert OutOfMemory(message).needed_bytes is OutOfMemory(message).limit_bytes is None


ON_TPUS = {name: known for name, known in SLICES.items() if known.topology}


@pytest.mark.parametrize("name", ON_TPUS)
def test_every_tpu_slice_is_known_to_the_compiler(name):
    known = SLICES[name]
    devices = absent_devices(known)
    for sizes in legal_meshes(ARCH, known.devices):  # JAX lays each of them out, as training does
        mesh = make_mesh(sizes.fsdp, sizes.tp, devices, dp=sizes.dp)
        assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in devices)
    assert (
        Grid.of(known, [device.coords for device in devices]).sizes
        == tuple(1 + max(place) for place in zip(*(device.coords for device in devices), strict=True))[
            : len(Grid.of(known, []).sizes)
        ]
    )
    assert len(devices) == known.devices
    assert devices[0].device_kind.lower().startswith(known.chip.device_kinds)


@pytest.mark.parametrize("name", {known.chip.name: name for name, known in ON_TPUS.items()}.values())
def test_the_compiler_gives_every_kind_of_chip_its_hbm(name):
    """In the largest slice of each kind: the limit is a chip's, and to be told it a program is compiled."""
    known = SLICES[name]
    (device, *_) = absent_devices(known)
    assert compiling.hbm_limit_bytes(device) == pytest.approx(known.chip.device.hbm_bytes, rel=0.001)


def test_experts_of_a_stack_are_read_where_they_lie():
    """Forward and backward, either way round: nothing makes an array of one layer's experts."""
    layers, experts, hidden, dim, rows = 3, 8, 64, 256, 1024
    place = jax.sharding.SingleDeviceSharding(absent_devices(SLICES["v5p-8"])[0])

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    def run(x, up, down, sizes):
        def layer(x, number):
            held = [InStack(stack, number, interpret=False) for stack in (up, down)]
            return grouped(grouped(x, held[0], sizes, last=True), held[1], sizes, last=False), None

        return jnp.sum(jax.lax.scan(layer, x, jnp.arange(layers))[0].astype(jnp.float32))

    stack = shape(layers, experts, hidden, dim)
    given = shape(rows, dim), stack, stack, shape(experts, dtype=jnp.int32)
    module = hlo.parse(compile_lowered(jax.jit(jax.value_and_grad(run)).lower(*given)).as_text())
    inside = [(within, one) for within in module.computations.values() for one in within.instructions.values()]
    of_a_layer = experts * hidden * dim
    assert not [one.name for _, one in inside for array in one.arrays if array.elements == of_a_layer]
    counting = counts.Counting(module)
    works = [counting.instruction(within, one) for within, one in inside if f'"{TARGET}"' in one.attributes]
    # Two products forward and two backward, of which each reads a layer's experts once.
    assert [work.kernel_flops for work in works] == [2 * rows * hidden * dim] * 4
    assert [work.traffic.hbm for work in works] == [2 * (rows * hidden + rows * dim + of_a_layer)] * 4


@pytest.mark.slow
def test_a_larger_block_of_attention_does_not_compile_for_a_v5p(monkeypatch):
    """Of a global layer, backward: why `splash.BLOCK` is what it is."""
    monkeypatch.setattr(splash, "BLOCK", 2 * splash.BLOCK)
    mesh = make_mesh(1, 1, absent_devices(SLICES["v5p-8"])[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    of = [((1, 4096, heads, 512), jnp.bfloat16) for heads in (4, 1)] + [((1, 4096), jnp.int32)]
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in of]

    def total(q, kv, segments):
        return splash.splash_attention(q, kv, kv, segments, None, mesh=mesh, interpret=False).astype(jnp.float32).sum()

    with pytest.raises(OutOfMemory, match="vmem"):
        compile_lowered(jax.jit(jax.grad(total, (0, 1))).lower(*given))


LOWER = """
from gemma4_tpu.planning.topology import absent_devices, set_environment
set_environment()
import jax, jax.numpy as jnp
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.models.grouped import InStack, grouped
place = jax.sharding.SingleDeviceSharding(absent_devices(SLICES["v6e-1"])[0])
rows, stack, sizes = (
    jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for shape, dtype in (((128, 128), jnp.bfloat16), ((2, 2, 128, 128), jnp.bfloat16), ((2,), jnp.int32))
)
run = lambda rows, stack, sizes: grouped(rows, InStack(stack, jnp.int32(1), interpret=False), sizes, last=True)
print(jax.jit(run).lower(rows, stack, sizes).as_text())
"""


def test_a_program_is_the_same_wherever_the_package_lies(tmp_path):
    """Its kernels name the files that they come from; what was compiled for one checkout is known in another."""
    package = Path(gemma4_tpu.__file__).parent
    shutil.copytree(package, tmp_path / "gemma4_tpu", ignore=shutil.ignore_patterns("__pycache__"))
    texts = [
        subprocess.run(
            [sys.executable, "-c", LOWER], env={**os.environ, "PYTHONPATH": str(folder)}, cwd=tmp_path.parent,
            capture_output=True, text=True, check=True,
        ).stdout
        for folder in (package.parent, tmp_path)
    ]  # fmt: skip
    assert "tpu_custom_call" in texts[0]
    assert texts[0] == texts[1]
