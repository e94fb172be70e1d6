"""Roll-outs in a plan: the compiled phases of a small model on a mesh, and what follows from their figures."""

import json
from dataclasses import replace

import pytest

from gemma4_tpu.config.load import load
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.config.schema import LoraConfig, ObjectiveConfig, OptimizerConfig, TrainerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import GIB, SLICES, MeshSizes
from gemma4_tpu.models.kv_cache import kv_cache_bytes
from gemma4_tpu.models.sharding import make_mesh
from gemma4_tpu.plan import PLAN
from gemma4_tpu.planning import compile as compiling
from gemma4_tpu.planning.calibration import BAND, ScheduleRates
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.phase_times import decoding_steps, rollouts_of
from gemma4_tpu.planning.phases import Phases
from gemma4_tpu.planning.planned import Planned
from gemma4_tpu.planning.schedule import Op, from_plain, plain
from gemma4_tpu.planning.topology import absent_devices
from gemma4_tpu.planning.walk import walk
from gemma4_tpu.training.recipe import Recipe, TeacherModel
from tests.planning.test_tpu import ARCH, environment  # noqa: F401 (a fixture)
from tests.tpu_compiler import needs_tpu_compiler

pytestmark = needs_tpu_compiler
WORDS = ["hardware=v6e4", "model=gemma4_e4b", "mesh=tp", "mesh.tp=2", "mesh.dp=2", "data=chat_jsonl"]


@pytest.mark.slow
def test_decoding_on_tp_gathers_no_weights_and_all_that_lies_there_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    objective = ObjectiveConfig(kind="distill", teacher="random:0", teacher_checkpoint="latest", divergence="reverse")
    recipe = Recipe(
        arch=ARCH, hardware=HardwareConfig(), lora=LoraConfig(rank=8), optimizer=OptimizerConfig(),
        trainer=TrainerConfig(remat="none"), mesh=MeshSizes(2, 1, 2), rows=2, length=512, updates=10,
        objective=objective, teacher=TeacherModel(replace(ARCH, num_layers=4, layer_types=ARCH.layer_types * 2),
                                                  LoraConfig(enabled=False)),
    )  # fmt: skip
    mesh = make_mesh(1, 2, absent_devices(SLICES["v6e-4"]), dp=2)
    given = compiling.shapes(recipe, mesh)
    held = given.bytes_per_chip()
    assert held["teacher"] > held["base"]
    config = RolloutsConfig(prompts=4, samples=2, prompt_tokens=128, new_tokens=384, slots=16)
    grid = Grid.of(SLICES["v6e-4"], [device.coords for device in mesh.devices.flat])
    compiling_them = Phases(given, config, mesh, grid, tmp_path / "dump", 32 * GIB, [{}, ["here"]])
    told = compiling_them.assigned()
    # 16 slots over 2 places, 4 (sliding) and 2 (global) KV heads over 2 chips; bfloat16
    assert told["kv_cache_bytes"] == 8 * kv_cache_bytes(ARCH, 512) / 2
    for name in ("read", "decode", "score"):
        assert told[name]["peak_bytes"] > held["base"] + held["teacher"] + held["optimizer"]
    counted = told["decode"]["counts"]
    each = 16 * held["base"]  # of 16 tokens, had they gathered the weights
    assert counted["collectives"].get("all-gather", {"bytes": 0})["bytes"] < 0.1 * each
    assert counted["hbm_traffic_bytes"] > 0.5 * each  # a token reads them all (small ones may stay on the chip)
    to_the_end = compiling_them.finished()
    for name in ("read", "decode", "score"):
        assert to_the_end[name]["counts"]["flops"] == told[name]["counts"]["flops"]
        walked = walk(from_plain(to_the_end[name]["schedule"]), ScheduleRates.of(SLICES["v6e-4"]))
        assert walked.seconds > 0
    again = Phases(given, config, mesh, grid, tmp_path / "none", 32 * GIB, [{}, ["here"]])
    kept = json.loads(json.dumps(to_the_end))
    assert again.assigned() == again.finished() == kept and not (tmp_path / "none").exists()


def planned(*words: str) -> Planned:
    loaded = load(["objective=grpo", *WORDS, *words], PLAN)
    return Planned.of(loaded.root, loaded.checked)


