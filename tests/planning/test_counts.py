"""Counting in the compiled program: as XLA counts where there are no loops, as the unrolled program where there are."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig, TrainerConfig
from gemma4_tpu.data.packing import pack
from gemma4_tpu.hardware import SLICES, MeshSizes
from gemma4_tpu.hf_config import pattern
from gemma4_tpu.models.sharding import make_mesh
from gemma4_tpu.planning import compile as compiling
from gemma4_tpu.planning import counts, hlo, origins, schedule
from gemma4_tpu.planning.fill import Fill
from gemma4_tpu.planning.kernels import Mask
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.step.train_step import compiled_functions
from gemma4_tpu.training.recipe import Recipe
from tests.data.test_packing import codev_lengths

SQUARE = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
RING = [(0, 0), (1, 0), (1, 1), (0, 1)]
SQUARES = [(x, y, z) for z in range(4) for x in range(2) for y in range(2)]
"""Where the devices of a mesh lie, as JAX orders them."""


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(*s) if isinstance(s, tuple) else s for s in shapes)).compile()


def counted(program):
    return counts.count(hlo.parse(program.as_text()))


def text_of(name):
    """HLO as the TPU compiler writes it, shortened by hand."""
    return (Path(__file__).parent / "texts" / f"{name}.hlo").read_text(encoding="utf-8")


def mlp(x, w1, w2):
    return jnp.maximum(x @ w1, 0.0) @ w2


def attention(q, k, v):
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, axis=-1), v)


def convolution(x, w):
    return jax.lax.conv_general_dilated(x, w, (2, 1), ((1, 2), (0, 3)), rhs_dilation=(1, 2))


F32, QKV = jnp.float32, ((2, 128, 4, 64), jnp.float32)
PROGRAMS = {
    "mlp": (mlp, ((256, 512), F32), ((512, 1024), F32), ((1024, 256), F32)),
    "attention": (attention, QKV, QKV, QKV),
    "gradient": (jax.grad(lambda *a: mlp(*a).sum(), (1, 2)), ((256, 512), F32), ((512, 1024), F32), ((1024, 256), F32)),
    "convolution": (convolution, ((2, 8, 32, 24), F32), ((16, 8, 3, 4), F32)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_without_loops_count_as_xla_counts_them(name):
    program = compiled(*PROGRAMS[name])
    ours, xla = counted(program), program.cost_analysis()
    # 2%: reductions and broadcasts inside fusions, where conventions differ by an operation per element.
    assert ours.flops == pytest.approx(xla["flops"], rel=0.02)
    # 5%: XLA counts an operand again for every reader of certain kinds in a fusion.
    assert ours.traffic.accessed == pytest.approx(xla["bytes accessed"], rel=0.05)
    assert not ours.unknown_loops


def test_a_loop_counts_as_often_as_it_runs_and_reads_only_its_slice():
    def chain(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    layers, width = 7, 256
    program = compiled(chain, ((64, width), F32), ((layers, width, width), F32))
    ours = counted(program)
    assert ours.matmul_flops == layers * 2 * 64 * width * width
    assert program.cost_analysis()["flops"] < ours.flops / (layers - 1)  # the reason for counting ourselves
    weights = layers * width * width * 4
    # Each weight is copied or read a few times, and never the whole stack in each of the seven rounds.
    assert weights <= ours.traffic.accessed < 5 * weights


def test_nested_loops_multiply():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0], None

    program = compiled(lambda x, w: jax.lax.scan(inner, x, w)[0], ((32, 64), F32), ((5, 64, 64), F32))
    assert counted(program).matmul_flops == 5 * 3 * 2 * 32 * 64 * 64


# Every weight is trained: in LoRA the unrolled program may leave out the gradient of the first layer's input.
ARCH = replace(ARCHITECTURES["tiny"], num_layers=4, layer_types=pattern(4, period=2))  # a loop of two rounds


def train_program(microbatches=1):
    recipe = Recipe(
        arch=ARCH, hardware=HardwareConfig(), lora=LoraConfig(enabled=False), optimizer=OptimizerConfig(),
        trainer=TrainerConfig(remat="none", microbatches=microbatches), mesh=MeshSizes(1, 1, 1), rows=1, length=64,
        updates=10,
    )  # fmt: skip
    given = compiling.shapes(recipe, make_mesh(1, 1, jax.devices()[:1]))
    train, _ = compiled_functions(given.step, given.state)
    return train.lower(given.state, given.base, given.batch).compile()


@pytest.fixture(scope="module")
def scanned():
    """Counts of the training step with layers and loss chunks in loops."""
    return counted(train_program())


def test_the_scanned_model_has_the_flops_of_the_unrolled_one(scanned, monkeypatch):
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
    unrolled_program = train_program()
    unrolled = counted(unrolled_program)
    assert scanned.matmul_flops == pytest.approx(unrolled.matmul_flops, rel=1e-3)
    assert unrolled.flops == pytest.approx(unrolled_program.cost_analysis()["flops"], rel=0.03)


def test_microbatches_multiply_the_work(scanned):
    three = counted(train_program(microbatches=3))
    assert three.matmul_flops == pytest.approx(3 * scanned.matmul_flops, rel=1e-6)


def test_collectives_by_kind_count_and_bytes():
    mesh = make_mesh(2, 4, jax.devices())

    def place(*axes):
        return NamedSharding(mesh, P(*axes))

    def block(x, w):  # the contracted dim lies on tp: partial sums
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), place("fsdp", "tp")), None

    x = jax.ShapeDtypeStruct((64, 256), F32, sharding=place("fsdp", "tp"))
    w = jax.ShapeDtypeStruct((6, 256, 256), F32, sharding=place(None, "tp", None))
    program = (
        jax.jit(lambda x, w: jax.lax.scan(block, x, w)[0], out_shardings=place("fsdp", "tp")).lower(x, w).compile()
    )
    ours = counted(program)
    assert sum(ours.collectives.values()) >= 6
    full = 32 * 256 * 4  # one chip's rows of the product, float32
    sent = sum(ours.collective_bytes.values())
    # A reduce-scatter sends 3/4 of the product, an all-reduce twice that, for each of the six layers.
    assert 6 * full * 3 / 4 <= sent <= 6 * full * 3 / 2


def test_the_text_of_tpu_programs():
    """Loops without a told trip count, arrays in on-chip memory, products as convolutions, groups on a mesh."""
    ours = counts.count(hlo.parse(text_of("tpu_loop")))
    assert ours.matmul_flops == 8 * 2 * 128 * 256 * 512
    assert ours.collectives == {"all-reduce": 8}
    product, weight = 128 * 512 * 2, 256 * 512 * 2
    assert ours.collective_bytes["all-reduce"] == 8 * 2 * (3 / 4) * product
    in_hbm = 2 * weight + weight + product + 2 * product  # the slice, the product's operand and result, the all-reduce
    on_chip = 128 * 256 * 2  # x: S(1)
    counter = 4 + (4 + 4 + 1)  # the slice's index; the condition's counter, limit and outcome
    assert ours.traffic.hbm == 8 * (in_hbm + counter)
    assert ours.traffic.accessed == 8 * (in_hbm + on_chip + counter)


def test_a_slice_of_what_is_copied_first_reads_no_more_than_the_slice():
    """As tpu7x has it: the fused slice of a stack of weights is preceded by a copy that stays where the stack is."""
    text = text_of("tpu_loop")
    stack = "bf16[8,256,512]{2,1,0:T(8,128)(2,1)}"
    copies = f"%copies (q.0: bf16[8,256,512]) -> bf16[8,256,512] {{\n  %q.0 = {stack} parameter(0)\n"
    copies += f"  ROOT %q.1 = {stack} copy(%q.0)\n}}\n\n"
    one = f"  %p.2 = {stack} fusion(%p.0), kind=kLoop, output_to_operand_aliasing={{{{}}: (0, {{}})}}, calls=%copies\n"
    copied = text.replace("%wrapped (", copies + "%wrapped (", 1).replace("  ROOT %slice", one + "  ROOT %slice", 1)
    copied = copied.replace("dynamic-slice(%p.0,", "dynamic-slice(%p.2,")
    assert copied.count("%p.2") == 2 and copied.count("%copies") == 2
    assert counts.count(hlo.parse(copied)).traffic == counts.count(hlo.parse(text)).traffic


def test_a_collective_beside_products_counts_once():
    """It starts in one fusion, goes on in another and ends in a third; four of the sixteen chips take part."""
    ours = counts.count(hlo.parse(text_of("async_gather")))
    piece, whole = 64 * 512 * 2, 256 * 512 * 2
    assert ours.collectives == {"all-gather": 1}
    assert ours.collective_bytes["all-gather"] == 3 * piece
    assert ours.matmul_flops == 2 * 128 * 256 * 1024
    product = (128 * 256 + 256 * 1024 + 128 * 1024) * 2
    state = 4  # the collective's own counter, in another memory
    assert ours.traffic.hbm == whole + product
    assert ours.traffic.accessed == piece + whole + product + state


def sent(kind, size, *arrays):
    """Bytes that a chip of a group sends, for operands of so many bfloat16 numbers."""
    share = {"all-gather": size - 1, "all-reduce": 2 * (size - 1) / size, "reduce-scatter": (size - 1) / size}[kind]
    return round(share * 2 * sum(arrays))


REAL = {
    "31b_v5p8": ("v5p-8", SQUARE, {
        "all-gather": (1, sent("all-gather", 4, 1024 * 64), 2),
        # `fusion(…), calls=%all-reduce-scatter.27…`: the sum is of 4,160 rows, of which each chip keeps a quarter
        "reduce-scatter": (1, sent("reduce-scatter", 4, 4160 * 5376), 2),
        "all-reduce": (1, sent("all-reduce", 4, *[64 * 5376] * 36), 2),
    }),
    "31b_v6e4": ("v6e-4", RING, {
        "all-gather": (1, sent("all-gather", 4, 1024 * 64), 2),
        "reduce-scatter": (2, sent("reduce-scatter", 4, 4224 * 5376) + sent("reduce-scatter", 4, *[4096 * 64] * 2), 2),
        "all-reduce": (1, sent("all-reduce", 4, *[64 * 5376] * 36), 2),
    }),
    "31b_v5p32": ("v5p-32", SQUARES, {
        "reduce-scatter": (1, sent("reduce-scatter", 4, *[4096 * 64] * 2), 2),  # over tp: a square
        "all-gather": (1, sent("all-gather", 4, 64 * 1344), 1),  # over fsdp: a row
    }),
    "26b_a4b_v5p8": ("v5p-8", SQUARE, {
        "all-gather": (1, sent("all-gather", 4, 2048 * 2816), 2),
        "reduce-scatter": (1, sent("reduce-scatter", 4, 8320 * 2816), 2),
    }),
}  # fmt: skip
"""Program → slice, where its devices lie, and of each kind (how often, bytes, links) where all have the same links."""


@pytest.mark.parametrize("name", REAL)
def test_collectives_of_real_programs(name):
    """One of each form; reduce-scatters are fusions of any name that call a sum and slices of it."""
    slice_name, places, expected = REAL[name]
    grid = Grid.of(SLICES[slice_name], places)
    module = hlo.parse(text_of(f"collectives_{name}"))
    ours = counts.count(module, grid)
    for kind, (times, size, _) in expected.items():
        assert (ours.collectives[kind], ours.collective_bytes[kind]) == (times, size), kind
    assert not ours.plain()["not_counted"]
    ops = [op for op in schedule.read(module, origins.Frames(), grid) if op.transfer and op.transfer.sent_bytes]
    assert sum(op.transfer.sent_bytes for op in ops) == sum(ours.collective_bytes.values())
    for size, links in {(size, links) for times, size, links in expected.values() if times == 1}:
        assert [op.transfer.links for op in ops if op.transfer.sent_bytes == size] == [links]


def test_without_other_layouts_a_v5p32_adds_up_whole_rows():
    """A quarter of which each chip needs."""
    ours = counts.count(hlo.parse(text_of("collectives_31b_v5p32")))
    assert ours.collective_bytes["all-reduce"] >= sent("all-reduce", 4, 4096 * 5376)


def test_groups_that_cannot_be_read_are_reported():
    known = "replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=1,'axis_3'=4], device_ids=([4,4]T(1,0)) {'axis_1'}"
    for groups, sharing in {
        "replica_groups={}": 16,
        "replica_groups={{0,1},{2,3}}": 2,
        "replica_groups=[2,8]<=[16]": 8,
        "replica_groups=new(3)": 16,
    }.items():
        ours = counts.count(hlo.parse(text_of("async_gather").replace(known, groups)))
        assert ours.collective_bytes["all-gather"] == (sharing - 1) * 64 * 512 * 2
        assert ("all-gather: 1 taken to be over all chips" in ours.plain()["not_counted"]) == ("new" in groups)


def test_a_loop_that_does_not_tell_how_often_is_reported():
    ours = counts.count(hlo.parse(text_of("tpu_loop").replace("direction=LT", "direction=NE")))
    assert ours.unknown_loops == 1
    assert any("counted once" in line for line in ours.plain()["not_counted"])


@pytest.mark.parametrize(("scope", "window"), [("attend_global", None), ("attend_window_1024", 1024)])
def test_attention_kernels_count_the_blocks_that_their_mask_leaves(scope, window):
    ours = counts.count(hlo.parse(text_of("splash").replace("SCOPE", scope)))
    blocks = 0
    for i in range(8):
        for j in range(8):
            seen = [d for d in (512 * (i - j) - 511, 512 * (i - j) + 511) if d >= 0]
            nearest = max(512 * (i - j) - 511, 0)
            blocks += bool(seen) and (window is None or nearest < window)
    assert ours.kernel_flops == 2 * 2 * 4 * blocks * 512 * 512 * 256  # scores and values, four heads
    assert ours.traffic.hbm > 4 * blocks * 2 * 512 * 256 * 2  # keys and values come again for each visited block
    (told,) = ours.plain()["attention"]
    assert told == {"window": window, "block_q": 512, "block_kv": 512, "flops": ours.kernel_flops}
    assert len(Mask(window, 512, 512).visited(4096)) == blocks


def test_smaller_blocks_of_attention_compute_less_of_packed_rows():
    """Of 31B's, by as much as docs/step.md says."""
    lengths, arch = codev_lengths(10_000, 4096), ARCHITECTURES["gemma4_31b"]
    rows = [lengths[members] for members in pack(lengths, 4096)[:500]]
    fill = Fill(len(lengths), 0, 0, 0, 1, 1, 1, "drawn", rows)

    def flops(size):
        masks = {window: Mask(window, size, size) for window in (arch.sliding_window, None)}
        each = {w: len(m.visited(4096)) * fill.share_visited(m, 4096) * size**2 for w, m in masks.items()}
        return 50 * arch.head_dim * each[arch.sliding_window] + 10 * arch.global_head_dim * each[None]

    saved = 1 - flops(256) / flops(512)
    page = " ".join((Path(__file__).parents[2] / "docs/step.md").read_text().split())
    assert f"blocks of 256 compute {saved:.0%} less than blocks of 512" in page


def test_an_unknown_kernel_is_named():
    text = text_of("splash").replace("splash_mha_fwd_residuals", "mystery.3")
    assert "mystery" in counts.count(hlo.parse(text)).plain()["not_counted"][0]
