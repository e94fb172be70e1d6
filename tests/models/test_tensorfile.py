"""The safetensors reader against files that the safetensors library wrote, whole and damaged."""

import json
import shutil
import struct

import fsspec
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma4_tpu import storage
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.tensorfile import Checkpoint, TensorFile
from tests.models.checkpoints import make_checkpoint


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.standard_normal((12, 10)).astype(np.float32),
        "half": rng.standard_normal((4, 6, 5)).astype(ml_dtypes.bfloat16),
        "fp16": rng.standard_normal(7).astype(np.float16),
        "counter": np.int64(3)[None],
        "nothing": np.zeros((0, 4), np.float32),
        "scalar": np.full((), 2.5, np.float32),
    }


@pytest.fixture(params=["local", "remote"])
def path(request, arrays, tmp_path):
    """The same file on disk and behind fsspec, where gs:// paths go too."""
    local = tmp_path / "model.safetensors"
    save_file(arrays, local, metadata={"format": "pt"})
    if request.param == "local":
        yield str(local)
        return
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/model.safetensors", local.read_bytes())
    yield "memory://bucket/model.safetensors"
    fs.rm("/bucket", recursive=True)


def test_reads_what_was_written(path, arrays):
    file = TensorFile(path)
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        got = file.read(name)
        assert got.dtype == array.dtype
        assert not got.flags.writeable
        np.testing.assert_array_equal(got, array)


def test_reads_slices_and_other_dims(path, arrays, monkeypatch):
    monkeypatch.setattr(storage, "_FETCH_BYTES", 64)  # so that even these reads take several requests
    file = TensorFile(path)
    index = (slice(2, 9), slice(3, 5))
    np.testing.assert_array_equal(file.read("matrix", index), arrays["matrix"][index])
    split = (slice(1, 3), slice(None), slice(4, 10))
    np.testing.assert_array_equal(file.read("matrix", split, (4, 3, 10)), arrays["matrix"].reshape(4, 3, 10)[split])
    np.testing.assert_array_equal(file.read("half", [slice(3, None)] * 3), arrays["half"][3:, 3:, 3:])
    assert file.read("matrix", (slice(4, 4), slice(None))).shape == (0, 10)


def test_a_slice_maps_only_the_bytes_it_spans(path, monkeypatch):
    """Eight of twelve rows of ten float32."""
    file = TensorFile(path)
    asked = []

    def read(_, start, stop):
        asked.append(stop - start)
        return memoryview(bytes(stop - start))

    monkeypatch.setattr(type(file._file), "read", read)
    file.read("matrix", (slice(2, 10), slice(None)))
    assert asked == [8 * 10 * 4]


