"""Run folders: made, opened again, refused."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.differences import config_differences
from gemma4_tpu.tracking.files import jsonable, read_json, write_json
from gemma4_tpu.tracking.run import RunFolder
from tests.tracking.conftest import CONFIG


def open_again(path, resume="auto", allow=(), **changes):
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        group, name = key.split("__")
        config[group][name] = value
    return RunFolder.open("unused", "t", str(path), resume, config=config, resume_allow=allow)


def test_new_folders_are_named_by_time_and_never_shared(tmp_path):
    runs = [RunFolder.open(tmp_path / "outputs", "mine", None, "auto", config=CONFIG) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.path.parent == tmp_path / "outputs" / "mine" and run.path.is_absolute() for run in runs)


def test_a_new_folder_holds_configuration_and_overrides(run):
    assert not run.resumed
    assert run.read_config() == CONFIG
    assert yaml.safe_load(run.overrides_path.read_text()) == ["name=t"]
    assert run.plots.is_dir()
    assert Path(run.checkpoints).is_dir()


def test_the_same_configuration_resumes(run):
    assert open_again(run.path).resumed


def test_values_that_do_not_change_the_weights_may_change(run):
    again = open_again(run.path, mesh__tp=2, trainer__max_updates=200, trainer__log_every=5)
    assert again.resumed
    assert again.read_config()["trainer"]["max_updates"] == 200


def test_another_configuration_is_refused_with_every_difference(run):
    with pytest.raises(UserError) as refusal:
        open_again(run.path, lora__rank=32, trainer__seed=1, mesh__tp=2)
    message = str(refusal.value)
    assert "lora.rank: 32 (the run has 16)" in message
    assert "trainer.seed: 1 (the run has 0)" in message
    assert "mesh" not in message
    assert run.read_config() == CONFIG


def test_a_refusal_repeats_the_differences_that_were_accepted(run):
    with pytest.raises(UserError, match=r"checkpoint.resume_allow=\[lora.rank,trainer.seed\]"):
        open_again(run.path, allow=["lora.rank"], lora__rank=32, trainer__seed=1)
    assert open_again(run.path, allow=["lora.rank", "trainer.seed"], lora__rank=32, trainer__seed=1).resumed


def test_a_folder_whose_name_is_not_utf_8_is_refused_before_it_is_made(tmp_path):
    odd = tmp_path / "r\udcffn"  # as Python shows a byte that is not UTF-8
    with pytest.raises(UserError, match=r"r\\udcffn.*: not UTF-8"):
        RunFolder.open(odd, "mine", None, "auto", config=CONFIG)
    assert not odd.exists()


def test_keys_of_another_version_do_not_prevent_a_resume():
    before, now = {"a": {"x": 1, "gone": 2}}, {"a": {"x": 3, "new": 4}}
    assert list(config_differences(before, now)) == [("a.x", 1, 3)]


def test_resume_never_refuses_a_used_folder(run):
    with pytest.raises(UserError, match=r"checkpoint\.resume=never: .* another run_dir, or checkpoint\.resume=auto"):
        open_again(run.path, resume="never")


def test_resume_never_takes_an_empty_folder(tmp_path):
    assert not open_again(tmp_path, resume="never").resumed


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"not a run folder, and not empty \(it contains thesis\.tex\)"):
        open_again(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("run_dir", ["{tmp}/file", "{tmp}/file/below"])
def test_paths_that_cannot_be_a_folder_are_refused(tmp_path, run_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir="):
        open_again(run_dir.format(tmp=tmp_path))


def test_a_start_killed_before_the_configuration_was_written_counts_as_fresh(tmp_path):
    (tmp_path / ".lock").write_text("1")
    (tmp_path / ".config.yaml.1.tmp").write_text("na")
    assert not open_again(tmp_path).resumed


def test_other_processes_write_nothing_and_choose_nothing(tmp_path):
    path = tmp_path / "chosen"
    other = RunFolder.open("unused", "t", str(path), "auto", config=CONFIG, write=False)
    assert other.path == path
    assert not path.exists()
    with pytest.raises(ValueError, match="only process 0"):
        RunFolder.open(tmp_path, "t", None, "auto", config=CONFIG, write=False)


def test_two_processes_cannot_write_one_folder_until_the_first_is_gone(tmp_path):
    code = f"""if True:
        from gemma4_tpu.tracking.run import RunFolder
        run = RunFolder.open("unused", "t", {str(tmp_path)!r}, "auto", config={CONFIG!r})
        print("open", flush=True)
        import time; time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=rf"in use by a running process \(pid {first.pid}\)"):
            open_again(tmp_path)
        first.kill()
    assert open_again(tmp_path).resumed


def test_existing_names_the_key_where_there_is_no_run(tmp_path, run):
    assert RunFolder.existing(run.path).read_config() == CONFIG
    with pytest.raises(UserError, match=r"merge\.run=.*: not a run folder"):
        RunFolder.existing(tmp_path, "merge.run")


def test_json_is_strict_whole_and_reads_back(tmp_path):
    value = {"a": [1, 2.5, None, float("inf")], "b": "text", "c": float("-inf")}
    write_json(tmp_path / "x.json", value)
    assert "Infinity" in (tmp_path / "x.json").read_text()
    assert read_json(tmp_path / "x.json") == value
    with pytest.raises(TypeError, match="set"):
        jsonable({"a": {1}})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, under_way, other = (
        tmp_path / name for name in (f".a.json.{ended.pid}.tmp", ".a.json.1.tmp", f".b.json.{ended.pid}.tmp")
    )
    for file in (left, under_way, other):
        file.touch()
    write_json(tmp_path / "a.json", {})
    assert not left.exists() and under_way.exists() and other.exists()
