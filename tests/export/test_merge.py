"""The merged checkpoint against transformers, PEFT and the forward pass that training ran."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.export.logits import forward, stacked
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.sharding import make_mesh, places
from gemma4_tpu.models.tensorfile import Checkpoint
from tests.export.conftest import same
from tests.export.runs import make_run
from tests.models.checkpoints import OTHERS, UNIFIED, hf_logits, load_hf, make_batch

BASES = [
    ("dense", "causal"),
    ("dense", "multimodal"),
    ("moe", "causal"),
    ("moe", "multimodal"),
    ("e2b", "causal"),
    ("e4b", "multimodal"),
    (UNIFIED, "multimodal"),
]


def lora_logits(run, tokens, export=None):
    """Logits [B, T, V] of base + LoRA by the forward pass that training ran."""
    trained = open_trained(run, export or ExportConfig())
    layout, mesh = trained.layout, make_mesh(1, 1, jax.devices()[:1])
    params = load_params(trained.checkpoint, layout.arch, layout, places(layout, mesh), np.float32)
    model = Model(layout=layout, compute_dtype=jnp.float32, mesh=mesh)
    adapter = stacked(trained, adapters.leaves(layout))
    return np.asarray(forward(model, params, adapter, tokens, np.ones_like(tokens)))


def peft_logits(base, adapter, tokens):
    """Logits of the transformers model with the adapter on it."""
    import torch
    from peft import PeftModel

    load_hf.cache_clear()  # PEFT changes the model in place
    model = PeftModel.from_pretrained(load_hf(base), adapter).eval()
    with torch.no_grad():
        out = model(torch.tensor(tokens).long()).logits.numpy()
    load_hf.cache_clear()
    return out


@pytest.mark.parametrize(("kind", "prefix"), BASES, ids=["-".join(base) for base in BASES])
def test_transformers_and_peft_have_the_logits_of_the_lora_model(kind, prefix, run_of, merge):
    run, base = run_of(kind, prefix=prefix, shards=3)
    merge(run, "export=both")
    tokens = np.maximum(make_batch(batch=4, length=48)[0], 3)
    ours, plain = lora_logits(run, tokens), hf_logits(base, tokens)
    # fp32 on both sides; the forward passes alone differ by up to 3e-4 (E4B), the adapters' effect is 1000 times that
    np.testing.assert_allclose(hf_logits(run / "merged", tokens), ours, atol=2e-3)
    np.testing.assert_allclose(peft_logits(base, run / "adapter", tokens), ours, atol=2e-3)
    assert np.abs(ours - plain).max() > 0.1
    others = open_trained(run, ExportConfig()).match.passthrough
    assert {name.split(".")[1] for name in others} == (OTHERS[kind] if prefix == "multimodal" else set())
    for name in others:
        same(Checkpoint(str(run / "merged")).read(name), Checkpoint(str(base)).read(name))
    parity = json.loads(next(run.glob("merges/*/parity.json")).read_text())
    assert parity["passed"] and parity["weights"]["worst"] <= 1
    assert parity["logits"]["differs_from_base"] and parity["logits"]["merged_to_lora"] < 1e-4
    assert parity["logits"]["base_to_lora"] > 0.01
    stored = json.loads((run / "merged" / "probe.json").read_text())["prompts"]
    assert stored == parity["logits"]["probes"]
    asked = np.array([stored[0]["tokens"]])
    assert hf_logits(run / "merged", asked)[0, -1].argmax() == stored[0]["merged"]
    assert hf_logits(base, asked)[0, -1].argmax() == stored[0]["base"]


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4, alpha=8.0, rslora=True),
        LoraConfig(rank=3, alpha=5.0, targets=["attention"]),
        LoraConfig(rank=4, quantize="nf4"),
    ],
    ids=["rslora", "attention-only", "qlora"],
)
def test_bfloat16_weights_are_base_plus_delta_in_float32_rounded_once(lora, run_of, merge):
    """The deltas are written out here once more, from the run's values and facts about the layouts alone."""
    run, base = run_of("dense", prefix="multimodal", dtype="bfloat16", lora=lora)
    merge(run, "verify=stream")
    before, after = load_file(base / "model.safetensors"), load_file(run / "merged" / "model.safetensors")
    trained = open_trained(run, ExportConfig())
    scale = lora.alpha / (np.sqrt(lora.rank) if lora.rslora else lora.rank)
    expected = {}
    for name in trained.state.names:
        if not name.endswith("_lora_a"):
            continue
        module = name.removesuffix("_lora_a")
        a = trained.state.read(name).reshape(-1, lora.rank)
        b = trained.state.read(f"{module}_lora_b")
        layer, _, local = module.removeprefix("layers.").partition(".")
        parts = {"attn.q_einsum.w": ["self_attn.q_proj"], "attn.k_einsum.w": ["self_attn.k_proj"],
                 "attn.kv_einsum.w": ["self_attn.k_proj", "self_attn.v_proj"],
                 "attn.attn_vec_einsum.w": ["self_attn.o_proj"]}.get(local, [local.replace(".kernel", "")])  # fmt: skip
        for i, part in enumerate(parts):
            own = b[:, i] if len(parts) == 2 else b
            key = f"model.language_model.layers.{layer}.{part}.weight"
            expected[key] = scale * (a @ own.reshape(lora.rank, -1)).T
    assert len(expected) == {True: 12 * 4 - 2, False: 12 * 7 - 2}[lora.targets == ["attention"]]  # global layers: no V
    assert before.keys() == after.keys()
    for name, value in after.items():
        wanted = before[name]
        if name in expected:
            wanted = (wanted.astype(np.float32) + expected[name]).astype(wanted.dtype)
            # another order of summation may round a value that lies midway to the other side: one place, rarely
            off = np.flatnonzero(value.view(np.uint16) != wanted.view(np.uint16))
            assert len(off) <= value.size / 500 and np.any(value != before[name])
            np.testing.assert_allclose(value.astype(np.float32), wanted.astype(np.float32), rtol=2**-7)
        else:
            np.testing.assert_array_equal(value.view(np.uint8), wanted.view(np.uint8), err_msg=name)
    note = json.loads(next(run.glob("merges/*/parity.json")).read_text()).get("note", "")
    assert ("unquantised" in note) == bool(lora.quantize)


