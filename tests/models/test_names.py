"""The name map against tensors that transformers itself wrote."""

import json

import numpy as np
import pytest

from gemma4_tpu.architectures import ARCHITECTURES, from_hf_config
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.match import PREFIXES, match
from gemma4_tpu.models.names import name_map, peft_tensors
from gemma4_tpu.models.tensorfile import Checkpoint
from tests.models.checkpoints import KINDS, OTHERS, UNIFIED, make_checkpoint


def open_checkpoint(kind, **options):
    folder = make_checkpoint(kind, **options)
    arch = from_hf_config(json.loads((folder / "config.json").read_text()))
    return arch, Checkpoint(str(folder))


def shapes_of(checkpoint):
    return {name: checkpoint.shape(name) for name in checkpoint.names()}


@pytest.mark.parametrize("options", [{}, {"prefix": "multimodal", "shards": 3}], ids=["causal", "multimodal-sharded"])
@pytest.mark.parametrize("kind", [*KINDS, UNIFIED])
def test_every_text_tensor_survives_the_round_trip_bit_by_bit(kind, options):
    arch, checkpoint = open_checkpoint(kind, **options)
    found = match(arch, shapes_of(checkpoint), checkpoint.folder)
    assert found.prefix == PREFIXES[0 if options else 1]
    back = {}
    for tensor in name_map(arch).values():
        array = tensor.from_hf(lambda name, index, shape: checkpoint.read(found.prefix + name, index, shape))
        assert array.shape == tensor.shape, tensor.name
        back |= {found.prefix + name: value for name, value in tensor.to_hf(array).items()}
    assert set(back) | set(found.passthrough) == set(checkpoint.names())
    for name, value in back.items():
        np.testing.assert_array_equal(value, checkpoint.read(name), err_msg=name)
    if options:
        assert {name.split(".")[1] for name in found.passthrough} == OTHERS[kind]
    else:
        assert found.passthrough == ()


@pytest.mark.parametrize("kind", KINDS)
def test_any_slice_in_memory_is_read_as_a_slice_on_disk(kind):
    arch, checkpoint = open_checkpoint(kind)
    rng = np.random.default_rng(0)

    def read(name, index, shape):
        return checkpoint.read("model." + name, index, shape)

    for tensor in name_map(arch).values():
        whole = tensor.from_hf(read)
        starts = [int(rng.integers(0, n)) for n in tensor.shape]
        index = [slice(a, int(rng.integers(a + 1, n + 1))) for a, n in zip(starts, tensor.shape, strict=True)]
        np.testing.assert_array_equal(tensor.from_hf(read, index), whole[tuple(index)], err_msg=tensor.name)


def test_released_sizes_have_the_shapes_that_their_checkpoints_have():
    """Spot checks against the numbers that Google published (heads x head dim, per-layer embeddings, experts)."""
    big = name_map(ARCHITECTURES["gemma4_31b"])
    assert big["layers.5.attn.k_einsum.w"].hf_shape == (4 * 512, 5376)
    assert big["layers.5.attn.attn_vec_einsum.w"].hf_shape == (5376, 32 * 512)
    assert big["layers.0.attn.kv_einsum.w"].hf_names == (
        "layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight",
    )  # fmt: skip
    assert big["layers.0.attn.kv_einsum.w"].hf_shape == (16 * 256, 5376)
    moe = name_map(ARCHITECTURES["gemma4_26b_a4b"])
    assert moe["layers.0.moe.gating_einsum"].hf_shape == (128, 2 * 704, 2816)
    assert moe["layers.0.moe.linear"].hf_shape == (128, 2816, 704)
    e2b = name_map(ARCHITECTURES["gemma4_e2b"])
    assert e2b["embedder.per_layer_input_embedding"].hf_shape == (262_144, 35 * 256)
    assert e2b["layers.34.mlp.down_proj.kernel"].hf_shape == (1536, 12_288)
    assert "layers.15.attn.kv_einsum.w" not in e2b


@pytest.mark.parametrize("kind", ["dense", "e2b"])
def test_adapters_become_the_deltas_of_hugging_face_weights(kind):
    """x·W + scale·(x·A)·B in memory's layout equals x·(W + delta)^T on disk, for every kind of adapted module."""
    arch, _ = open_checkpoint(kind)
    rng = np.random.default_rng(0)
    rank, scale = 4, 0.5
    modules = {  # input dims of the weight; lora_a and lora_b as the model applies them
        "attn.q_einsum.w": ((1,), "bd,dr->br", "br,rnh->bnh"),
        "attn.k_einsum.w": ((1,), "bd,dr->br", "br,rkh->bkh"),
        "attn.kv_einsum.w": ((2,), "bd,dr->br", "br,rckh->cbkh"),
        "attn.attn_vec_einsum.w": ((0, 1), "bnh,nhr->br", "br,rd->bd"),
        "mlp.gate_proj.kernel": ((0,), "bd,dr->br", "br,rf->bf"),
        "mlp.down_proj.kernel": ((0,), "bf,fr->br", "br,rd->bd"),
    }
    checked = set()
    for layer in (0, 5):
        for module, (inputs, to_rank, from_rank) in modules.items():
            if (tensor := name_map(arch).get(f"layers.{layer}.{module}")) is None:
                continue
            checked.add(module)
            in_shape = [tensor.shape[i] for i in inputs]
            out_shape = [n for i, n in enumerate(tensor.shape) if i not in inputs]
            a, b = rng.standard_normal((*in_shape, rank)), rng.standard_normal((rank, *out_shape))
            x = rng.standard_normal((3, *in_shape))
            expected = scale * np.einsum(from_rank, np.einsum(to_rank, x, a), b)
            deltas = {n: scale * (lora_b @ lora_a) for n, (lora_a, lora_b) in tensor.lora_factors(a, b).items()}
            assert list(deltas) == list(tensor.hf_names)
            got = [(x.reshape(3, -1) @ delta.T) for delta in deltas.values()]
            # products of unit normals summed over up to 128 inputs and 4 ranks, in float32: about 1e-5
            np.testing.assert_allclose(np.reshape(got, -1), expected.reshape(-1), atol=1e-4)
            peft = peft_tensors(tensor, a, b, "model.")
            for hf_name, delta in deltas.items():
                key = "base_model.model.model." + hf_name.removesuffix(".weight")
                ours = scale * peft[key + ".lora_B.weight"] @ peft[key + ".lora_A.weight"]
                np.testing.assert_allclose(ours, delta, atol=1e-5)
    assert checked == set(modules) - ({"attn.k_einsum.w"} if kind == "e2b" else set())


def test_an_adapter_of_the_wrong_shape_names_its_tensor():
    tensor = name_map(ARCHITECTURES["tiny"])["layers.0.attn.q_einsum.w"]
    with pytest.raises(UserError, match=r"layers\.0\.attn\.q_einsum\.w: lora_a \[64, 4\]"):
        tensor.lora_factors(np.zeros((64, 4)), np.zeros((4, 8, 16)))
    with pytest.raises(UserError, match=r"lora_b \[8, 8, 16\]"):
        tensor.lora_factors(np.zeros((128, 4)), np.zeros((8, 8, 16)))
