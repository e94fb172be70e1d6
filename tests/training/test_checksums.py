"""A damaged checkpoint never comes into use: the one before does, and says so."""

import logging
import shutil

import jax
import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.training import checksums
from gemma4_tpu.training.job import init_state
from gemma4_tpu.training.resume import newest_verified, refuse_differences
from tests.step.test_train_step import make
from tests.training.test_checkpoint import POSITION, open_folder, save_several


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
        if path.name == "commit_success.txt" and path.stat().st_size and damage is not list(damages())[3][1]:
            continue  # only whether it is there counts
        folder = shutil.copytree(saved, tmp_path / str(number))
        damage(folder / "6" / path.relative_to(saved / "6"))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert newest_verified(str(folder)) == 4, path
        assert "falling back to the checkpoint at update 4" in caplog.text
        assert not (folder / "6").exists()
        shutil.rmtree(folder)


def test_a_damaged_one_is_kept_aside_and_the_update_can_be_saved_again(folder, caplog):
    for update in ("6", "4"):
        flip(max(files(folder / update), key=lambda path: path.stat().st_size))
    assert newest_verified(str(folder)) == 2
    assert "update 6 is damaged" in caplog.text and "holds other bytes than were saved" in caplog.text
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
    with pytest.raises(UserError, match=r"(?s)rows: cc \(the run has bb\).*checkpoint.resume_allow=\[rows\]"):
        refuse_differences(began, now, ["base"], "here")
    refuse_differences(began, now, ["rows"], "here")
    assert "rows: cc" in caplog.text
