"""Loading onto meshes of eight CPU devices, and what it costs in host memory."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma4_tpu.architectures import ARCHITECTURES, from_hf_config, to_hf_config
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import sharding
from gemma4_tpu.models.layout import Layout, get
from gemma4_tpu.models.match import match
from gemma4_tpu.models.names import name_map
from gemma4_tpu.models.params import by_name, load_params, random_params
from gemma4_tpu.models.tensorfile import Checkpoint, TensorFile
from tests.cpu_compiler import flags
from tests.models.checkpoints import KINDS, make_checkpoint
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(devices=8)}
MESHES = [(1, 4), (2, 4), (4, 1), (2, 2), (1, 1)]


def mesh_of(fsdp, tp):
    return sharding.make_mesh(fsdp, tp, jax.devices()[: fsdp * tp])


def architecture(folder):
    return from_hf_config(json.loads((Path(folder) / "config.json").read_text()))


def load(folder, mesh=(1, 1), dtype=jnp.float32, **options):
    arch = architecture(folder)
    layout = Layout.of(arch)
    params = load_params(
        Checkpoint(str(folder)), arch, layout, sharding.places(layout, mesh_of(*mesh)), dtype, **options
    )  # fmt: skip
    return params, layout


def on_disk(folder):
    """Every tensor in memory's layout, read whole."""
    arch, checkpoint = architecture(folder), Checkpoint(str(folder))
    prefix = match(arch, {name: checkpoint.shape(name) for name in checkpoint.names()}, str(folder)).prefix
    return {
        name: tensor.from_hf(lambda hf, index, shape: checkpoint.read(prefix + hf, index, shape))
        for name, tensor in name_map(arch).items()
    }


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mesh_holds_exactly_the_checkpoint(kind, mesh):
    folder = make_checkpoint(kind, prefix="multimodal", shards=3)
    params, layout = load(folder, mesh)
    for leaf in layout.leaves():
        array = get(params, leaf.path)
        assert isinstance(array, jax.Array), leaf.path
        assert (array.shape, array.dtype) == (leaf.array_shape, jnp.float32)
        assert array.sharding.spec == sharding.spec(mesh_of(*mesh), leaf)
    expected = on_disk(folder)
    found = by_name(params, layout)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_weights_are_really_split_over_the_mesh():
    params, layout = load(make_checkpoint("dense"), (2, 4))
    leaf = next(leaf for leaf in layout.leaves() if leaf.path[-2] == "gate_proj")
    array = get(params, leaf.path)
    assert {s.data.shape for s in array.addressable_shards} == {(2, 64 // 2, 96 // 4)}


def test_bfloat16_rounds_to_nearest_and_float32_widens_exactly():
    fp32, bf16 = make_checkpoint("dense"), make_checkpoint("dense", dtype="bfloat16")
    narrowed, layout = load(fp32, (2, 2), jnp.bfloat16)
    stored, _ = load(bf16, (2, 2), jnp.bfloat16)
    widened, _ = load(bf16, (2, 2), jnp.float32)
    originals = on_disk(fp32)
    stored, widened = by_name(stored, layout), by_name(widened, layout)
    for name, array in by_name(narrowed, layout).items():
        np.testing.assert_array_equal(array, originals[name].astype(ml_dtypes.bfloat16), err_msg=name)
        np.testing.assert_array_equal(array, stored[name], err_msg=name)
        np.testing.assert_array_equal(np.float32(array), widened[name], err_msg=name)


def test_a_remote_checkpoint_is_read_once_and_not_staged(monkeypatch):
    """Every byte of the text weights crosses the network once, though each tensor is cut over eight devices."""
    folder = make_checkpoint("dense", shards=3)
    fs = fsspec.filesystem("memory")
    for file in folder.iterdir():
        fs.pipe_file(f"/bucket/base/{file.name}", file.read_bytes())
    local, layout = load(folder, (2, 4))
    checkpoint, arch = Checkpoint("memory://bucket/base"), architecture(folder)
    fetched = []
    original = type(fs).cat_ranges

    def counted(self, paths, starts, ends, **options):
        fetched.extend(stop - start for start, stop in zip(starts, ends, strict=True))
        return original(self, paths, starts, ends, **options)

    monkeypatch.setattr(type(fs), "cat_ranges", counted)
    remote = load_params(checkpoint, arch, layout, sharding.places(layout, mesh_of(2, 4)), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, remote, local)
    assert sum(fetched) == sum(np.prod(checkpoint.shape(name)) * 4 for name in checkpoint.names())
    fs.rm("/bucket", recursive=True)


def test_nothing_is_read_from_a_checkpoint_that_does_not_fit(monkeypatch):
    folder = make_checkpoint("dense")
    other = ARCHITECTURES["tiny"]
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("read a tensor"))
    layout = Layout.of(other)
    with pytest.raises(UserError, match=r"its tensors do not match tiny: .* unexpected: .* with another shape: "):
        load_params(Checkpoint(str(folder)), other, layout, sharding.places(layout, mesh_of(1, 1)), jnp.float32)


def rewrite(folder, name, change):
    """Changes the bytes of one tensor in place."""
    file = TensorFile(f"{folder}/model.safetensors")
    info = file.tensors[name]
    values = np.array(file.read(name))
    change(values)
    with open(file.path, "r+b") as out:
        out.seek(info.start)
        out.write(values.tobytes())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    folder = shutil.copytree(make_checkpoint("dense"), tmp_path / "base")
    rewrite(folder, "model.layers.7.mlp.down_proj.weight", lambda w: w.__setitem__((5, 5), value))
    with pytest.raises(UserError, match=r"base: NaN or infinity in layers\.7\.mlp\.down_proj\.kernel:"):
        load(folder, (2, 2))


def test_a_quantised_checkpoint_is_refused(tmp_path):
    folder = shutil.copytree(make_checkpoint("dense", dtype="bfloat16"), tmp_path / "base")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"BF16"', b'"dtype":"I16" '))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is stored as int16"):
        load(folder)


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_output_matrix_is_compared_to_its_last_value(tmp_path, same):
    folder = shutil.copytree(make_checkpoint("dense"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    if not same:
        tensors["lm_head.weight"][101, 63] += 1
    save_file(tensors, folder / "model.safetensors")
    if same:
        load(folder, (2, 2))
        return
    with pytest.raises(
        UserError, match=r"lm_head\.weight is not model\.embed_tokens\.weight: a separate output matrix"
    ):
        load(folder, (2, 2))


def test_the_log_says_what_was_loaded(caplog):
    with caplog.at_level(logging.INFO, logger="gemma4_tpu.models.params"):
        load(folder := make_checkpoint("e2b", prefix="multimodal"))
    others = [name for name in Checkpoint(str(folder)).names() if not name.startswith("model.language_model.")]
    assert len(others) > 16  # a vision and an audio tower
    assert "loaded 305 tensors" in caplog.text
    assert f"skipped {len(others)} of other modalities" in caplog.text


def test_each_array_can_be_replaced_before_the_next_is_read():
    seen = []

    def halve(leaf, array):
        seen.append(leaf.path)
        return array.astype(jnp.bfloat16) if leaf.stacked else array

    params, layout = load(make_checkpoint("dense"), then=halve)
    assert seen == [leaf.path for leaf in layout.leaves()]
    assert params["stages"][0][0]["mlp"]["gate_proj"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["tiny", "tiny_moe", "tiny_e2b"])
def test_random_weights_depend_on_seed_and_name_only(name):
    arch = ARCHITECTURES[name]
    layout = Layout.of(arch)

    def draw(mesh, seed):
        return by_name(random_params(arch, layout, sharding.places(layout, mesh_of(*mesh)), jnp.float32, seed), layout)

    one, other, reseeded = draw((1, 1), 0), draw((4, 2), 0), draw((1, 1), 1)
    for tensor in one:
        np.testing.assert_array_equal(one[tensor], other[tensor], err_msg=tensor)
    kernel = np.asarray(one["layers.1.mlp.gate_proj.kernel"])
    # the mean square of n uniform values has a relative standard deviation of sqrt(0.8 / n): 1.1% of 64 x 96
    assert np.mean(kernel**2) * kernel.shape[0] == pytest.approx(1, rel=0.05)
    assert not np.array_equal(kernel, one["layers.2.mlp.gate_proj.kernel"])
    assert not np.array_equal(kernel, reseeded["layers.1.mlp.gate_proj.kernel"])
    assert np.all(np.asarray(one["final_norm.scale"]) == 1)


MEASURE = """
import json, sys, threading, time
import jax, jax.numpy as jnp, psutil
from gemma4_tpu.architectures import from_hf_config
from gemma4_tpu.models import sharding
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.tensorfile import Checkpoint

folder = sys.argv[1]
arch = from_hf_config(json.load(open(folder + "/config.json")))
layout = Layout.of(arch)
mesh = sharding.make_mesh(2, 4)
places = sharding.places(layout, mesh)
jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(8)))
process, peak, done = psutil.Process(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)

before = process.memory_info().rss
watcher = threading.Thread(target=watch)
watcher.start()
started = time.perf_counter()
params = load_params(Checkpoint(folder), arch, layout, places, jnp.bfloat16)
seconds = time.perf_counter() - started
done = True
watcher.join()
total = sum(a.nbytes for a in jax.tree.leaves(params))
print(json.dumps({"extra_bytes": peak - before - total, "total_bytes": total, "seconds": seconds}))
"""


def test_host_memory_beyond_the_arrays_is_a_few_tensors(tmp_path):
    """A 300 MB checkpoint in 31B's layout; the CPU devices' arrays are host memory too and are taken off."""
    arch = dataclasses.replace(
        ARCHITECTURES["tiny"], num_layers=48, layer_types=ARCHITECTURES["tiny"].layer_types * 8, embed_dim=512,
        hidden_dim=2048, vocab_size=16_384,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(arch)))
    tensors = name_map(arch).values()
    rng = np.random.default_rng(0)
    weights = {
        "model." + name: rng.standard_normal(t.hf_shape, np.float32).astype(ml_dtypes.bfloat16)
        for t in tensors
        for name in t.hf_names
    }
    largest_bytes = max(w.nbytes for w in weights.values())
    total_bytes = sum(w.nbytes for w in weights.values())
    save_file(weights, tmp_path / "model.safetensors")
    del weights
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True,
        check=True, cwd=ROOT,
    )  # fmt: skip
    measured = json.loads(run.stdout)
    assert measured["total_bytes"] == total_bytes
    # at its peak, with the embedding: the pages of the file, the buffer, the devices' copy; and what Python and XLA
    # allocate on the way. Holding the whole model once more would be 20 of them.
    assert measured["extra_bytes"] < 5 * largest_bytes < total_bytes / 4


PROCESS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
from gemma4_tpu.architectures import from_hf_config
from gemma4_tpu.models import sharding
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.tensorfile import Checkpoint, TensorFile

original, read = TensorFile.read, {}

def counted(self, name, index=None, shape=None):
    block = original(self, name, index, shape)
    read[name] = read.get(name, 0) + block.size
    return block

TensorFile.read = counted
arch = from_hf_config(json.load(open(sys.argv[1] + "/config.json")))
layout = Layout.of(arch)
mesh = sharding.make_mesh(2, 4)
places = sharding.places(layout, mesh)
params = load_params(Checkpoint(sys.argv[1]), arch, layout, places, jnp.float32)
total = jax.jit(lambda p: sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(p)))(params)
print(json.dumps({"sum": float(total), "up": read["model.layers.3.mlp.up_proj.weight"],
                  "norm": read["model.norm.weight"]}))
"""


@pytest.mark.slow
def test_two_processes_read_what_their_own_devices_hold(tmp_path):
    """fsdp spans the processes: each reads its half of a matrix, and all of a replicated vector."""
    folder = make_checkpoint("dense")
    port = free_port()
    env = ENVIRONMENT | {"XLA_FLAGS": flags(devices=4)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder), str(port), str(i)], env=env, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = [json.loads(out.splitlines()[-1]) if out else pytest.fail(err) for out, err in outputs]
    assert [f["up"] for f in found] == [96 * 64 // 2] * 2
    assert [f["norm"] for f in found] == [64] * 2
    params, _ = load(folder)
    expected = sum(float(np.abs(np.asarray(a, np.float64)).sum()) for a in jax.tree.leaves(params))
    assert found[0]["sum"] == found[1]["sum"] == pytest.approx(expected, rel=1e-5)  # fp32 sum of 700,000 values
