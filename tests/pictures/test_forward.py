"""Features that were cached, projected here and put among the tokens give the logits of transformers' whole model."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.data.markup import IMAGE, IMAGE_END, IMAGE_START
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import sharding
from gemma4_tpu.models.base import resolve_base
from gemma4_tpu.models.gemma4 import Model, hidden_states, logits
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.models.vision_tower import PictureProcessor, Tower


def _pictures():
    """Of several shapes, so that they take several numbers of tokens."""
    from PIL import Image

    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in ((96, 96), (64, 150), (200, 40))]


def test_logits_equal_transformers(base):
    import torch
    from transformers import AutoTokenizer, Gemma4ForConditionalGeneration
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    found = resolve_base(ModelConfig(name="tiny_e2b", path=str(base)), pictures=True)
    processor = PictureProcessor.of(str(base))
    tower = Tower(found.checkpoint, processor)
    images = _pictures()
    features = tower.encode(images)
    assert tower.key == Tower(found.checkpoint, processor).key  # transformers changes the configuration it is given
    assert [len(part) for part in features] == [processor.tokens(*image.size) for image in images]
    assert len({len(part) for part in features}) > 1

    tokenizer = AutoTokenizer.from_pretrained(base)
    shown = [f"{IMAGE_START}{IMAGE * len(part)}{IMAGE_END}" for part in features]
    text = f"<bos><|turn>user\nWhat is {shown[0]} and{shown[1]}{shown[2]}?<turn|>\n<|turn>model\n2 red circles<turn|>"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="np")["input_ids"].astype(np.int32)
    soft = ids == found.arch.vision.image_token
    given = np.full((*ids.shape, tower.dim), np.nan, np.float32)  # what is not read may be anything
    given[soft] = np.concatenate(features)

    model = Gemma4ForConditionalGeneration.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    theirs = Gemma4ImageProcessorPil.from_pretrained(base)(images=images, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(
            input_ids=torch.from_numpy(ids).long(), pixel_values=theirs["pixel_values"],
            image_position_ids=theirs["image_position_ids"],
        ).logits.numpy()  # fmt: skip

    layout, mesh = Layout.of(found.arch), sharding.make_mesh(1, 1, jax.devices()[:1])
    params = load_params(found.checkpoint, found.arch, layout, sharding.places(layout, mesh), jnp.float32)
    ours = Model(layout=layout, compute_dtype=jnp.float32)
    segments, positions = jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]

    def forward(features):
        hidden = hidden_states(ours, params, None, jnp.asarray(ids), segments, positions, features=features)
        return np.asarray(logits(ours, params, hidden))

    # Ten layers of float32 sums in another order: a few hundred roundings of 2^-24, of logits of up to 30.
    tolerance = 30 * 300 * 2.0**-24
    assert np.abs(forward(jnp.asarray(given)) - expected).max() < tolerance
    assert np.abs(forward(jnp.zeros_like(given)) - expected).max() > 100 * tolerance  # the pictures matter
    blind = replace(found.arch, vision=None)
    assert Layout.of(blind).tree(lambda leaf: leaf.shape)["embedder"].keys() == (
        layout.tree(lambda leaf: leaf.shape)["embedder"].keys() - {"mm_input_projection"}
    )


def test_a_tower_of_a_newer_transformers_is_refused_with_what_to_do(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["vision_config"]["rope_parameters"] = {"rope_type": "of_tomorrow", "rope_theta": 100.0}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    tower = Tower(Checkpoint(str(tmp_path / "base")), PictureProcessor.of(str(base)))
    with pytest.raises(UserError, match=r"this transformers cannot build its vision tower .*of_tomorrow"):
        tower.encode(_pictures())
