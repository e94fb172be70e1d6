"""What `python -m gemma4_tpu.report wandb=` says of records that W&B left in run folders."""

import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.bucket import Bucket
from gemma4_tpu.tracking.wandb_sync import show


def offline(run, name, *, synced=False):
    folder = run / "wandb" / name
    folder.mkdir(parents=True)
    file = folder / f"run-{name.rpartition('-')[2]}.wandb"
    file.write_bytes(b"record")
    if synced:
        (folder / f"{file.name}.synced").touch()
    return folder


def test_records_are_named_in_order_and_paths_quoted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "multirun" / "a sweep"
    offline(sweep / "lora.rank=4", "offline-run-20260102_000000-aaaa")
    offline(sweep / "lora.rank=8", "offline-run-20260101_000000-bbbb")
    offline(sweep / "lora.rank=16", "offline-run-20260103_000000-cccc", synced=True)
    (sweep / "lora.rank=16" / "wandb" / "offline-run-20260104_000000-dddd").mkdir()  # nothing in it
    assert show(str(sweep)) == 0
    out = capsys.readouterr().out
    assert "1 offline record uploaded before." in out and "2 offline records to upload" in out
    assert (
        "wandb sync 'multirun/a sweep/lora.rank=8/wandb/offline-run-20260101_000000-bbbb' \\\n"
        "  'multirun/a sweep/lora.rank=4/wandb/offline-run-20260102_000000-aaaa'\n"
    ) in out
    assert "resumed" not in out


def test_a_resumed_run_keeps_its_order_and_what_went_online_is_told(tmp_path, capsys):
    offline(tmp_path, "offline-run-20260102_000000-aaaa")
    offline(tmp_path, "offline-run-20260101_000000-aaaa")
    (tmp_path / "wandb" / "run-20260101_000000-aaaa").mkdir()
    assert show(str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "1 record went to W&B" in out and "Records of one run, which was resumed" in out
    assert out.index("20260101") < out.index("20260102")


def test_nothing_left_and_nothing_there(tmp_path, capsys):
    offline(tmp_path, "offline-run-20260101_000000-aaaa", synced=True)
    assert show(str(tmp_path)) == 0
    assert capsys.readouterr().out == "1 offline record uploaded before.\nNothing is left to upload.\n"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="W&B has no record of it; runs keep one with tracker=wandb"):
        show(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such folder"):
        show(str(tmp_path / "nowhere"))


def test_offline_records_reach_the_bucket_of_a_run_folder(tmp_path, bucket, capsys, monkeypatch):
    """So that they outlive the machine; W&B's own logs don't."""
    monkeypatch.chdir(tmp_path)
    run = f"{bucket}/runs/one"
    folder = offline(tmp_path / "work", "offline-run-20260101_000000-aaaa")
    (tmp_path / "work" / "config.yaml").write_text("name: t\n")
    (tmp_path / "work" / "tracker.json").write_text('{"id": "aaaa"}')
    (folder / "logs").mkdir()
    (folder / "logs" / "debug.log").touch()
    (folder.parent / "debug.log").touch()
    Bucket(run, tmp_path / "work").push()
    assert show(run) == 0  # pulled to this machine's outputs/
    (there,) = tmp_path.glob("outputs/gs/*/runs/one/wandb")
    assert [p.name for p in there.rglob("*") if p.is_file()] == ["run-aaaa.wandb"]
    assert (there.parent / "tracker.json").read_text() == '{"id": "aaaa"}'  # a resumed run finds its id
    assert f"wandb sync {(there / folder.name).relative_to(tmp_path)}\n" in capsys.readouterr().out
