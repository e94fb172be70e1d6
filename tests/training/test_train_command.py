"""`python -m gemma4_tpu.train` as a user meets it: variants that run, and refusals."""

import json

import pytest
import yaml

from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.result import Result

QUICK = [
    "model.path=random:0", "lora.rank=4", "data.sequence_length=256", "data.max_rows=100",
    "data.heldout=[]", "data.heldout_fraction=0.1",  # ten rows instead of 200: most of the time would be theirs
    "trainer.global_batch_sequences=4", "trainer.max_updates=2", "trainer.eval_every=0", "trainer.remat=none",
    "optimizer.warmup_updates=0",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_leaves_its_whole_record(train, tmp_path):
    done = train(*QUICK, "tracker=tensorboard", cwd=tmp_path)
    (run,) = (tmp_path / "outputs" / "train").iterdir()
    assert "Held-out loss" in done.stdout and run.name in done.stdout
    assert max(map(len, (done.stdout + done.stderr).splitlines())) <= 200
    assert max(map(len, done.stdout.replace(str(run), run.name).splitlines())) <= 80
    told = done.stderr.splitlines()
    assert len(told) < 30 and "warn" not in done.stderr.lower()  # libraries have no say on the console
    assert "\x1b" not in done.stdout + done.stderr  # colours are for terminals
    log = (run / "log.txt").read_text()
    assert [line for line in told if line.partition(" ")[2] not in log] == []

    assert yaml.safe_load((run / "config.yaml").read_text())["lora"]["rank"] == 4
    assert "lora.rank=4" in yaml.safe_load((run / "overrides.yaml").read_text())
    provenance = json.loads((run / "provenance.json").read_text())
    assert {"base", "train_data"} & provenance["fingerprints"].keys() and provenance["packages"]["jax"]
    assert json.loads((run / "data.json").read_text())["train"]
    assert (run / "plots" / "loss.png").stat().st_size > 10_000
    assert "compiled train" in log
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.isdecimal()) == ["2"]
    assert list((run / "tensorboard").iterdir())

    metrics = read_metrics(run / "metrics.jsonl")
    assert [row["update"] for row in metrics] == [0, 1, 2, 2]
    trained = [row for row in metrics if "loss" in row]
    for key in ("learning_rate", "grad_norm", "real_tokens", "target_tokens", "real_tokens_per_second", "fill",
                "target_tokens_per_second", "update_seconds", "seconds"):  # fmt: skip
        assert trained[0][key] >= 0, key

    result = Result.read(run / "result.json")
    assert (result.status, result.updates, result.adapted_modules) == ("finished", 2, 36)
    assert result.real_tokens == sum(row["real_tokens"] for row in trained)
    assert result.heldout_loss_first == metrics[0]["heldout_loss"]
    assert result.heldout_loss_last == metrics[-1]["heldout_loss"] < result.heldout_loss_first
    assert result.lora_parameters == 55_936 and 0.5 < result.fill <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        ["lora=qlora_nf4"],
        ["lora=qlora_int8", "data.packing=buckets", "data.buckets=[128]"],
        ["lora=none", "data.packing=false", "optimizer.learning_rate=1e-4"],
        ["model=tiny_moe", "lora.rslora=true", "trainer.remat=products"],
        ["model=tiny_e2b", "lora.targets=[attention]", "trainer.microbatches=2"],
        ["trainer.compute_dtype=bfloat16", "trainer.max_updates=null", "trainer.epochs=0.2",
         "trainer.global_batch_sequences=null", "trainer.global_batch_tokens=1024", "optimizer.schedule=linear"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_variants_train(shallow, tmp_path, variant):
    # lora=… and model=… replace whole groups, so they stand before the values of QUICK that refine them
    groups = [w for w in variant if w.partition("=")[0] in ("lora", "model")]
    shallow(*groups, *QUICK, *[w for w in variant if w not in groups], f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    result = Result.read(tmp_path / "run" / "result.json")
    assert result.status == "finished" and result.updates >= 2
    assert result.heldout_loss_last < result.heldout_loss_first


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_names_the_rows(shallow, tmp_path):
    run = tmp_path / "run"
    wild = [
        "optimizer.learning_rate=1e30",
        "optimizer.max_grad_norm=null",
        "trainer.max_updates=6",
        "checkpoint.every=1",
    ]
    refused = shallow(*QUICK, *wild, f"run_dir={run}", cwd=tmp_path, exit_code=2)
    assert "embedded:verilog_smoke/train.jsonl.gz:" in refused.stderr
    assert "last good checkpoint is at update" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "used the rows" in (run / "log.txt").read_text()
    result = Result.read(run / "result.json")
    assert result.status == "failed" and "update" in result.error
    good = [row["update"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    saved = [int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal()]
    assert saved and set(saved) <= set(good)


@pytest.mark.slow
def test_a_slice_that_is_not_there_is_refused_by_name(train, tmp_path):
    refused = train(*QUICK, "hardware=v5p8", "mesh=fsdp", cwd=tmp_path, exit_code=2)
    assert "hardware=v5p8" in refused.stderr and "cpu" in refused.stderr and "hardware=local" in refused.stderr
    assert "Traceback" not in refused.stderr
