"""A plan counts whatever an optimizer keeps, the average of the trained values, and a reference of them."""

import jax
import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.schema import LoraConfig, ObjectiveConfig, TrainerConfig
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.models.sharding import make_mesh
from gemma4_tpu.planning import compile as compiling
from gemma4_tpu.training.recipe import Recipe
from tests.step.test_optimizer import KINDS

KEPT = {"adamw": 2, "adafactor": 1, "lion": 1, "muon": 1, "schedule_free": 2}
"""Of each value of an adapter of rank 4, whose second moment Adafactor does not factor."""


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizers_state_and_the_average_are_counted(kind, ema_decay):
    recipe = Recipe(
        arch=ARCHITECTURES["tiny"], hardware=HardwareConfig(), lora=LoraConfig(rank=4), optimizer=KINDS[kind],
        trainer=TrainerConfig(remat="none", attention="einsum", ema_decay=ema_decay), mesh=MeshSizes(1, 2, 2), rows=2,
        length=64, updates=10,
    )  # fmt: skip
    held = compiling.shapes(recipe, make_mesh(2, 2, jax.devices()[:4])).bytes_per_chip()
    assert held["optimizer"] == pytest.approx(KEPT[kind] * held["lora"], rel=0.02)
    assert held.get("average") == (None if ema_decay is None else held["lora"])


@pytest.mark.parametrize("start", [None, "outputs/train/first"])
def test_a_reference_is_counted_where_it_is_not_the_base_alone(start):
    recipe = Recipe(
        arch=ARCHITECTURES["tiny"], hardware=HardwareConfig(), lora=LoraConfig(rank=4, start=start),
        optimizer=KINDS["adamw"], trainer=TrainerConfig(remat="none", attention="einsum"), mesh=MeshSizes(1, 2, 2),
        rows=2, length=64, updates=10, objective=ObjectiveConfig(kind="dpo", beta=0.1, label_smoothing=0.0),
    )  # fmt: skip
    held = compiling.shapes(recipe, make_mesh(2, 2, jax.devices()[:4])).bytes_per_chip()
    assert held.get("reference") == (held["lora"] if start else None)
    assert recipe.described()["objective"] == "dpo"
