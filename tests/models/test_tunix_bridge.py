"""Our architectures against Tunix's presets, and our weights in Tunix's model against transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tunix.models.gemma4 import model as tunix

from gemma4_tpu.architectures import ARCHITECTURES, from_hf_config
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.match import match
from gemma4_tpu.models.names import name_map
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.models.tunix_bridge import fill, to_tunix, tunix_config
from tests.models.checkpoints import hf_logits, make_batch, make_checkpoint


@pytest.mark.parametrize("name", ["gemma4_31b", "gemma4_26b_a4b", "gemma4_e4b", "gemma4_e2b"])
def test_our_architectures_agree_with_tunix_presets_field_by_field(name):
    preset, ours = getattr(tunix.ModelConfig, name)(), tunix_config(ARCHITECTURES[name])
    for field in dataclasses.fields(tunix.ModelConfig):
        theirs, value = getattr(preset, field.name), getattr(ours, field.name)
        if field.name == "attention_pattern":  # theirs is one period, ours every layer
            theirs = tuple(theirs[i % len(theirs)] for i in range(preset.num_layers))
        if field.name == "num_global_kv_heads" and theirs is None:
            theirs = preset.num_kv_heads  # which is what None means
        assert value == theirs, field.name


def test_dtype_covers_parameters_and_activations():
    config = tunix_config(ARCHITECTURES["tiny"], jnp.bfloat16)
    assert (config.dtype, config.param_dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_every_count_of_shared_layers_survives_tunix_fraction():
    """Tunix turns the fraction back by truncation, off by one for pairs such as 14 of 25 layers."""
    wrong = 0
    for layers in range(4, 61, 2):
        for shared in range(0, layers - 1, 2):
            arch = dataclasses.replace(
                ARCHITECTURES["tiny_e2b"], num_layers=layers, num_kv_shared_layers=shared,
                layer_types=("sliding", "global") * (layers // 2),
            )  # fmt: skip
            fraction = tunix_config(arch).frac_shared_layers
            assert int(layers - fraction * layers) == layers - shared
            wrong += int(layers - shared / layers * layers) != layers - shared
    assert wrong > 0  # else the workaround can go


def test_a_pattern_that_tunix_cannot_express_is_refused():
    arch = ARCHITECTURES["tiny_e2b"]
    with pytest.raises(UserError, match="a sliding and then a global one"):
        tunix_config(dataclasses.replace(arch, num_kv_shared_layers=4))  # the last unshared layer is a sliding one


def read_all(folder):
    checkpoint = Checkpoint(str(folder))
    arch = from_hf_config(json.loads((folder / "config.json").read_text()))
    prefix = match(arch, {n: checkpoint.shape(n) for n in checkpoint.names()}, str(folder)).prefix
    params = {
        name: jnp.asarray(t.from_hf(lambda hf, index, shape: checkpoint.read(prefix + hf, index, shape)))
        for name, t in name_map(arch).items()
    }
    return params, arch


def difference(model, folder):
    """Largest |Tunix - transformers| over the logits of real positions."""
    tokens, mask = make_batch()
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None] & mask[:, None, :]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    logits, _ = jax.jit(lambda t: model(t, positions, None, causal))(tokens)
    return np.abs(np.asarray(logits) - hf_logits(folder, tokens, mask))[mask].max()


@pytest.mark.parametrize("kind", ["dense", "e2b"])
def test_tunix_with_our_weights_gives_transformers_logits(kind):
    folder = make_checkpoint(kind)
    params, arch = read_all(folder)
    # fp32 rounding through 12 to 20 layers, as measured for Tunix against transformers (4.4e-5 to 2.2e-4)
    assert difference(to_tunix(params, arch), folder) <= 3e-4


def test_weights_that_do_not_fit_are_named():
    params, arch = read_all(make_checkpoint("dense"))
    name = "layers.3.attn.q_einsum.w"
    with pytest.raises(ValueError, match=rf"{name}: Tunix's model has this tensor"):
        to_tunix({n: v for n, v in params.items() if n != name}, arch)
    with pytest.raises(ValueError, match=f"{name}: shape"):
        to_tunix(params | {name: params[name][1:]}, arch)
    with pytest.raises(ValueError, match=r"has no extra\.w"):
        to_tunix(params | {"extra.w": params[name]}, arch)


def test_tunix_still_routes_experts_wrongly():
    """When this fails, Tunix has fixed its router and `to_tunix` need not refuse a mixture of experts any more."""
    folder = make_checkpoint("moe")
    params, arch = read_all(folder)
    assert difference(fill(params, arch, jnp.float32), folder) > 0.1
    with pytest.raises(UserError, match="routes experts wrongly"):
        to_tunix(params, arch)
