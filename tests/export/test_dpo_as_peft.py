"""Direct preference optimisation on our adapters against the same on PEFT's, whose reference is adapters disabled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.export.logits import stacked
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import get
from gemma4_tpu.models.names import peft_names
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.sharding import make_mesh, places
from gemma4_tpu.step.objective import means
from gemma4_tpu.step.preference import Dpo
from gemma4_tpu.step.train_step import Step
from tests.models.checkpoints import VOCAB_SIZE, load_hf
from tests.step.test_preference import pairs_batch, sides_of, torch_dpo


@pytest.mark.slow
def test_dpo_s_loss_margins_and_gradients_are_those_of_peft_with_its_adapters_disabled(run_of, merge):
    """transformers' model, PEFT's adapters, `disable_adapter()` as the reference; sides as rows of their own."""
    import torch
    from peft import PeftModel

    targets = ["q", "v", "o", "mlp"]  # beside K, V would share its A here, whose gradient is the sum of PEFT's two
    run, base = run_of("dense", lora=LoraConfig(rank=4, alpha=8.0, targets=targets))
    merge(run, "export=peft")
    trained, batch, objective = open_trained(run, ExportConfig()), pairs_batch(VOCAB_SIZE), Dpo(0.3, 0.1)
    values = stacked(trained, adapters.leaves(trained.layout))
    model = Model(layout=trained.layout, compute_dtype=jnp.float32, mesh=make_mesh(1, 1, jax.devices()[:1]))
    held = load_params(trained.checkpoint, model.arch, model.layout, places(model.layout, model.mesh), np.float32)
    step = Step(model, None, chunk_tokens=16, objective=objective)
    (loss, stats), grads = jax.jit(jax.value_and_grad(step.summed_loss, has_aux=True))(
        values, held, {name: value[0] for name, value in batch.items()}, None
    )

    load_hf.cache_clear()  # PEFT changes the model in place
    peft = PeftModel.from_pretrained(load_hf(base), run / "adapter", is_trainable=True)

    def summed(row, at):
        tokens, targets = (torch.tensor(batch[name][0, row, at]).long() for name in ("tokens", "targets"))
        logp = torch.log_softmax(peft(tokens[None]).logits[0].float(), dim=-1)
        return logp.gather(1, targets[:, None])[torch.tensor(batch["target_mask"][0, row, at]), 0].sum()

    pairs = list(sides_of(batch))
    logp = [[summed(row, at) for row, at in pair] for pair in pairs]
    with torch.no_grad(), peft.disable_adapter():
        reference = [[summed(row, at) for row, at in pair] for pair in pairs]
    expected, margins = torch_dpo(logp, reference, 0.3, 0.1)
    expected.backward()
    load_hf.cache_clear()
    # fp32 on both sides; logits differ by up to 3e-4 of 10 (test_merge.py), margins are differences of their sums
    np.testing.assert_allclose(float(loss) / len(pairs), expected.item(), rtol=1e-3)
    np.testing.assert_allclose(means(stats)["margin"], margins.mean().item(), rtol=1e-2, atol=1e-3)
    named = {name.replace(".default", ""): value.grad.numpy() for name, value in peft.named_parameters()
             if value.requires_grad}  # fmt: skip
    largest = max(np.abs(value).max() for value in named.values())
    for adapter in adapters.adapters(trained.layout):
        for i, name in enumerate(adapter.base.tunix_names):
            tensor = trained.tensors[name]
            a, b = (np.asarray(get(grads, leaf.path))[i] / len(pairs) for leaf in adapter.leaves)
            for hf_name, factors in tensor.lora_factors(a, b).items():
                for key, value in zip(peft_names(hf_name, trained.prefix), factors, strict=True):
                    np.testing.assert_allclose(value, named[key], atol=5e-3 * largest, err_msg=key)
