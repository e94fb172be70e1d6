"""Bad input: one message that says what to do, and nothing written; a merge that went wrong is not published."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models.tensorfile import TensorFile
from tests.export.conftest import tree
from tests.models.checkpoints import make_checkpoint


@pytest.fixture
def own_base(run_of, tmp_path):
    """A run on a copy of a sharded base, to damage."""

    def make(**options):
        run, base = run_of(shards=3, **options)
        copy = tmp_path / "base"
        shutil.copytree(base, copy)
        return run, copy

    return make


@pytest.fixture
def refused_unwritten(refused, tmp_path):
    """The message of a refusal that changed no file."""

    def refuse(*words):
        before = tree(tmp_path)
        message = refused(*words)
        assert tree(tmp_path) == before
        assert message.startswith("error: ") and "Traceback" not in message
        return message

    return refuse


def test_another_base(run_of, refused_unwritten, tmp_path):
    run, _ = run_of()
    other = make_checkpoint("dense", seed=1)
    message = refused_unwritten(f"run={run}", f"export.base={other}")
    assert f"{other}: not the base that {run} was trained on" in message
    assert "give export.base=" in message


def test_another_architecture_and_no_base_at_all(run_of, refused_unwritten, tmp_path):
    run, _ = run_of()
    message = refused_unwritten(f"run={run}", f"export.base={make_checkpoint('e2b')}")
    assert "export.base: " in message and "not a checkpoint of test_dense" in message
    assert "no such folder" in refused_unwritten(f"run={run}", f"export.base={tmp_path}/nowhere")


def test_missing_shard(own_base, refused_unwritten):
    run, base = own_base()
    (base / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    shard = sorted(base.glob("model-00002-*"))
    for path in shard:
        path.unlink()
    message = refused_unwritten(f"run={run}", f"export.base={base}")
    assert "model-00002-of-" in message and "missing" in message


def test_truncated_shard(own_base, refused_unwritten):
    run, base = own_base()
    shard = sorted(base.glob("model-00002-*"))[0]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    message = refused_unwritten(f"run={run}", f"export.base={base}")
    assert shard.name in message and "truncated: tensor" in message and "copy it again" in message


def test_wrong_rank(run_of, refused_unwritten):
    run, _ = run_of(lora=LoraConfig(rank=4))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("rank: 4", "rank: 8"))
    message = refused_unwritten(f"run={run}")
    assert "has shape [64, 4], but config.yaml requires [64, 8] (lora.rank=8)" in message


def test_parameters_that_would_not_be_used_and_that_are_missing(run_of, refused_unwritten):
    run, _ = run_of()
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("  - mlp\n", ""))
    message = refused_unwritten(f"run={run}")
    assert "mlp.down_proj.kernel_lora_a" in message and "would not be used" in message
    run, _ = run_of(folder="other", lora=LoraConfig(rank=4, targets=["mlp"]))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  - mlp\n", "  - mlp\n  - attention\n"))
    assert "has no layers.0.attn.attn_vec_einsum.w_lora_a" in refused_unwritten(f"run={run}")


def test_no_checkpoint_and_not_that_one(run_of, refused_unwritten, tmp_path):
    run, _ = run_of(updates=(3, 6))
    message = refused_unwritten(f"run={run}", "checkpoint=4")
    assert "checkpoint=4" in message and "there are 3, 6, best and latest" in message
    assert "has no held-out loss" in refused_unwritten(f"run={run}", "checkpoint=best")
    for update in ("3", "6"):
        shutil.rmtree(run / "checkpoints" / update)
    (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    assert "has no checkpoint" in refused_unwritten(f"run={run}")


@pytest.mark.parametrize("file", ["state/_METADATA", "state/manifest.ocdbt", "state/d"])
def test_damaged_checkpoint(file, run_of, refused):
    run, _ = run_of()
    place = run / "checkpoints" / "3" / file
    for path in [place] if place.is_file() else sorted((run / "checkpoints" / "3" / "state").rglob("d/*")):
        path.write_bytes(path.read_bytes()[:20])
    message = refused(f"run={run}")
    assert "a damaged checkpoint" in message and "use another" in message
    assert not (run / "merged").exists()


def test_what_no_folder_is_right_for(refused_unwritten, tmp_path):
    assert "run is not set" in refused_unwritten()
    assert "no such folder" in refused_unwritten(f"run={tmp_path}/nowhere")
    assert "not the folder of a training run" in refused_unwritten(f"run={tmp_path}")
    assert "give a local run folder, or one on gs://" in refused_unwritten("run=s3://bucket/run")


def test_no_space(run_of, refused_unwritten, monkeypatch):
    run, _ = run_of()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refused_unwritten(f"run={run}")
    assert "GB are needed, 0.00 GB are free there" in message


def test_an_existing_target_is_replaced_only_when_told(run_of, refused_unwritten, merge):
    run, _ = run_of()
    (run / "merged").mkdir()
    (run / "merged" / "config.json").write_text("{}")
    (run / "merged" / "mine.txt").write_text("mine")
    assert "exists; give overwrite=true" in refused_unwritten(f"run={run}", "verify=false")
    merge(run, "verify=false", "overwrite=true")
    assert not (run / "merged" / "mine.txt").exists() and (run / "merged" / "config.json").is_file()
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_the_same_export_again_is_done_already_and_another_is_refused(run_of, refused, merge, caplog):
    """A merge that is killed right after its model was published is started again by whoever watches over it."""
    run, _ = run_of()
    merge(run, "verify=false", "export=both")
    before = tree(run / "merged")
    with caplog.at_level("INFO"):
        merge(run, "verify=stream", "export=both", f"run_dir={run}/again")
    assert caplog.text.count("already contains this export") == 2 and "parity" in caplog.text
    assert tree(run / "merged") == before
    assert "exists; give overwrite=true" in refused(f"run={run}", "verify=false", "export=peft", f"target={run}/merged")
    (shard,) = (run / "merged").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert "exists; give overwrite=true" in refused(f"run={run}", "verify=false")


def test_deltas_of_zero(run_of, refused):
    run, _ = run_of(size=0.0)
    assert "every delta is zero" in refused(f"run={run}")
    assert not (run / "merged").exists()


def test_deltas_that_bfloat16_rounds_away(run_of, refused):
    run, _ = run_of(dtype="bfloat16", size=1e-9)
    assert "rounding to the base's dtype removes them all; export the PEFT adapter" in refused(f"run={run}")


def test_values_that_are_not_finite(run_of, refused):
    run, _ = run_of(size=np.nan)
    assert "lora_b holds NaN or infinity" in refused(f"run={run}", "export=both")
    assert not list(run.glob(".*partial"))
    assert not (run / "merged").exists() and not (run / "adapter").exists()


@pytest.mark.parametrize("fault", ["scale", "one weight"])
def test_a_merge_that_went_wrong_is_not_published(fault, run_of, refused, monkeypatch):
    """The faults are put into the merge's own arithmetic; the comparison has to find them by itself."""
    run, _ = run_of(dtype="bfloat16")
    from gemma4_tpu.export.merge import Merger

    read = Merger._read_factors

    def wrong(self, name):
        factors = read(self, name)
        if fault == "scale" or name == "layers.7.mlp.up_proj.kernel":
            for pair in factors.values():
                pair.b *= 1.25
        return factors

    monkeypatch.setattr(Merger, "_read_factors", wrong)
    for mode in ("verify=stream", "verify=true"):
        message = refused(f"run={run}", mode)
        assert "the merged model is not the trained one" in message and "times what rounding explains" in message
    assert not (run / "merged").exists() and not list(run.glob(".*"))
    for record in (run / "merges").iterdir():
        assert json.loads((record / "parity.json").read_text())["passed"] is False
        assert json.loads((record / "result.json").read_text())["status"] == "failed"


