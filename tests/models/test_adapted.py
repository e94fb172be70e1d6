"""Which weights get an adapter: layers, single modules, ranks by pattern; and that stacks stay as large as they can."""

import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import flops, quantize
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.adapted import adapted_layers
from gemma4_tpu.models.layout import Layout

BIG = ARCHITECTURES["gemma4_31b"]
SETTINGS = {
    "attention": {"targets": ["attention"]},
    "mlp": {"targets": ["mlp"]},
    "all linear": {"targets": ["attention", "mlp"]},
    "experts": {"targets": ["mlp", "experts"]},
    "values": {"targets": ["q", "v"]},
    "keys": {"targets": ["k", "down"]},
    "layers": {"layers": ["1-2", "-1"]},
    "ranks": {"ranks": {"o": 2, "layers.3.mlp.*": 5, "layers.1.*": 7}},
    "dora": {"dora": True, "targets": ["v", "o"]},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("case", SETTINGS)
def test_the_analytic_parameter_count_is_that_of_the_arrays(name, case):
    lora, arch = LoraConfig(rank=8, **SETTINGS[case]), ARCHITECTURES[name]
    assert flops.lora_parameters(arch, lora) == adapters.parameter_count(Layout.of(arch, lora))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["0-2"], [0, 1, 2]),
        (["5", "3", "4-5"], [3, 4, 5]),
        (["57-"], [57, 58, 59]),
        (["-2-"], [58, 59]),
        (["-1"], [59]),
        (["-60--59"], [0, 1]),
        (None, list(range(60))),
    ],
)
def test_layers(given, found):
    assert adapted_layers(given, 60) == found


@pytest.mark.parametrize("item", ["60", "-61", "5-3", "50-60", "0:3", "a", "", "1-2-3"])
def test_layers_that_the_model_has_not_are_refused(item):
    with pytest.raises(UserError, match=r"lora\.layers: .*0-(59|11)"):
        adapted_layers([item], 60)


def test_the_rank_is_that_of_the_first_pattern_that_fits():
    lora = LoraConfig(rank=16, ranks={"layers.5.*": 4, "o": 32, "mlp.*_proj": 8})
    ranks = {name: how.rank for name, how in Layout.of(BIG, lora).adapted.items()}
    assert ranks["layers.5.attn.attn_vec_einsum.w"] == 4 and ranks["layers.5.mlp.up_proj.kernel"] == 4
    assert ranks["layers.15.attn.attn_vec_einsum.w"] == 32 and ranks["layers.15.mlp.up_proj.kernel"] == 8
    assert ranks["layers.15.attn.q_einsum.w"] == 16


def test_alpha_is_the_same_for_all_ranks():
    lora = LoraConfig(rank=16, alpha=32.0, ranks={"o": 64})
    scales = {how.rank: how.scale for how in Layout.of(BIG, lora).adapted.values()}
    assert scales == {16: 2.0, 64: 0.5}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ranks": {"k": 4}}, r"lora\.ranks: layers\.0\.self_attn\.k_proj 4, .*v_proj 16: these share A"),
        ({"ranks": {"experts.*": 4}}, r"lora\.ranks: experts\.\*: matches no adapted module"),
        ({"ranks": {"o": 4, "o_proj": 8}}, r"lora\.ranks: o_proj: matches no adapted module"),
        ({"layers": ["5"], "targets": ["v"]}, r"lora\.targets=\[v\] adapts no module in lora\.layers=\[5\]"),
    ],
)
def test_what_would_have_no_effect_is_refused(settings, told):
    with pytest.raises(UserError, match=told):
        Layout.of(BIG, LoraConfig(**settings))


def test_what_of_keys_and_values_is_adapted_is_told():
    counts = adapters.module_counts(Layout.of(BIG, LoraConfig(targets=["q", "v"])))
    assert counts == {"attn.q_einsum": 60, "attn.kv_einsum (v)": 50}


def test_adapting_values_alone_quantises_the_array_that_they_share_with_keys():
    lora = LoraConfig(targets=["v"], quantize="nf4")
    layout = Layout.of(BIG, lora)
    assert adapters.module_counts(layout) == {"attn.kv_einsum (v)": 50}
    (shared,) = {leaf.weight.hf_names for leaf in layout.leaves() if quantize.is_quantized(leaf, lora)}
    assert shared == ("self_attn.k_proj.weight", "self_attn.v_proj.weight")


@pytest.mark.parametrize(
    ("settings", "repeats"),
    [
        ({}, [10]),
        ({"targets": ["v"], "ranks": {"v": 4}}, [10]),
        ({"layers": ["0-11"]}, [2, 8]),
        ({"layers": ["-6-"]}, [9, 1]),
        ({"layers": ["4-20"]}, [1, 2, 1, 6]),
        ({"ranks": {"layers.30.*": 4}}, [5, 1, 4]),
        ({"layers": [str(i) for i in range(5, 60, 6)]}, [10]),  # the global layers: every group alike
    ],
)
def test_a_stage_ends_only_where_adapters_change(settings, repeats):
    layout = Layout.of(BIG, LoraConfig(**settings))
    assert [stage.repeats for stage in layout.stages] == repeats
    assert [i for stage in layout.stages for group in stage.layers for i in group] == list(range(60))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_of_a_stack_are_adapted_alike(name):
    lora = LoraConfig(layers=["1-3", "-2-"], ranks={"layers.2.*": 4}, targets=["q", "v", "mlp"])
    layout = Layout.of(ARCHITECTURES[name], lora)
    for leaf in layout.leaves():
        assert {layout.adapted.get(name) for name in leaf.tunix_names} == {leaf.adapted}


def test_layers_before_the_first_adapted_one_are_only_run_forward():
    """The second half of 31B's layers, which are groups of equal size; attention of one token is one score."""

    def flops_of(**settings):
        lora = LoraConfig(**settings)
        return flops.train_flops_per_token(BIG, lora, 1.0) - 6 * flops.lora_parameters(BIG, lora)

    layers = flops.matmul_parameters(BIG) - BIG.vocab_size * BIG.embed_dim
    saved = layers + flops.attention_flops(BIG, 1.0)
    assert flops_of() - flops_of(layers=["30-"]) == pytest.approx(saved)
    assert flops_of() == flops_of(layers=["0", "59"])