def damage(path, *, header=None, header_bytes=None, tail=b""):
    """Rewrites a safetensors file with another header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if header is not None:
        entries = json.loads(data[8 : 8 + length])
        header(entries)
        header_bytes = json.dumps(entries).encode()
    header_bytes = data[8 : 8 + length] if header_bytes is None else header_bytes
    path.write_bytes(struct.pack("<Q", len(header_bytes)) + header_bytes + data[8 + length :] + tail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), r"truncated: tensor \w+ ends at byte \d+, the file at \d+"),
        (lambda p: p.write_bytes(p.read_bytes()[:5]), "5 bytes are not a safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:60]), r"claims a header of \d+ bytes, but the file has 60"),
        (lambda p: p.write_bytes(b"\xff" * 4000), "truncated, or not a safetensors file"),
        (lambda p: damage(p, header_bytes=b'{"matrix": '), "header is not valid JSON"),
        (lambda p: damage(p, header=lambda h: h["fp16"].update(dtype="F4")), "tensor fp16 has the unknown dtype 'F4'"),
        (lambda p: damage(p, header=lambda h: h["fp16"].pop("shape")), "tensor fp16 has the damaged header entry"),
        (lambda p: damage(p, header=lambda h: h["fp16"].update(shape=[8])), r"tensor fp16 F16\[8\] needs 16 bytes"),
        (
            lambda p: damage(p, header=lambda h: h["fp16"].update(data_offsets=[90_000, 90_014])),
            "tensor fp16 starts at byte",
        ),
        (lambda p: damage(p, tail=b"rest"), "4 bytes after the last tensor"),
    ],
)
def test_damaged_files_are_refused_with_their_name(arrays, tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    change(path)
    with pytest.raises(UserError, match=message) as refusal:
        TensorFile(str(path))
    assert str(path) in str(refusal.value)


def test_a_sharded_checkpoint_reads_like_a_single_file():
    single, sharded = (Checkpoint(str(make_checkpoint("dense", shards=n))) for n in (1, 3))
    assert len(single.files) == 1
    assert len(sharded.files) >= 3
    assert single.names() == sharded.names()
    for name in single.names():
        assert single.shape(name) == sharded.shape(name)
        np.testing.assert_array_equal(single.read(name), sharded.read(name))


def test_the_fingerprint_knows_the_weights_and_not_the_shards(tmp_path):
    single, sharded = (Checkpoint(str(make_checkpoint("dense", shards=n))) for n in (1, 3))
    assert single.fingerprint == sharded.fingerprint
    changed = shutil.copytree(single.folder, tmp_path / "changed")
    file = TensorFile(str(changed / "model.safetensors"))
    info = file.tensors["model.layers.3.mlp.up_proj.weight"]
    with open(changed / "model.safetensors", "r+b") as out:
        out.seek(info.start)
        out.write(np.full(info.shape, 0.5, np.float32).tobytes())
    assert Checkpoint(str(changed)).fingerprint != single.fingerprint


def test_a_checkpoint_behind_fsspec_reads_like_a_local_one():
    folder = make_checkpoint("dense", shards=3)
    fs = fsspec.filesystem("memory")
    for file in folder.iterdir():
        fs.pipe_file(f"/bucket/base/{file.name}", file.read_bytes())
    local, remote = Checkpoint(str(folder)), Checkpoint("memory://bucket/base/")
    assert remote.fingerprint == local.fingerprint
    name = "model.layers.5.self_attn.o_proj.weight"
    np.testing.assert_array_equal(remote.read(name), local.read(name))
    fs.rm("/bucket", recursive=True)


@pytest.fixture
def sharded(tmp_path):
    return shutil.copytree(make_checkpoint("dense", shards=3), tmp_path / "base")


def test_a_missing_shard_is_named_with_a_tensor_of_it(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard}: missing; \S+ places \d+ tensors there, model\.layers\.\S+ among"):
        Checkpoint(str(sharded))


def test_a_tensor_that_only_the_index_knows_is_named(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.safetensors: has no tensor model\.extra"):
        Checkpoint(str(sharded))


def test_a_tensor_that_two_shards_hold_is_named(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    name, copy = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: copy}, second)
    with pytest.raises(UserError, match=rf"{second}: holds {name}, which \S+ places in {first.name}"):
        Checkpoint(str(sharded))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such folder, or an empty one"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "a PEFT adapter, not a model"),
        ({"pytorch_model-00001-of-00002.bin": ""}, "pickled PyTorch weights"),
        ({"gemma-4-Q4_K_M.gguf": ""}, "GGUF weights"),
        ({"refs": "", "snapshots": ""}, r"Hugging Face cache; give the one below it, snapshots/<revision>"),
        ({"model-00001-of-00002.safetensors": ""}, "model.safetensors or its index; copy those too"),
        ({"README.md": ""}, "found README.md"),
        ({"model.safetensors.index.json": "{}"}, "has no weight_map"),
        ({"model.safetensors.index.json": "{"}, "not valid JSON"),
    ],
)
def test_folders_without_a_checkpoint_say_what_they_hold(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as refusal:
        Checkpoint(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)
