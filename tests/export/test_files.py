"""What lies in the published folder: the base's files byte for byte, its layout, its tokenizer; several ways to ask."""

import json
import re
import shutil

import numpy as np
import pytest

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.export.place import JOURNAL
from gemma4_tpu.hf_config import with_both_key_sets
from gemma4_tpu.merge import main
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.storage import filesystem
from tests.export.conftest import tree
from tests.models.checkpoints import make_checkpoint

EXTRAS = {
    "tokenizer.json": "{}", "tokenizer_config.json": "{ }", "chat_template.jinja": "{{ messages }}\n",
    "generation_config.json": '{"eos_token_id": [1, 106, 50]}', "processor_config.json": "{}",
}  # fmt: skip


@pytest.fixture
def full_base(tmp_path):
    """A multimodal, sharded bfloat16 base with a tokenizer, and things beside it that are none of the model's."""
    folder = tmp_path / "base"
    shutil.copytree(make_checkpoint("dense", prefix="multimodal", shards=4, dtype="bfloat16"), folder)
    for name, text in EXTRAS.items():
        (folder / name).write_text(text)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights, pickled")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    (folder / ".cache").mkdir()
    (folder / "original").mkdir()
    return folder


@pytest.fixture
def run_on(full_base, run_of, tmp_path):
    def make(**options):
        run, _ = run_of(prefix="multimodal", dtype="bfloat16", **options)
        config = (run / "config.yaml").read_text()
        old = next(line.split("path: ")[1] for line in config.splitlines() if line.strip().startswith("path:"))
        (run / "config.yaml").write_text(config.replace(old, str(full_base)))
        return run

    return make


def test_everything_but_the_changed_weights_is_the_bases_byte_for_byte(run_on, full_base, merge):
    run = run_on(lora=LoraConfig(rank=4, targets=["mlp"]))
    merge(run, "verify=false")
    before, after = tree(full_base), tree(run / "merged")
    assert json.loads(after.pop(JOURNAL))["files"].keys() == set(after)
    assert set(after) == set(before) - {"pytorch_model.bin", "consolidated.safetensors"}
    assert json.loads(after.pop("config.json")) == with_both_key_sets(json.loads(before.pop("config.json")))
    shards = [name for name in after if name.endswith(".safetensors")]
    assert len(shards) >= 4
    assert [name for name in after if after[name] != before[name]] == [
        name
        for name in shards
        if any(
            "language_model.layers" in tensor and ".mlp." in tensor
            for tensor in Checkpoint(str(full_base)).files[name].tensors
        )
    ]
    base, merged = Checkpoint(str(full_base)), Checkpoint(str(run / "merged"))
    for name, file in base.files.items():
        assert before[name][: file.data_start] == after[name][: file.data_start], "the header changed"
    for name in base.names():
        changed = not np.array_equal(base.read(name).view(np.uint8), merged.read(name).view(np.uint8))
        assert changed == ("language_model.layers" in name and ".mlp." in name), name
    assert not list(run.glob(".*partial*"))


def test_the_record_tells_what_was_added_where(run_on, merge):
    run = run_on()
    merge(run, "verify=stream")
    (record,) = (run / "merges").iterdir()
    rows = json.loads((record / "deltas.json").read_text())["weights"]
    assert len(rows) == 82 and all(row["delta_norm"] > 0 and row["changed_fraction"] > 0.5 for row in rows)
    by_name = {row["name"]: row for row in rows}
    name = "model.language_model.layers.4.mlp.up_proj.weight"
    checkpoints = [Checkpoint(str(folder)) for folder in (run.parent / "base", run / "merged")]
    base, merged = (checkpoint.read(name).astype(np.float64) for checkpoint in checkpoints)
    # the difference of the files holds the rounding too: under 2**-9 of the weight, about a hundredth of the delta
    assert by_name[name]["delta_norm"] == pytest.approx(np.linalg.norm(merged - base), rel=0.05)
    assert by_name[name]["base_norm"] == pytest.approx(np.linalg.norm(base), rel=1e-4)
    assert (record / "plots" / "deltas.png").stat().st_size > 10_000
    assert re.search(r"^\| q_proj \| +12 \|", (record / "deltas.md").read_text(), re.MULTILINE)
    result = json.loads((record / "result.json").read_text())
    assert (result["status"], result["update"], result["targets"]) == ("finished", 3, {"merged": str(run / "merged")})
    assert json.loads((record / "provenance.json").read_text())["fingerprints"].keys() == {"base", "checkpoint"}


