"""The diffs of docs/extending.md apply to the package as it is, and what they add works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
from tests.cpu_compiler import flags
from tests.house.scripts import ROOT
from tests.tpu_compiler import needs_tpu_compiler

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = re.findall(r"^python -m gemma4_tpu\.(\w+) (.*)$", PAGE, re.M)
CHECK = """
import sys
from gemma4_tpu.commands import ENTRIES
from gemma4_tpu.config.load import load
from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.costing.ceiling import ModelDemand, train
from gemma4_tpu.hardware import SLICES, chip_of
from gemma4_tpu.prices import ON_DEMAND, slice_price
name, *words = sys.argv[1:]
load(words, ENTRIES[name])
assert chip_of("tpu", "TPU v4").name == "v4" and slice_price(SLICES["v4-8"], ON_DEMAND) is None
demand = ModelDemand.of(ARCHITECTURES["gemma4_e4b"])
ours, slower = (train(demand, SLICES[name], LoraConfig(rank=64), 922).seconds for name in ("v4-8", "v5e-4"))
assert abs(ours / slower - 197 / 275) < 0.01  # by the peaks
"""
ADAPTED = """
import jax, jax.numpy as jnp, numpy as np
from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models import lora as adapters, sharding
from gemma4_tpu.models.gemma4 import Model, hidden_states
from gemma4_tpu.models.layout import Layout, get
from gemma4_tpu.models.names import name_map
from gemma4_tpu.models.params import random_params

arch, lora = ARCHITECTURES["tiny_e2b"], LoraConfig(rank=4, alpha=4.0)
layout, mesh = Layout.of(arch, lora), sharding.make_mesh(1, 1, jax.devices()[:1])
base = random_params(arch, layout, sharding.places(layout, mesh), jnp.float32, 0)
fresh = adapters.init(layout, jax.random.key(0))
(gate,) = (a for a in adapters.adapters(layout) if a.base.path[1:] == (0, 0, "per_layer_input_gate", "w"))
b = 0.1 * jax.random.normal(jax.random.key(1), gate.b.array_shape)
get(fresh, gate.b.path[:-1])[gate.b.path[-1]] = b
tokens = np.arange(3, 35, dtype=np.int32)[None]
model = Model(layout=layout, compute_dtype=jnp.float32)
run = lambda params, adapter: np.asarray(hidden_states(model, params, adapter, tokens, tokens * 0 + 1, tokens - 3))
before, adapted = run(base, None), run(base, fresh)
for r, name in enumerate(gate.base.tunix_names):
    tensor = name_map(arch)[name]
    ((hf_name, (a, b)),) = tensor.lora_factors(get(fresh, gate.a.path)[r], get(fresh, gate.b.path)[r]).items()
    assert hf_name.endswith("per_layer_input_gate.weight")
    held = get(base, gate.base.path[:-1])
    held["w"] = held["w"].at[r].add(tensor.from_hf(lambda name, index, shape: (b @ a).reshape(shape)))
assert np.abs(adapted - before).max() > 1e-2
np.testing.assert_allclose(run(base, None), adapted, atol=1e-4)  # sums in another order, in float32
"""
SMALL = ["data.sequence_length=128", "data.max_drop_fraction=0.1", "data.heldout_fraction=0", "trainer.max_updates=1"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with the page's diffs applied, beside the files that its commands name."""
    copy = tmp_path_factory.mktemp("extended")
    skipped = shutil.ignore_patterns("__pycache__", "local")
    for folder in ("gemma4_tpu", "conf"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skipped if folder == "gemma4_tpu" else None)
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=copy, check=True, capture_output=True)
    rows = [{"title": f"Add {n} to the number.", "body": str(n), "accepted_answer": str(2 * n)} for n in range(60)]
    (copy / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"title": "?", "accepted_answer": ""}])))
    problem = VerilogSmoke().load()[0]
    card = {"prompt": problem.prompt, "reference": problem.reference, "testbench": problem.testbench}
    (copy / "cards").mkdir()
    (copy / "cards/first.yaml").write_text(yaml.safe_dump(card))
    right = problem.reference.replace(problem.reference_top, problem.top)
    samples = [{"problem": "first", "completion": code} for code in (right, "module TopModule; endmodule")]
    (copy / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    return copy


def python(copy, *arguments):
    """Runs Python in the copy, whose package then comes before the installed one; returns what it printed."""
    one_device = os.environ | {"XLA_FLAGS": flags(devices=1)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=copy, env=one_device, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def words(command):
    (found,) = [shlex.split(given) for name, given in COMMANDS if name == command or command in given]
    return found


def test_every_addition_has_a_diff_and_a_command():
    assert len(DIFFS) == len(COMMANDS) == len(re.findall("^## ", PAGE, re.M)) == 5


@needs_tpu_compiler
def test_a_chip(extended):
    python(extended, "-c", CHECK, "plan", *words("plan"))


def test_a_model_size_and_a_data_source(extended):
    """Trained together, to save a start."""
    given = [*words("tiny_wide"), *words("data=chat_jsonl"), *SMALL, "run_dir=run"]
    python(extended, "-m", "gemma4_tpu.train", *given)
    result = json.loads((extended / "run/result.json").read_text())
    drops = json.loads((extended / "run/data.json").read_text())["train"]
    assert result["status"] == "finished"
    assert yaml.safe_load((extended / "run/config.yaml").read_text())["model"]["name"] == "tiny_wide"
    assert "no_response" in json.dumps(drops)
    assert json.loads((extended / "run/data.json").read_text())["forms"] == {"forum": 60}


def test_an_adapted_weight(extended):
    """The one line trains it, and what is exported of it is what was trained."""
    given = [*words("tiny_e2b"), *words("data=chat_jsonl"), *SMALL, "run_dir=adapted"]
    python(extended, "-m", "gemma4_tpu.train", *given)
    assert "per_layer_input_gate 10" in (extended / "adapted/log.txt").read_text()
    python(extended, "-c", ADAPTED)


def test_a_benchmark(extended):
    told = python(extended, "-m", "gemma4_tpu.evaluate", *words("evaluate"), "run_dir=evaluation")
    assert "pass@1  0.500" in told
