"""Whatever a user hands in: a message of ours and an exit code, never a traceback, and no file of theirs is changed."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.base import RANDOM_TOKENIZER
from gemma4_tpu.train import load_train
from gemma4_tpu.training.resume import newest_verified
from tests.training.test_checkpoint import save_several

QUICK = settings(
    max_examples=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

KEYS = [
    "lora.rank", "lora.alpha", "lora.dropout", "lora.targets", "data.sequence_length", "data.packing", "data.buckets",
    "data.train", "data.heldout_fraction", "data.max_rows", "optimizer.learning_rate", "optimizer.b1",
    "optimizer.schedule", "trainer.max_updates", "trainer.epochs", "trainer.global_batch_sequences",
    "trainer.microbatches", "trainer.seed", "trainer.spike_factor", "trainer.stall_seconds", "trainer.compile_cache",
    "checkpoint.every", "checkpoint.keep", "checkpoint.resume", "checkpoint.resume_allow", "mesh.dp", "mesh.fsdp",
    "mesh.tp", "distributed.num_processes", "name", "run_dir", "model.path", "hardware", "nonsense", "trainer",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(["", "null", "true", "-1", "0", "1e400", "nan", "inf", "9" * 400, "[]", "{}", "[1,2", "../../x",
                     "${oc.env:HOME}", "!!python/object/apply:os.system [id]", "gs://", "s3://b/x", "~", "/dev/null"]),
    st.integers(-(10**30), 10**30).map(str), st.floats().map(str), st.text(max_size=12),
)  # fmt: skip


@QUICK
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_command_lines(words):
    try:
        root = load_train([f"{key}={value}" for key, value in words]).root
    except UserError as refusal:
        assert str(refusal).strip()  # noqa: PT017 (any of many)
    else:
        assert root.name and ".." not in root.name.split("/") and "/" not in root.name


GOOD = {"messages": [{"role": "user", "content": "an adder"}, {"role": "assistant", "content": "module a; endmodule"}]}
ODD_LINES = st.one_of(
    st.sampled_from([
        b"", b"\x00\xff\xfe", b"{", b"[]", b"null", b'{"messages": null}', b'{"messages": []}', b'{"messages": [1]}',
        b'{"messages": [{"role": "wizard", "content": "x"}]}', b'{"messages": [{"role": "user"}]}',
        b'{"messages": [{"role": "user", "content": 1e999}, {"role": "assistant", "content": 99999999999999999999}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"[" * 3000, b'{"a": ' * 2000,
        b'{"messages": [{"role": "user", "content": "<start_of_turn>"}, {"role": "assistant", "content": ""}]}',
        json.dumps(GOOD).encode()[:-7], json.dumps(GOOD).encode(), json.dumps(GOOD).encode(),
    ]),
    st.binary(max_size=40), st.text(max_size=40).map(lambda text: json.dumps({"messages": text}).encode()),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from gemma4_tpu import assets

    return load_tokenizer(assets.resolve(RANDOM_TOKENIZER))


@QUICK
@given(st.lists(ODD_LINES, max_size=6), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
def test_rows(tmp_path, tokenizer, lines, torn, dropped):
    path = tmp_path / "rows.jsonl"
    content = b"\n".join(lines) + (b"" if torn else b"\n")
    path.write_bytes(content)
    data = DataConfig(train=[DataSource(path=str(path))], heldout_fraction=0.0, max_drop_fraction=dropped)
    try:
        built = build_data(data, tokenizer)
    except UserError as refusal:
        assert str(refusal).strip()  # noqa: PT017 (any of many)
    else:
        assert len(built.train)
    assert path.read_bytes() == content


def test_places_that_hold_no_rows(tmp_path, tokenizer):
    huge, folder, empty = tmp_path / "huge.jsonl", tmp_path / "folder.jsonl", tmp_path / "empty.jsonl"
    with huge.open("wb") as file:
        file.write(b'{"messages": "' + b"a" * 100_000_000 + b'"}\n' + json.dumps(GOOD).encode() + b"\n")
    folder.mkdir(), empty.touch()
    for path, allowed in ((huge, 0.05), (folder, 0.05), (empty, 1.0), (tmp_path / "none.jsonl", 1.0)):
        data = DataConfig(train=[DataSource(path=str(path))], heldout_fraction=0.0, max_drop_fraction=allowed)
        with pytest.raises(UserError):
            build_data(data, tokenizer)
    data = DataConfig(train=[DataSource(path=str(huge))], heldout_fraction=0.0, max_drop_fraction=0.6)
    assert len(build_data(data, tokenizer).train) == 1  # the line of 100 MB is dropped and counted, not held in memory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_several(folder, {2: 1.0, 4: 1.0})
    return folder


@settings(QUICK, max_examples=25)
@given(st.data())
def test_checkpoint_folders(saved, tmp_path, data):
    """Random damage: the newest that verifies is byte for byte what was saved, or there is one message."""
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in data.draw(st.lists(st.sampled_from(files), max_size=4, unique=True)):
        damage = data.draw(st.sampled_from(["delete", "folder", "cut", "flip", "junk"]))
        content = path.read_bytes()
        path.unlink()
        match damage:
            case "folder":
                path.mkdir()
            case "cut":
                path.write_bytes(content[: len(content) // 2])
            case "flip":
                at = data.draw(st.integers(0, max(0, len(content) - 1)))
                path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] if content else b"x")
            case "junk":
                path.write_bytes(b"\x80\x04junk")
    strays = st.sampled_from(["9", "7.damaged", "x", "007", "4.orbax-checkpoint-tmp"])
    for stray in data.draw(st.lists(strays, max_size=2)):
        (folder / stray).mkdir(exist_ok=True)
    try:
        update = newest_verified(str(folder))
    except UserError as refusal:
        assert "no checkpoint verifies" in str(refusal)  # noqa: PT017
        return
    if update is not None:
        ignored = {"commit_success.txt", "_CHECKPOINT_METADATA"}  # whose times differ, or are not read
        for original in (saved / str(update)).rglob("*"):
            if original.is_file() and not (original.name in ignored and original.parent.name == str(update)):
                found = folder / original.relative_to(saved)
                assert found.read_bytes() == original.read_bytes()
