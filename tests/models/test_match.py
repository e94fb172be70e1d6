"""Tensors that are not those of the architecture are refused by name; what may be there or not is left alone."""

import re

import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.models.match import match
from tests.models.test_names import open_checkpoint, shapes_of


def test_missing_unexpected_and_misshapen_tensors_are_all_named():
    arch, checkpoint = open_checkpoint("dense")
    shapes = shapes_of(checkpoint)
    del shapes["model.layers.3.self_attn.o_proj.weight"], shapes["model.embed_tokens.weight"]
    shapes["model.layers.5.self_attn.v_proj.weight"] = (64, 64)  # a global layer of a K = V model has none
    shapes["model.layers.2.mlp.up_proj.weight"] = (64, 96)
    with pytest.raises(UserError) as refusal:
        match(arch, shapes, "some/folder")
    assert str(refusal.value) == (
        "some/folder: its tensors do not match checkpoint: 2 missing: model.embed_tokens.weight,"
        " model.layers.3.self_attn.o_proj.weight; 1 unexpected: model.layers.5.self_attn.v_proj.weight;"
        " 1 with another shape: model.layers.2.mlp.up_proj.weight [64, 96] instead of [96, 64]"
    )


def test_a_long_list_of_tensors_is_cut_at_ten():
    arch, checkpoint = open_checkpoint("dense")
    shapes = {name: shape for name, shape in shapes_of(checkpoint).items() if "layernorm" not in name}
    with pytest.raises(UserError, match=r"48 missing: (\S+, ){9}\S+ and 38 more$"):
        match(arch, shapes, "some/folder")


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("kind", ["e2b", "e4b"])
def test_keys_and_values_of_kv_shared_layers_may_be_there_or_not(kind, present):
    """Google's checkpoints carry them although nothing reads them; transformers leaves them out."""
    arch, checkpoint = open_checkpoint(kind)
    shapes = shapes_of(checkpoint)
    extra = {
        f"model.layers.{layer}.self_attn.{name}.weight": (8,)
        for layer in range(arch.num_unshared_layers, arch.num_layers)
        for name in ("k_proj", "v_proj", "k_norm")
    }
    assert not extra.keys() & shapes.keys()
    found = match(arch, shapes | extra if present else shapes, "some/folder")
    assert set(found.passthrough) == (extra.keys() if present else set())
    with pytest.raises(UserError, match=r"1 missing: model\.layers\.0\.self_attn\.k_proj\.weight"):
        match(arch, {n: s for n, s in shapes.items() if n != "model.layers.0.self_attn.k_proj.weight"}, "some/folder")


def test_the_tied_output_matrix_and_rotary_buffers_are_left_alone():
    arch, checkpoint = open_checkpoint("dense")
    extra = {"lm_head.weight": (128, 64), "model.rotary_emb.full_attention_inv_freq": (8,)}
    assert match(arch, shapes_of(checkpoint) | extra, "some/folder").passthrough == tuple(sorted(extra))


@pytest.mark.parametrize("rename", ["", "transformer."])
def test_an_unknown_prefix_is_refused(rename):
    arch, checkpoint = open_checkpoint("dense")
    shapes = {rename + name.removeprefix("model."): shape for name, shape in shapes_of(checkpoint).items()}
    with pytest.raises(UserError, match=re.escape("model.language_model.layers.N, model.layers.N; found 0 of them")):
        match(arch, shapes, "some/folder")
