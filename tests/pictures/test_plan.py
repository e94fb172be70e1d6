"""What a plan counts of pictures, and which models it refuses them for."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from gemma4_tpu.architectures import ARCHITECTURES, seeing
from gemma4_tpu.config.load import load
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.schema import DataConfig, DataSource, LoraConfig, ModelConfig, OptimizerConfig, TrainerConfig
from gemma4_tpu.config.tasks import PlanConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.models import sharding
from gemma4_tpu.planning.compile import shapes
from gemma4_tpu.planning.fill import lengths_of
from gemma4_tpu.train import TRAIN
from gemma4_tpu.training.recipe import Recipe


def test_features_and_projector_take_memory():
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    text = Recipe(
        arch=ARCHITECTURES["gemma4_e4b"], hardware=HardwareConfig(), lora=LoraConfig(), optimizer=OptimizerConfig(),
        trainer=TrainerConfig(compute_dtype="bfloat16", remat="none"), mesh=MeshSizes(**mesh.shape), rows=2, length=256,
        updates=10,
    )  # fmt: skip
    sees = replace(text, arch=seeing(text.arch, None))
    without, beside = (shapes(recipe, mesh).bytes_per_chip() for recipe in (text, sees))
    assert beside["batch"] - without["batch"] == 2 * 256 * 768 * 2  # bfloat16 features of every slot
    assert beside["base"] - without["base"] == 768 * 2560 * 2  # the projector
    trained = shapes(replace(sees, lora=LoraConfig(modules_to_train=["projector"])), mesh).bytes_per_chip()
    assert trained["weights"] == 768 * 2560 * 4


@pytest.mark.parametrize("model", ["gemma4_31b", "gemma4_26b_a4b", "gemma4_12b"])
def test_larger_sizes_are_refused_by_what_they_need(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = [f"model={model}", "model.path=gs://bucket/base", "data=chat_jsonl", f"data.train={tmp_path}/rows.jsonl"]
    with pytest.raises(UserError, match="pictures are read by E2B and E4B alone"):
        load([*words, f"data.image_cache={tmp_path}/cache"], TRAIN)


def test_the_projector_is_named_only_where_pictures_are_read(tmp_path):
    words = ["model=tiny", "lora.modules_to_train=[projector]", f"run_dir={tmp_path}/run"]
    with pytest.raises(UserError, match="tiny has no 'projector'"):
        load(words, TRAIN)


@pytest.mark.parametrize("objective", ["grpo", "expert_iteration", "distill"])
def test_objectives_on_own_answers_refuse_pictures(objective):
    with pytest.raises(UserError, match=f"objective={objective} samples answers to text-only prompts"):
        load([f"objective={objective}", "model=tiny_e2b", "model.path=random:0", "data.image_cache=cache"], TRAIN)


def test_a_plan_counts_the_tokens_of_pictures_and_makes_no_features(base, tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    picture, ask = {"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}
    answer = {"role": "assistant", "content": "a red circle"}
    rows = [{"messages": [{"role": "user", "content": parts}, answer]} for parts in ([picture, ask], [ask])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=[DataSource(path=str(tmp_path / "rows.jsonl"))], image_cache=str(tmp_path / "cache"))
    lengths = lengths_of(ModelConfig(name="tiny_e2b", path=str(base)), data, PlanConfig(), data_here=True)
    seeing, blind = lengths.examples.lengths(np.arange(2))
    assert 64 < seeing - blind < 70 and lengths.source.startswith("measured")  # and what stands around a picture
    assert not (tmp_path / "cache").exists()
