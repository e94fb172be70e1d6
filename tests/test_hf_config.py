"""Every form of `config.json` that transformers has written for Gemma 4, and those that are refused by name."""

import json
from pathlib import Path

import pytest

from gemma4_tpu.architectures import ARCHITECTURES, contradictions, from_hf_config, to_hf_config
from gemma4_tpu.errors import UserError
from gemma4_tpu.hf_config import quantisation, text_config, with_both_key_sets
from gemma4_tpu.models.kv_cache import parameter_count

SAVED = Path(__file__).resolve().parents[2] / "shared" / "data" / "configs"
DENSE = to_hf_config(ARCHITECTURES["tiny"])  # six layers, the last of them global
OLDER = {key: value for key, value in DENSE.items() if key != "per_layer_config"}
NEWER = {key: value for key, value in DENSE.items() if key not in ("global_head_dim", "num_global_key_value_heads")}


def heads(config):
    arch = from_hf_config(config)
    return (arch.head_dim, arch.num_kv_heads), (arch.global_head_dim, arch.num_global_kv_heads)


def test_released_sizes_have_the_published_numbers_of_parameters():
    counts = {name: parameter_count(arch) for name, arch in ARCHITECTURES.items() if name.startswith("gemma4_")}
    assert counts == {
        "gemma4_31b": 30_697_345_340, "gemma4_12b": 11_907_350_320, "gemma4_26b_a4b": 25_233_141_790,
        "gemma4_e4b": 7_463_013_418, "gemma4_e2b": 4_628_569_379,
    }  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_survives_its_own_config(name):
    assert contradictions(ARCHITECTURES[name], from_hf_config(to_hf_config(ARCHITECTURES[name]))) == []


def test_older_and_newer_keys_describe_the_same_heads():
    assert heads(OLDER) == heads(NEWER) == heads(DENSE) == ((16, 4), (32, 1))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"5": {"head_dim": 32}}, ((16, 4), (32, 4))),
        ({"05": {"num_key_value_heads": 1}}, ((16, 4), (16, 1))),
        ({}, ((16, 4), (16, 4))),
        (None, ((16, 4), (16, 4))),
        ({str(i): {"head_dim": 24, "num_key_value_heads": 2} for i in range(6)}, ((24, 2), (24, 2))),
        # what only repeats the model's own value changes nothing
        ({"5": {"head_dim": 32, "intermediate_size": 384, "skip": []}}, ((16, 4), (32, 4))),
    ],
)
def test_per_layer_config_wins_over_the_older_keys(given, expected):
    assert heads(OLDER | {"per_layer_config": given}) == expected


def test_without_either_key_global_heads_are_512_wide():
    bare = {key: value for key, value in OLDER.items() if key != "global_head_dim"}
    assert heads(bare) == ((16, 4), (512, 1))
    assert heads(bare | {"attention_k_eq_v": False}) == ((16, 4), (512, 4))  # which the other key depends on


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"5": {"skip": ["mlp"]}}, r"per_layer_config\.5\.skip=\['mlp'\]: layers that differ in skip have no counter"),
        ({"05": {"intermediate_size": 7}}, r"per_layer_config\.05\.intermediate_size=7"),
        ({"1": {"sliding_window": 7}}, r"per_layer_config\.1\.sliding_window=7"),
        ({"1": {"head_dim": 8}}, "gives layer 1 other heads .* than layer 0 .*, which is sliding too"),
        ({"6": {"head_dim": 8}}, "names layer '6'; there are 0 to 5"),
        ({"-1": {"head_dim": 8}}, "names layer '-1'; there are 0 to 5"),
        ({"x": {}}, "names layer 'x'"),
        ({"5": {}, "05": {"head_dim": 8}}, "names layer 5 twice"),
        ([{"head_dim": 8}], "per_layer_config is .*, not a map from layer to overrides"),
        ({"5": 32}, "not a map from layer to overrides"),
    ],
)
def test_overrides_without_a_counterpart_are_refused_by_name(given, message):
    with pytest.raises(UserError, match=message):
        from_hf_config(NEWER | {"per_layer_config": given})