def test_logits_of_a_damaged_copy_are_not_passed(run_of, refused, monkeypatch):
    """A weight that has no adapter comes out wrong: the adapted weights agree, the logits do not."""
    run, _ = run_of(lora=LoraConfig(rank=4, targets=["attention"]))
    from gemma4_tpu.export import job

    verify = job.verify

    def damaged(trained, merged, mode):
        file = TensorFile(f"{merged.folder}/model.safetensors")
        info = file.tensors["model.layers.2.mlp.up_proj.weight"]
        with open(file.path, "r+b") as raw:
            raw.seek(info.start)
            raw.write(bytes(info.stop - info.start))
        return verify(trained, merged, mode)

    monkeypatch.setattr(job, "verify", damaged)
    message = refused(f"run={run}")
    assert "logits are off by" in message and "is explained by rounding" in message
    assert not (run / "merged").exists()


def test_hub_needs_a_token_and_never_shows_it(run_of, refused_unwritten, refused, monkeypatch):
    run, _ = run_of()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    message = refused_unwritten(f"run={run}", "push_to_hub=me/model")
    assert "needs a token with write access, in HF_TOKEN" in message
    token = "hf_" + "secret" * 6
    monkeypatch.setenv("HF_TOKEN", token)

    uploads = []

    class Hub:
        def __init__(self, token):
            self.token = token

        def create_repo(self, name, private, exist_ok):
            assert private

        def upload_folder(self, folder_path, repo_id, commit_message):
            if "refuse" in repo_id:
                raise ValueError(f"401 for {self.token}")
            uploads.append((folder_path, repo_id, self.token))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    message = refused(f"run={run}", "push_to_hub=me/refuse", "verify=false")
    assert "401 for ***" in message and (run / "merged" / "config.json").is_file()
    from gemma4_tpu.merge import main

    assert main([f"run={run}", "push_to_hub=me/model", "verify=false", "overwrite=true"]) == 0
    assert uploads == [(str(run / "merged"), "me/model", token)]
    everything = b"".join(data for name, data in tree(run).items() if name.startswith("merges"))
    assert token.encode() not in everything


def test_peft_has_nothing_of_a_full_fine_tuning(run_of, refused_unwritten):
    run, _ = run_of(lora=LoraConfig(enabled=False))
    assert "trained every weight (lora=none); give export=merged" in refused_unwritten(f"run={run}", "export=peft")
