"""Each kind of adapter: PEFT and the merged model compute what training computed, and the files hold no more."""

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.names import adapted_tensors
from tests.export.test_merge import lora_logits, peft_logits
from tests.models.checkpoints import hf_logits, load_hf, make_batch

KINDS = {
    "values": ("dense", {"targets": ["q", "v"]}),
    "keys": ("e2b", {"targets": ["k", "gate", "down"]}),
    "layers": ("dense", {"layers": ["0-2", "-4-"]}),
    "ranks": ("e2b", {"ranks": {"o": 8, "layers.5.*": 2, "mlp.up_proj": 3}}),
    "all": ("moe", {"targets": ["v", "o", "mlp"], "layers": ["1-7"], "ranks": {"o": 2, "layers.[23].*": 6}}),
    "dora": ("dense", {"dora": True}),
    "dora of values, in some layers": (
        "e2b",
        {"dora": True, "targets": ["v", "o"], "layers": ["3-12"], "rslora": True},
    ),
}


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.slow
def test_transformers_and_peft_have_the_logits_of_the_adapted_model(case, run_of, merge):
    kind, settings = KINDS[case]
    prefix = "multimodal" if case in ("layers", "all") else "causal"
    lora = LoraConfig(**{"rank": 4, "alpha": 8.0, **settings})
    run, base = run_of(kind, prefix=prefix, lora=lora)
    merge(run, "export=both")
    tokens = np.maximum(make_batch(batch=2, length=32)[0], 3)
    ours, plain = lora_logits(run, tokens), hf_logits(base, tokens)
    # fp32 on both sides; see test_merge.py
    np.testing.assert_allclose(hf_logits(run / "merged", tokens), ours, atol=2e-3)
    np.testing.assert_allclose(peft_logits(base, run / "adapter", tokens), ours, atol=2e-3)
    assert np.abs(ours - plain).max() > 0.05
    parity = json.loads(next(run.glob("merges/*/parity.json")).read_text())
    assert parity["passed"] and parity["logits"]["merged_to_lora"] < 1e-4
    names = {name for name, _ in load_hf(base).named_modules()}
    layout = Layout.of(ARCHITECTURES[f"test_{kind}"], lora)
    wanted = {
        next(
            module for module in names if module.endswith("." + name.removesuffix(".weight")) and "vision" not in module
        )
        for tensor in adapted_tensors(layout.arch, layout.adapted).values()
        for name in tensor.hf_names
    }
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in stored} == wanted
    assert sum("lora_magnitude_vector" in name for name in stored) == (len(wanted) if lora.dora else 0)


def test_what_vllm_would_not_read_is_told(run_of, merge, caplog):
    run, _ = run_of(lora=LoraConfig(rank=8, alpha=8.0, dora=True, ranks={"o": 16}, targets=["q", "o"]))
    with caplog.at_level(logging.WARNING):
        merge(run, "export=peft")
    assert "vLLM refuses adapters with use_dora" in caplog.text
    assert "others would scale all adapters as if of rank 8" in caplog.text