@pytest.mark.parametrize("value", ["128", 128.0, True, [128], -128])
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers", "num_kv_shared_layers"])
def test_numbers_of_another_type_are_refused_by_key(key, value):
    """transformers refuses them, too; a float would equal the size it stands for until an array is made of it."""
    with pytest.raises(UserError, match=rf"config\.json: {key} is .*; give a whole number"):
        from_hf_config(DENSE | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_k_eq_v": "false"}, "attention_k_eq_v is 'false'; give true or false, without quotes"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"layer_types": "sliding_attention"}, "layer_types is 'sliding_attention', not a list"),
        ({"per_layer_config": {"5": {"head_dim": 32.0}}}, r"per_layer_config\.5\.head_dim is 32\.0"),
        ({"rope_parameters": None, "num_kv_shared_layers": float("inf")}, "num_kv_shared_layers is inf"),
    ],
)
def test_words_and_forms_that_would_be_misread_are_refused_by_key(changes, message):
    with pytest.raises(UserError, match=message):
        from_hf_config(DENSE | changes)
    with pytest.raises(UserError, match=message):
        from_hf_config({"model_type": "gemma4", "text_config": DENSE | changes})


def rope(**full):
    local = {"rope_type": "default", "rope_theta": 10_000.0}
    wide = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    return {"sliding_attention": local, "full_attention": {k: v for k, v in (wide | full).items() if v is not None}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_parameters=.* has no sliding_attention",
        ),
        ({"rope_parameters": {"sliding_attention": rope()["sliding_attention"]}}, "has no full_attention"),
        ({"rope_parameters": rope(rope_theta=None)}, r"full_attention\.rope_theta is None; give a number"),
        ({"rope_parameters": rope(partial_rotary_factor=None)}, r"full_attention\.partial_rotary_factor is None"),
        ({"rope_parameters": rope(rope_type=None)}, r"full_attention\.rope_type is None, not 'proportional'"),
        ({"rope_parameters": rope(rope_type="yarn")}, r"full_attention\.rope_type is 'yarn', not 'proportional'"),
        ({"rope_parameters": rope(factor=0)}, r"full_attention\.factor is 0; give more than 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling=.* is not a key of Gemma 4"),
        ({"text_config": None}, "text_config is None, not an object"),
    ],
)
def test_rope_that_does_not_say_what_it_means_is_refused(changes, message):
    """transformers 5.12 and 5.24 refuse these too, most of them with a KeyError."""
    with pytest.raises(UserError, match=message):
        from_hf_config(DENSE | changes)


def test_a_rope_factor_is_read():
    assert from_hf_config(DENSE | {"rope_parameters": rope(factor=8.0)}).global_rope_factor == 8
    assert from_hf_config(DENSE | {"rope_parameters": None}) == from_hf_config(DENSE)


def test_only_12b_does_without_per_layer_embeddings_unsaid():
    bare = {key: value for key, value in DENSE.items() if key != "hidden_size_per_layer_input"}
    assert from_hf_config(bare).per_layer_input_dim == 256
    assert from_hf_config(bare | {"model_type": "gemma4_unified_text"}).per_layer_input_dim == 0


def test_both_key_sets_are_written_wherever_the_text_config_is():
    for config in (OLDER, NEWER, {"model_type": "gemma4", "text_config": NEWER}):
        written = with_both_key_sets(config)
        text = text_config(written)
        assert text["per_layer_config"] == {"5": {"head_dim": 32, "num_key_value_heads": 1}}
        assert (text["global_head_dim"], text["num_global_key_value_heads"]) == (32, 1)
        assert from_hf_config(written) == from_hf_config(config)
    layers = with_both_key_sets(to_hf_config(ARCHITECTURES["gemma4_31b"]))["per_layer_config"]
    assert list(layers)[:2] == ["05", "11"] and len(layers) == 10  # as transformers pads them


@pytest.mark.parametrize("place", ["", "text_config"])
def test_a_quantisation_is_found_where_it_is_named(place):
    given = {"quantization_config": {"quant_method": "gptq"}}
    assert quantisation({place: given} if place else given) == "gptq"
    assert quantisation(DENSE) is None
    assert quantisation({"quantization_config": {"quant_algo": "NVFP4"}}) == "NVFP4"


@pytest.mark.skipif(not SAVED.is_dir(), reason="../shared is absent: no configs of other versions")
def test_every_saved_config_means_the_same_in_both_key_sets():
    paths = sorted(SAVED.glob("*.json"))
    for path in paths:
        config = json.loads(path.read_text())
        arch, written = from_hf_config(config), with_both_key_sets(config)
        assert from_hf_config(written) == arch, path.name
        older = {key: value for key, value in text_config(written).items() if key != "per_layer_config"}
        assert from_hf_config(older) == arch, path.name  # what transformers 5.12 reads
        twin = path.with_name(path.name.replace("5.24.0", "5.12.1"))
        if twin.is_file():
            assert from_hf_config(json.loads(twin.read_text())) == arch, path.name
    assert len(paths) > 20