def phase(peak: float, traffic: float) -> dict:
    counts = {"flops": 1e9, "hbm_traffic_bytes": traffic, "collectives": {"all-reduce": {"count": 16, "bytes": 16e6}},
              "link_bytes": {"x": 8e6}}  # fmt: skip
    return {"argument_bytes": 1, "peak_bytes": peak, "counts": counts}


def answer(decode: float = 20 * GIB) -> dict:
    told = {"read": phase(18 * GIB, 2e10), "decode": phase(decode, 16 * 8e9), "score": phase(19 * GIB, 2e10)}
    return {"hbm_limit_bytes": 31 * GIB, "phases": {"kv_cache_bytes": 4 * GIB, "tokens": 16, **told}}


def test_seconds_follow_from_the_traffic_of_a_token_and_the_answers_of_an_update():
    config = RolloutsConfig(prompts=16, samples=8, slots=64, new_tokens=120)
    assert decoding_steps(config, 120, 16) == 2 * 128  # two answers in each slot, and half a segment behind each
    assert decoding_steps(replace(config, slots=1000), 120, 16) == 120
    told = rollouts_of(planned("rollouts.prompts=16", "rollouts.slots=64", "plan.answer_tokens=120"), answer())
    hbm = SLICES["v6e-4"].chip.device.hbm_bytes_per_second
    assert told["phases"]["decode"]["roofline_seconds"] == pytest.approx(8e9 / hbm)
    assert told["phases"]["decode"]["bound_by"] == "hbm"
    assert told["phases"]["decode"]["collective_bytes_per_chip"] == {"all-reduce": 1e6}
    assert told["seconds"]["low"]["decode"] == pytest.approx(256 * 8e9 / hbm / 0.2)
    assert told["seconds"]["mid"]["score"] == pytest.approx(1.2 * 2e10 / hbm / 0.325)
    assert told["idle_slots"] == pytest.approx(1 - 120 / 128)  # 8 of 128 steps of each answer
    assert "misfit" not in told


def test_with_a_schedule_they_are_those_of_the_schedules_band():
    told = answer()
    ops = plain((Op(name="loop", trips=16, body=(Op(name="product", part="base_products", cycles=17_500_000),)),))
    for name in ("read", "decode", "score"):
        told["phases"][name]["schedule"] = ops  # 16 times 10 ms at 1.75 GHz
    words = ("rollouts.prompts=16", "rollouts.slots=64", "plan.answer_tokens=120")
    found = rollouts_of(planned(*words), told, BAND)
    assert found["phases"]["decode"]["schedule_seconds"] == pytest.approx(0.010)
    assert found["seconds"]["low"]["decode"] == pytest.approx(256 * 0.010 * BAND.high)
    assert found["seconds"]["high"]["read"] == pytest.approx(0.160 * BAND.low)
    assert found["seconds"]["mid"]["score"] == pytest.approx(1.2 * 0.160 * (BAND.low + BAND.high) / 2)
    del told["phases"]["read"]["schedule"]  # not all of them
    assert rollouts_of(planned(*words), told, BAND)["seconds"] == rollouts_of(planned(*words), told)["seconds"]


def test_a_cache_that_does_not_fit_is_told_with_the_slots_that_would():
    told = rollouts_of(planned("rollouts.slots=64"), answer(decode=33 * GIB))
    # 33 GiB less a cache of 4 leave 2 of 31; a slot takes a sixteenth of one
    assert told["misfit"].startswith("to decode needs 33.0 GiB, there are 31.00 GiB of HBM per chip")
    assert "give rollouts.slots=30 (each takes 64 MiB)" in told["misfit"]
    assert "leave no room for a cache" in rollouts_of(planned(), answer(decode=40 * GIB))["misfit"]


def test_a_mesh_that_gathers_and_a_teacher_that_is_not_named_are_refused():
    with pytest.raises(UserError, match=r"mesh\.fsdp=2: .* each would gather .* GiB of weights"):
        planned("mesh.dp=1", "mesh.fsdp=2")
    with pytest.raises(UserError, match=r"objective\.teacher=gone: .*objective\.teacher_model=gemma4_31b"):
        planned("objective=distill", "objective.teacher=gone")
    taught = planned("objective=distill", "objective.teacher_model=gemma4_12b").recipe.teacher
    assert taught is not None and taught.arch.name == "gemma4_12b"