def test_a_tokenizer_from_elsewhere_takes_the_place_of_the_bases(run_on, full_base, merge, tmp_path):
    run = run_on()
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"another": 1}')
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("tokenizer: null", f"tokenizer: {other}"))
    merge(run, "verify=false")
    assert (run / "merged" / "tokenizer.json").read_text() == '{"another": 1}'
    assert not (run / "merged" / "chat_template.jinja").exists()
    assert (run / "merged" / "generation_config.json").read_text() == EXTRAS["generation_config.json"]


def test_latest_best_and_numbered_checkpoints(run_of, merge):
    run, _ = run_of(updates=(2, 5, 9), best=5)
    for which in ("latest", "best", "2", "9"):
        merge(run, f"checkpoint={which}", f"target={run}/{which}", "verify=false", f"run_dir={run}/record-{which}")
    weights = {which: (run / which / "model.safetensors").read_bytes() for which in ("latest", "best", "2", "9")}
    assert weights["latest"] == weights["9"]
    assert len(set(weights.values())) == 3
    assert json.loads((run / "record-best" / "result.json").read_text())["update"] == 5


def test_every_run_of_a_sweep(run_of, merge, tmp_path):
    for job in ("0", "1", "10"):
        run_of(folder=f"sweep/{job}", seed=int(job))
    (tmp_path / "sweep" / "multirun.yaml").touch()
    merge(tmp_path / "sweep", "verify=false", "export=both", f"target={tmp_path}/models")
    assert sorted(p.relative_to(tmp_path / "models").as_posix() for p in (tmp_path / "models").glob("*/*")) == [
        f"{job}/{kind}" for job in ("0", "1", "10") for kind in ("adapter", "merged")
    ]
    assert len({(tmp_path / "models" / job / "merged/model.safetensors").read_bytes() for job in ("0", "1", "10")}) == 3


def test_remote_base_and_remote_target(run_on, full_base, merge, bucket):
    """Google Cloud Storage has no rename, no append, and no seek in what is written."""
    run = run_on()
    fs, root = filesystem(bucket)
    fs.put(str(full_base), f"{root}/base", recursive=True)
    merge(run, "verify=stream", f"run_dir={run}/one")
    words = (f"export.base={bucket}/base", f"target={bucket}/out")
    merge(run, *words, "verify=stream", f"run_dir={run}/two")
    local = tree(run / "merged")
    local[JOURNAL] = fs.cat_file(f"{root}/out/{JOURNAL}")  # notes other checksums
    assert {name: fs.cat_file(f"{root}/out/{name}") for name in local} == local
    merge(run, *words, "verify=false", f"run_dir={run}/again")  # there already: nothing to do
    assert sorted(p.rsplit("/", 1)[1] for p in fs.ls(f"{root}/out", detail=False)) == sorted(local)
    assert not [p for p in fs.find(root) if "partial" in p]
    fs.pipe_file(f"{root}/out/stale.safetensors", b"")
    assert main([f"run={run}", *words]) == 2
    merge(run, *words, "overwrite=true", "verify=false", f"run_dir={run}/three")
    assert not fs.exists(f"{root}/out/stale.safetensors")


def test_a_run_on_a_bucket_is_merged_beside_its_checkpoints(run_on, merge, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its local part is kept in the working folder
    run = run_on()
    merge(run, "verify=false", f"run_dir={tmp_path}/one", f"target={tmp_path}/here")
    fs, root = filesystem(bucket)
    fs.put(str(run), f"{root}/run", recursive=True)
    merge(f"{bucket}/run", "verify=false", f"run_dir={tmp_path}/two")
    for shard in (tmp_path / "here").glob("*.safetensors"):
        assert fs.cat_file(f"{root}/run/merged/{shard.name}") == shard.read_bytes()
