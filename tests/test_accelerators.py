"""What is found without asking drivers; and that JAX is kept from looking for a TPU where there is none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_tpu import accelerators

START = """
import jax
from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.machines import HardwareConfig, MeshConfig
from gemma4_tpu.training.setup import start_mesh
print(start_mesh(HardwareConfig(), MeshConfig(), ARCHITECTURES["tiny"]).devices.flat[0].platform)
"""


@pytest.mark.skipif(not accelerators.only_cpus_here(), reason="JAX has accelerators to look for on this machine")
def test_libtpu_says_nothing_where_there_is_no_tpu():
    path = str(Path(accelerators.__file__).parents[1])
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"} | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", START], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("cpu", "")


@pytest.mark.parametrize(
    ("file", "plugins", "only_cpus"),
    [(None, [], True), ("accel0", [], False), ("vfio/0", [], False), ("vfio/vfio", [], True), (None, ["cuda"], False)],
)
def test_tpus_and_plugins_are_left_to_jax(file, plugins, only_cpus, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    find, libtpu = importlib.util.find_spec, importlib.util.find_spec("sys")
    there = {"libtpu": libtpu, "jax_plugins": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: there.get(name) or find(name, *more))
    monkeypatch.setattr(accelerators, "entry_points", lambda group: plugins)
    monkeypatch.setattr(accelerators, "_TPU_FILES", [(tmp_path, "accel[0-9]*"), (tmp_path / "vfio", "[0-9]*")])
    if file:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert accelerators.only_cpus_here() is only_cpus
