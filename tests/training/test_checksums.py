"""A damaged checkpoint never comes into use: the one before does, and says so."""

import hashlib
import json
import logging
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

from gemma4_tpu.errors import UserError
from gemma4_tpu.training import checksums
from gemma4_tpu.training.resume import newest_verified, refuse_differences
from gemma4_tpu.training.saved import open_saved
from gemma4_tpu.training.setup import init_state
from tests.step.test_train_step import make
from tests.training.test_checkpoint import POSITION, open_folder, save_several

METADATA = "_CHECKPOINT_METADATA"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A `checkpoints` folder with three of them."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_several(folder, {2: 0.5, 4: 0.25, 6: 0.125})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 16
    path.write_bytes(data)


def test_whole_checkpoints_verify(folder):
    assert [checksums.problem(str(folder / update)) for update in ("2", "4", "6")] == [None] * 3
    assert newest_verified(str(folder)) == 6


def damages():
    yield "a flipped bit", flip
    yield "a truncated file", lambda path: path.write_bytes(path.read_bytes()[:-1])
    yield "an empty file", lambda path: path.write_bytes(b"")
    yield "a missing file", lambda path: path.unlink()


@pytest.mark.parametrize("damage", [pytest.param(d, id=name) for name, d in damages()])
def test_any_damage_to_any_file_falls_back_to_the_one_before(saved, damage, tmp_path, caplog):
    for number, path in enumerate(files(saved / "6")):
        if path.parent.name == "6" and path.name == "commit_success.txt" and damage is not list(damages())[3][1]:
            continue  # only whether it is there counts
        if path.name == METADATA:
            continue  # nothing is restored from it: see below
        folder = shutil.copytree(saved, tmp_path / str(number))
        damage(folder / "6" / path.relative_to(saved / "6"))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert newest_verified(str(folder)) == 4, path
        assert "falling back to the checkpoint at update 4" in caplog.text
        assert not (folder / "6").exists()
        shutil.rmtree(folder)


def test_a_save_is_sound_while_orbax_still_writes_its_metadata(tmp_path, monkeypatch):
    """Orbax writes it in another thread: here that has half of it on disk for as long as the checksums are taken."""
    halfway, noted = threading.Event(), threading.Event()
    store, note = orbax_metadata._MetadataStoreImpl, checksums.write
    finish = store.write

    def write_metadata(self, file_path, metadata):
        if metadata["item_handlers"] and not halfway.is_set():  # the second of three times
            text = json.dumps(metadata)
            Path(file_path).write_text(text[: len(text) // 2])
            halfway.set()
            assert noted.wait(60)
        finish(self, file_path, metadata)

    def note_meanwhile(folder):
        assert halfway.wait(60)
        note(folder)
        noted.set()

    monkeypatch.setattr(store, "write", write_metadata)
    monkeypatch.setattr(checksums, "write", note_meanwhile)
    save_several(tmp_path / "checkpoints", {2: 0.5})
    assert noted.is_set() and json.loads((tmp_path / "checkpoints/2" / METADATA).read_text())["commit_timestamp_nsecs"]
    assert newest_verified(str(tmp_path / "checkpoints")) == 2


def test_a_checksum_of_metadata_that_was_taken_too_early_does_not_count(folder):
    """As earlier versions noted it; also where the metadata is not readable at all."""
    noted = json.loads((folder / "6/checksums.json").read_text())
    noted["sha256"][METADATA] = hashlib.sha256(b'{"item_hand').hexdigest()
    (folder / "6/checksums.json").write_text(json.dumps(noted))
    assert newest_verified(str(folder)) == 6
    assert open_saved(folder.parent, "latest").update == 6


@pytest.mark.parametrize("damage", [pytest.param(d, id=name) for name, d in damages()])
def test_nothing_is_restored_from_orbaxs_metadata(folder, damage):
    step, _, trained = make()
    like = init_state(step, trained, jax.random.key(0), step.model.mesh)
    whole = open_folder(folder, step, keep=3).restore(6, like)[0]
    damage(folder / "6" / METADATA)
    assert newest_verified(str(folder)) == 6
    checkpoints = open_folder(folder, step, keep=3)
    state, position = checkpoints.restore(6, like)
    checkpoints.close()
    assert checkpoints.updates == [2, 4, 6] and position == POSITION
    for mine, theirs in zip(jax.tree.leaves(state.trained), jax.tree.leaves(whole.trained), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_damaged_one_is_kept_aside_and_the_update_can_be_saved_again(folder, caplog):
    for update in ("6", "4"):
        flip(max(files(folder / update), key=lambda path: path.stat().st_size))
    assert newest_verified(str(folder)) == 2
    assert "update 6 is damaged" in caplog.text and "differs from what was saved" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4.damaged", "6.damaged"]
    step, _, trained = make()
    state = init_state(step, trained, jax.random.key(0), step.model.mesh)
    checkpoints = open_folder(folder, step, keep=3)
    checkpoints.save(state._replace(update=state.update * 0 + 4), POSITION, 0.5)
    checkpoints.close()
    assert newest_verified(str(folder)) == 4


def test_none_verifies_is_one_message_and_touches_nothing(folder):
    for update in ("2", "4", "6"):
        flip(folder / update / "checksums.json", at=0.0)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=r"(?s)no checkpoint verifies.*update 6: .*update 2: .*another run_dir"):
        newest_verified(str(folder))
    assert sorted(folder.rglob("*")) == before


def test_an_unfinished_first_save_is_no_checkpoint(folder):
    for update in ("2", "4"):
        shutil.rmtree(folder / update)
    (folder / "6" / "commit_success.txt").unlink()
    assert newest_verified(str(folder)) is None
    assert newest_verified(str(folder / "nowhere")) is None


def test_other_data_is_refused_with_the_difference_unless_named(caplog):
    began, now = {"base": "aa", "rows": "bb", "seed": 0}, {"base": "aa", "rows": "cc", "seed": 0}
    refuse_differences(began, began, [], "here")
    with pytest.raises(UserError, match=r"(?s)rows: cc \(the run has bb\).*checkpoint.resume_allow=\[base,rows\]"):
        refuse_differences(began, now, ["base"], "here")
    refuse_differences(began, now, ["rows"], "here")
    assert "rows: cc" in caplog.text
