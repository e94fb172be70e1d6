"""A merge that is killed: nothing that looks finished, and the next one goes on with the shard it was at."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.export.place import JOURNAL, Place
from gemma4_tpu.models.names import name_map
from gemma4_tpu.storage import filesystem
from tests.export.conftest import tree
from tests.export.runs import make_run

MERGE = [sys.executable, "-m", "gemma4_tpu.merge", "verify=false"]


def write_base(folder, *, shards, padding_bytes):
    """A random `tiny` checkpoint in shards, padded by a tensor of another modality in each."""
    arch, rng = ARCHITECTURES["tiny"], np.random.default_rng(0)
    tensors = {}
    for tensor in name_map(arch).values():
        for name in tensor.hf_names:
            tensors[f"model.{name}"] = (0.1 * rng.standard_normal(tensor.hf_shape)).astype(np.float16)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(arch)))
    names, index = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = {name: tensors[name] for name in names[shard::shards]}
        own[f"model.vision_tower.{shard}.weight"] = np.full((padding_bytes // 1024, 1024), shard, np.uint8)
        save_file(own, folder / file)
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture
def tiny_run(tmp_path):
    base = write_base(tmp_path / "base", shards=16, padding_bytes=4 << 20)
    return make_run(tmp_path / "run", base, lora=LoraConfig(rank=4))


def looks_finished(run):
    """What somebody who looks for models would find: anything with a config.json, and the target."""
    return [*run.rglob("config.json"), *run.glob("merged")]


@pytest.mark.slow
def test_killed_at_random_points_it_goes_on_and_ends_with_the_same_bytes(tiny_run, merge):
    reference = tiny_run.parent / "reference"
    merge(tiny_run, "verify=false", f"target={reference}")
    rng, resumed, kills = random.Random(0), 0, 0
    staging = tiny_run / ".merged.partial"
    while kills < 3:
        process = subprocess.Popen(
            [*MERGE, f"run={tiny_run}"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        wanted = 5 * kills + rng.randint(0, 4)  # finished shards at which to kill
        while process.poll() is None and len(list(staging.glob("*.safetensors"))) < wanted:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        _, told = process.communicate(timeout=200)
        resumed += "resuming an interrupted export" in told
        if process.returncode == 0 or (tiny_run / "merged").exists():
            break  # it was published before the signal came: whole, as is seen below
        kills += 1
        assert looks_finished(tiny_run) == []
    assert kills >= 2 and resumed >= 1
    if not (tiny_run / "merged").exists():
        last = subprocess.run([*MERGE, f"run={tiny_run}"], check=True, capture_output=True, text=True, timeout=300)
        assert "(done before)" in last.stderr
    assert tree(tiny_run / "merged") == tree(reference)
    assert not staging.exists()


@pytest.fixture
def killed_after(merge, monkeypatch):
    """Runs a merge that ends like a killed one after so many finished files."""

    def run(files, folder, *words):
        finish, calls = Place.finish, []

        def dying(*arguments, **notes):
            calls.append(1)
            if len(calls) > files:
                raise SystemExit(137)
            finish(*arguments, **notes)

        with monkeypatch.context() as patch:
            patch.setattr(Place, "finish", dying)
            with pytest.raises(SystemExit):
                merge(folder, *words)

    return run


def test_what_another_checkpoint_left_behind_is_not_gone_on_with(run_of, merge, killed_after):
    run, _ = run_of(updates=(3, 6), shards=4)
    merge(run, "verify=false", "checkpoint=6", f"target={run}/reference")
    killed_after(2, run, "verify=false", "checkpoint=3")
    assert len(list(run.glob(".merged.partial/*.safetensors"))) == 2
    merge(run, "verify=false", "checkpoint=6")
    assert tree(run / "merged") == tree(run / "reference")


def test_a_finished_shard_that_holds_other_bytes_is_written_again(run_of, merge, killed_after, caplog):
    run, _ = run_of(shards=4)
    merge(run, "verify=false", f"target={run}/reference")
    killed_after(3, run, "verify=false")
    shard = sorted(run.glob(".merged.partial/*.safetensors"))[1]
    with open(shard, "r+b") as file:  # its size stays
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))
    with caplog.at_level(logging.INFO):
        merge(run, "verify=false")
    assert "resuming an interrupted export: 2 files are done" in caplog.text
    assert f"{shard}: its bytes are not the ones written" in caplog.text
    assert caplog.text.count("(done before)") == 2
    assert tree(run / "merged") == tree(run / "reference")


def test_an_upload_that_is_cut_off_goes_on_too(tmp_path, merge, killed_after, bucket, caplog):
    base = write_base(tmp_path / "base", shards=4, padding_bytes=1 << 16)
    run = make_run(tmp_path / "run", base, lora=LoraConfig(rank=4))
    merge(run, "verify=false", f"target={run}/reference")
    fs, root = filesystem(bucket)
    killed_after(3, run, "verify=false", f"target={bucket}/model")
    uploaded = sorted(fs.glob(f"{root}/.model.partial/*.safetensors"))
    assert len(uploaded) == 3 and not fs.exists(f"{root}/model")
    damaged = bytearray(fs.cat_file(uploaded[1]))
    damaged[-1000:] = bytes(1000)
    fs.pipe_file(uploaded[1], bytes(damaged))
    with caplog.at_level(logging.INFO):
        merge(run, "verify=false", f"target={bucket}/model")
    assert "2 files are done" in caplog.text and caplog.text.count("(done before)") == 2
    local = {name: data for name, data in tree(run / "reference").items() if name != JOURNAL}  # other checksums
    assert {name: fs.cat_file(f"{root}/model/{name}") for name in local} == local


def test_two_exports_to_one_target(tiny_run, refused):
    """Another process holds the lock of the staging folder, as one that is exporting there does."""
    staging = tiny_run / ".merged.partial"
    staging.mkdir()
    (staging / JOURNAL).write_text(json.dumps({"identity": {}, "files": {}}))
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, staging / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    other.stdout.readline()
    assert "another process is exporting there" in refused(f"run={tiny_run}", "verify=false")
    assert (staging / JOURNAL).exists()
    other.communicate("\n", timeout=60)


def test_a_kill_between_the_renames_of_a_replacement_puts_the_old_model_back(tiny_run, merge, monkeypatch):
    merge(tiny_run, "verify=false")
    before = tree(tiny_run / "merged")
    rename = os.rename

    def dying(source, target):
        if str(source).endswith(".partial"):
            raise SystemExit(137)
        rename(source, target)

    monkeypatch.setattr(os, "rename", dying)
    with pytest.raises(SystemExit):
        merge(tiny_run, "verify=false", "overwrite=true")
    assert not (tiny_run / "merged").exists()
    monkeypatch.undo()
    from gemma4_tpu.merge import main

    assert main([f"run={tiny_run}", "checkpoint=latest", "verify=false"]) == 0  # it is there already, as before
    assert tree(tiny_run / "merged") == before


def test_memory_does_not_grow_with_the_size_of_a_tensor(tmp_path):
    """One untouched tensor of 1.07 GB. Pieces under way are 512 MiB at most, imports of NumPy, JAX and Orbax 350 MB:
    890 MB, and a tenth for the allocator; holding the tensor would take 1.4 GB.

    Linux keeps the peak of a process by its address space as VmHWM; ru_maxrss would count this test's own memory.
    """
    base = write_base(tmp_path / "base", shards=1, padding_bytes=1 << 30)
    run = make_run(tmp_path / "run", base, lora=LoraConfig(rank=4))
    code = (
        "import re, sys; from gemma4_tpu.merge import main; code = main(sys.argv[1:]);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, f"run={run}", "verify=stream"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    assert int(done.stdout.split()[-1]) * 1024 < 980e6