def test_a_stored_output_matrix_follows_the_trained_embedding(run_of, merge, tmp_path):
    """transformers does not tie what a checkpoint holds twice with different values."""
    _, plain = run_of("dense")
    base = shutil.copytree(plain, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, base / "model.safetensors")
    full = LoraConfig(enabled=False)
    run = make_run(tmp_path / "full", base, name="test_dense", lora=full, size=0.02)
    merge(run, "verify=stream")
    merged = load_file(run / "merged" / "model.safetensors")
    assert not np.array_equal(merged["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    same(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


@pytest.mark.parametrize(("kind", "dtype"), [("dense", "bfloat16"), ("moe", "bfloat16"), ("e2b", "float32")])
def test_full_fine_tuning_writes_every_weight(kind, dtype, run_of, merge):
    run, _ = run_of(kind, dtype=dtype, shards=2, lora=LoraConfig(enabled=False), size=0.02)
    merge(run)
    trained = open_trained(run, ExportConfig())
    merged = Checkpoint(str(run / "merged"))
    assert merged.names() == trained.checkpoint.names()
    for tensor in trained.tensors.values():
        value = tensor.from_hf(lambda name, index, shape: merged.read(trained.prefix + name, index, shape))
        same(value, trained.state.read(tensor.name).astype(value.dtype))
    assert set(trained.changes) == set(merged.names()) - set(trained.match.passthrough)
    parity = json.loads(next(run.glob("merges/*/parity.json")).read_text())
    assert parity["logits"]["passed"] and parity["logits"]["dtype"] == dtype
