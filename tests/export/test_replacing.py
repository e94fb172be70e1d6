"""What an export replaces: an older export where that was asked for, and nothing else."""

import logging
import shutil

import pytest

from gemma4_tpu.storage import filesystem
from tests.export.conftest import tree
from tests.export.runs import make_run


@pytest.fixture
def run_on_copy(run_of, tmp_path):
    """A run on its own copy of a sharded base: (run folder, base folder)."""

    def make():
        _, base = run_of(shards=3, folder="other")
        shutil.rmtree(tmp_path / "other")
        shutil.copytree(base, tmp_path / "base")
        return make_run(tmp_path / "run", tmp_path / "base", name="test_dense"), tmp_path / "base"

    return make


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_model_and_what_the_export_reads_is_never_replaced(overwrite, run_on_copy, refused, tmp_path):
    run, base = run_on_copy()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target, told in {
        base: f"contains {base}, from which this export is made; give another target",
        run: f"contains {run}, from which this export is made",
        tmp_path: "from which this export is made",
        tmp_path / "out" / ".." / base.name: f"target={base}: contains",
        run / "checkpoints": "neither a model nor an adapter (contains 3)",
        tmp_path / "notes": "neither a model nor an adapter (contains mine.txt)",
        tmp_path / "file": "a file, not a folder",
    }.items():
        before = tree(tmp_path)
        assert told in refused(f"run={run}", f"target={target}", f"overwrite={overwrite}", "verify=false")
        assert tree(tmp_path) == before


def test_a_link_is_followed_and_an_empty_folder_replaced(run_of, merge, tmp_path):
    run, _ = run_of()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for checkpoint in ("first", "again"):  # the second time over a model
        merge(run, "verify=false", f"target={tmp_path}/link", "overwrite=true")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").is_file(), checkpoint
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_copied_file_that_changed_is_no_longer_this_export(run_on_copy, refused, merge):
    run, base = run_on_copy()
    (base / "chat_template.jinja").write_text("old")
    merge(run, "verify=false")
    merge(run, "verify=false")
    (base / "chat_template.jinja").write_text("new")
    assert "exists; give overwrite=true" in refused(f"run={run}", "verify=false")
    merge(run, "verify=false", "overwrite=true")
    assert (run / "merged" / "chat_template.jinja").read_text() == "new"


def test_a_merge_on_a_merged_base_is_recognised_too(run_on_copy, merge, caplog):
    run, _ = run_on_copy()
    merge(run, "verify=false")
    later = make_run(run.parent / "later", run / "merged", name="test_dense", seed=9)
    with caplog.at_level(logging.INFO):
        merge(later, "verify=false")
        merge(later, "verify=false")
    assert "already contains this export" in caplog.text and "its bytes are not" not in caplog.text


def test_a_folder_in_a_bucket_that_is_no_model_keeps_its_objects(run_of, refused, merge, bucket):
    run, _ = run_of()
    fs, root = filesystem(bucket)
    fs.pipe_file(f"{root}/rows/train.jsonl", b"mine")
    for words in ([], ["overwrite=true"]):
        told = refused(f"run={run}", f"target={bucket}/rows", "verify=false", *words)
        assert "neither a model nor an adapter (contains train.jsonl)" in told
    assert fs.cat_file(f"{root}/rows/train.jsonl") == b"mine"
    merge(run, "verify=false", f"target={bucket}/model")
    fs.pipe_file(f"{root}/model/logs/mine.txt", b"mine")
    fs.rm_file(f"{root}/model/config.json")  # as if the upload had been cut off
    merge(run, "verify=false", f"target={bucket}/model")
    assert fs.exists(f"{root}/model/config.json") and not fs.exists(f"{root}/model/logs/mine.txt")
