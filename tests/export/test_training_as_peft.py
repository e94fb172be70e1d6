"""Some updates of AdamW move every kind of adapter as they move PEFT's, from the same start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.export.logits import stacked
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import get
from gemma4_tpu.models.names import peft_magnitude_name, peft_names
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.sharding import make_mesh, places
from gemma4_tpu.step.optimizer import make_optimizer
from gemma4_tpu.step.train_step import Step
from tests.models.checkpoints import VOCAB_SIZE, load_hf
from tests.step.test_train_step import started

ADAM = {"learning_rate": 1e-3, "eps": 1e-3}
"""With so large an eps an update follows the gradient's size; with a small one the sign of what is rounding decides."""
UPDATES = 3
KINDS = {
    "parts": {"targets": ["q", "v", "down"], "layers": ["2-7"], "ranks": {"layers.3.*": 2, "q": 6}},
    "dora": {"dora": True, "targets": ["q", "v", "o", "up"]},
}


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.slow
def test_updates_are_peft_s(case, run_of, merge):
    lora = LoraConfig(rank=4, alpha=8.0, **KINDS[case])
    from peft import PeftModel

    run, base = run_of("dense", lora=lora)
    merge(run, "export=peft")
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 25))
    trained = open_trained(run, ExportConfig())
    before = stacked(trained, adapters.leaves(trained.layout))
    model = Model(layout=trained.layout, compute_dtype=jnp.float32, mesh=make_mesh(1, 1, jax.devices()[:1]))
    held = load_params(trained.checkpoint, model.arch, model.layout, places(model.layout, model.mesh), np.float32)
    ours, our_losses = our_updates(model, held, before, tokens)
    load_hf.cache_clear()  # PEFT changes the model in place
    peft = PeftModel.from_pretrained(load_hf(base), run / "adapter", is_trainable=True)
    theirs, their_losses = peft_updates(peft, tokens)
    # fp32 on both sides; logits differ by up to 3e-4 of 10, see test_merge.py
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-4)
    for adapter in adapters.adapters(trained.layout):
        for i, name in enumerate(adapter.base.tunix_names):
            new, old = ([np.asarray(get(tree, leaf.path))[i] for leaf in adapter.leaves] for tree in (ours, before))
            for key, value, start in _named(trained, name, new, old):
                moved = np.abs(value - start).max()
                assert moved > 1e-5, key
                np.testing.assert_allclose(theirs[key], value, atol=0.02 * moved, err_msg=key)


def _named(trained, name, new, old):
    """(PEFT's name, value after, value before) of the arrays of one tensor."""
    tensor = trained.tensors[name]
    for (a, b, *m), (a0, b0, *m0) in [(new, old)]:
        factors, starts = tensor.lora_factors(a, b), tensor.lora_factors(a0, b0)
        for hf_name, pair in factors.items():
            yield from zip(peft_names(hf_name, trained.prefix), pair, starts[hf_name], strict=True)
        for hf_name in tensor.hf_names if m else ():
            key = peft_magnitude_name(hf_name, trained.prefix)
            yield key, tensor.magnitudes(m[0])[hf_name], tensor.magnitudes(m0[0])[hf_name]


def our_updates(model, params, tree, tokens):
    """(Values after some updates, losses). Two packed segments in one row: PEFT gets them as two rows."""
    config = OptimizerConfig(schedule="constant", max_grad_norm=None, **ADAM)
    optimizer = make_optimizer(config, UPDATES, adapters.leaves(model.layout))
    step = Step(model, optimizer, chunk_tokens=16)
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    segments, positions = np.indices((rows, length))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments + 1, "positions": positions}
    batch = {key: value.reshape(1, 1, -1).astype(np.int32) for key, value in batch.items()}
    batch["target_mask"] = np.ones((1, 1, rows * length), bool)
    state, train, losses = started(step, tree), jax.jit(step.train), []
    for _ in range(UPDATES):
        state, metrics = train(state, params, batch)
        losses.append(float(metrics.loss))
    return state.trained, losses


def peft_updates(model, tokens):
    """The same of a model of PEFT's, by its names."""
    import torch

    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=ADAM["learning_rate"], eps=ADAM["eps"], weight_decay=0.0)
    ids, losses = torch.tensor(tokens).long(), []
    for _ in range(UPDATES):
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    load_hf.cache_clear()
    named = {name.replace(".default", ""): value.detach().numpy() for name, value in parameters.items()}
    return {name.replace("_vector.weight", "_vector"): value for name, value in named.items()}, losses
