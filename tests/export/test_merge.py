"""The merged checkpoint against transformers, PEFT and the forward pass that training ran."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.config.schema import ExportConfig
from gemma4_tpu.export.logits import _logits, _stacked
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.load import load_params
from gemma4_tpu.models.sharding import make_mesh, named
from tests.models.checkpoints import KINDS, hf_logits, make_batch

BASES = [(kind, "causal") for kind in KINDS] + [("dense", "multimodal"), ("e2b", "multimodal")]


def lora_logits(run, tokens):
    """Logits [B, T, V] of base + LoRA by the forward pass that training ran."""
    trained = open_trained(run, ExportConfig())
    layout, mesh = Layout.of(trained.base.arch), make_mesh(1, 1)
    places = layout.tree(lambda x: named(mesh, x.tunix_names[0], x.shape, stacked=x.stacked))
    params = load_params(trained.checkpoint, layout.arch, layout, places, np.float32)
    model = Model(arch=layout.arch, compute_dtype=jnp.float32, lora_scale=trained.scale)
    lora = _stacked(trained, adapters.leaves(layout, trained.lora))
    return np.asarray(jax.jit(partial(_logits, model))(params, lora, tokens, jnp.ones_like(tokens)))


@pytest.mark.parametrize(("kind", "prefix"), BASES, ids=["-".join(base) for base in BASES])
def test_transformers_loads_the_merged_model_with_the_lora_models_logits(kind, prefix, run_of, merge):
    run, base = run_of(kind, prefix=prefix, shards=3)
    merge(run)
    tokens, _ = make_batch(batch=2, length=24)
    ours = lora_logits(run, tokens)
    merged, plain = hf_logits(run / "merged", tokens), hf_logits(base, tokens)
    # fp32 on both sides; the forward passes alone differ by up to 2e-4 (E4B), the adapters' effect is 1000 times that
    np.testing.assert_allclose(merged, ours, atol=2e-3)
    assert np.abs(merged - plain).max() > 0.1
    parity = json.loads(next(run.glob("merges/*/parity.json")).read_text())
    assert parity["passed"] and parity["weights"]["worst"] <= 1
    assert parity["logits"]["differs_from_base"] and parity["logits"]["relative_rms"] < 1e-4
    assert parity["logits"]["base_relative_rms"] > 0.01
