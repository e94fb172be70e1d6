"""Weights that were trained in full beside adapters: merged, as PEFT's `modules_to_save`, and to begin from."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.logits import forward, stacked
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import token_rows
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import Layout, get
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.sharding import make_mesh, places
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.training.start import open_start
from tests.export.runs import make_run
from tests.export.test_merge import peft_logits
from tests.export.test_start import arch_of
from tests.models.checkpoints import VOCAB_SIZE, hf_logits, load_hf, make_batch

MODULES = {
    ("dense", "multimodal"): ["norms", "embeddings"],
    ("moe", "causal"): ["norms", "router.proj"],
    ("e2b", "causal"): ["norms", "per_layer_projections", "embeddings", "k_proj", "v_proj"],
}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora_logits(run, tokens):
    """Logits of base, trained weights and adapters by the forward pass that training ran."""
    trained = open_trained(run, ExportConfig())
    layout, mesh = trained.layout, make_mesh(1, 1, jax.devices()[:1])
    params = load_params(trained.checkpoint, layout.arch, layout, places(layout, mesh), np.float32)
    own = stacked(trained, layout.trained_in_full())
    paths = {leaf.path for leaf in layout.trained_in_full()}
    params = layout.tree(lambda leaf: get(own if leaf.path in paths else params, leaf.path))
    if rows := trained.token_rows:
        table, new = params["embedder"]["input_embedding"], jnp.asarray(trained.state.read(token_rows.NAME))
        params["embedder"]["input_embedding"] = token_rows.put(table, rows, new)
    model = Model(layout=layout, compute_dtype=jnp.float32, mesh=mesh)
    return np.asarray(forward(model, params, stacked(trained, adapters.leaves(layout)), tokens,
                              np.ones_like(tokens)))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prefix"), MODULES)
def test_transformers_and_peft_have_the_logits_and_a_run_can_begin_from_both(kind, prefix, run_of, merge):
    targets = ["attention", "mlp", *(["experts"] if kind == "moe" else [])]
    lora = LoraConfig(rank=4, alpha=8.0, targets=targets, modules_to_train=MODULES[kind, prefix])
    run, base = run_of(kind, prefix=prefix, shards=3, lora=lora)
    merge(run, "export=both")
    tokens = np.maximum(make_batch(batch=4, length=48)[0], 3)
    ours = lora_logits(run, tokens)
    # fp32 on both sides; the forward passes alone differ by up to 3e-4 (E4B)
    np.testing.assert_allclose(hf_logits(run / "merged", tokens), ours, atol=2e-3)
    np.testing.assert_allclose(peft_logits(base, run / "adapter", tokens), ours, atol=2e-3)
    trained, arch = open_trained(run, ExportConfig()), arch_of(base)
    layout, mesh = Layout.of(arch, lora), make_mesh(1, 1, jax.devices()[:1])
    leaves = adapters.trained_leaves(layout)
    zeros = layout.tree(lambda leaf: jnp.zeros(leaf.array_shape))
    for folder in (run, run / "adapter"):
        start = open_start(replace(lora, start=str(folder)), arch)
        initial = _over(zeros, adapters.init(layout, jax.random.key(5)))
        tree = start.place(initial, layout, mesh)
        for leaf in leaves:
            value = np.asarray(get(tree, leaf.path))
            for part, name in zip(value if leaf.stacked else [value], leaf.tunix_names, strict=True):
                np.testing.assert_array_equal(part, trained.state.read(name))


def with_reserve(base, folder):
    """A copy of a checkpoint with a tokenizer that holds two tokens in reserve."""
    shutil.copytree(base, folder)
    save_tokenizer(folder, VOCAB_SIZE, {"w9": "<unused7>", "w100": "<unused0>"})
    return folder


def enlarged(base, folder):
    """What transformers makes of a checkpoint with 22 tokens more."""
    import torch

    load_hf.cache_clear()
    model, _ = load_hf(base), torch.manual_seed(0)
    model.resize_token_embeddings(VOCAB_SIZE + 22, pad_to_multiple_of=16)
    model.save_pretrained(folder)
    load_hf.cache_clear()
    save_tokenizer(folder, VOCAB_SIZE + 22)
    return folder


def save_tokenizer(folder, size, renamed=None):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {(renamed or {}).get(word := f"w{number}", word): number for number in range(size)}
    Tokenizer(WordLevel(words, "w0")).save(f"{folder}/tokenizer.json")


NEW = {with_reserve: {"<note>": 9, "w7": 7, "<result>": 100}, enlarged: {"w149": 149, "w140": 140}}


@pytest.mark.parametrize("made", NEW)
@pytest.mark.parametrize(("kind", "prefix"), [("dense", "multimodal"), ("e2b", "causal")])
@pytest.mark.slow
def test_rows_of_new_tokens_are_in_the_merge_and_in_peft(kind, prefix, made, run_of, merge, tmp_path):
    _, plain = run_of(kind, prefix=prefix, folder="first")
    base, run, ids = made(plain, tmp_path / "base"), tmp_path / "run", NEW[made]
    lora = LoraConfig(rank=4, alpha=8.0, modules_to_train=["norms"])
    make_run(run, base, lora=lora, name=f"test_{kind}", new_tokens=tuple(ids))
    merge(run, "export=both")
    tokens = np.maximum(make_batch(batch=4, length=48)[0], 3)
    for place, number in enumerate(ids.values()):
        tokens[:, 5 + place :: 9] = number
    ours = lora_logits(run, tokens)
    # fp32 on both sides
    np.testing.assert_allclose(hf_logits(run / "merged", tokens), ours, atol=2e-3)
    np.testing.assert_allclose(peft_logits(base, run / "adapter", tokens), ours, atol=2e-3)
    vocabulary = json.loads((run / "merged" / "tokenizer.json").read_text())
    assert {token: vocabulary["model"]["vocab"][token] for token in ids} == ids
    added = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    assert added == {token: number for token, number in ids.items() if token.startswith("<")}
    merged, before = (Checkpoint(str(place)) for place in (run / "merged", base))
    name = open_trained(run, ExportConfig()).match.embedding
    moved = np.any(merged.read(name) != before.read(name), axis=1)
    assert np.flatnonzero(moved).tolist() == sorted(ids.values())


def _over(tree, more):
    """Both trees in one."""
    if isinstance(tree, list):
        return [_over(a, b) for a, b in zip(tree, more, strict=True)]
    if not isinstance(tree, dict):
        return tree
    return {
        k: _over(tree[k], more[k]) if k in tree and k in more else tree.get(k, more.get(k)) for k in {**tree, **more}
    }


def test_what_no_module_of_its_own_holds_is_refused_as_peft(run_of, refused):
    run, _ = run_of("moe", lora=LoraConfig(rank=4, modules_to_train=["router.scale"]))
    told = refused(f"run={run}", "export=peft")
    assert "layers.0.router.scale" in told and "give export=merged" in told
    assert not (run / "adapter").exists()


def tied_otherwise(tensors):
    return {name: x + 1 if "lm_head" in name else x for name, x in tensors.items()}


REFUSALS = {
    "not trained here": (
        {"modules_to_train": ["norms"]}, None, {},
        r"leaves out 1 weights .*embed_tokens.*give lora.modules_to_train=\[norms,embed_tokens\]",
    ),
    "trained in full here": (
        {"modules_to_train": ["norms", "embeddings", "o_proj"]}, None, {}, "trains 12 of its adapted weights in full"
    ),
    "a separate output matrix": ({}, tied_otherwise, {}, "embedding and output matrix differ"),
    "a module that is not there": (
        {}, None, {"modules_to_save": ["score"]}, r"modules_to_save=\['score'\], but there is no tensor"
    ),
    "tensors that nothing explains": (
        {}, None, {"modules_to_save": None}, "modules_to_save=None; nothing here could take it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_begun_from_is_refused(case, run_of, merge):
    lora = LoraConfig(rank=4, alpha=8.0, modules_to_train=["norms", "embeddings"])
    run, base = run_of(lora=lora)
    merge(run, "export=peft")
    ours, tensors, config, told = REFUSALS[case]
    folder = run / "adapter"
    if tensors:
        save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    with pytest.raises(UserError, match=f"(?s){told}"):
        open_start(replace(lora, start=str(folder), **ours), arch_of(base))
