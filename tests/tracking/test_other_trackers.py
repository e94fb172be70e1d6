"""MLflow and Trackio themselves: what a run tells them, read back by their own readers; a resumed run stays one."""

import json
import subprocess
import sys

import pytest

SECRET = "hf_plantedPLANTEDplantedPLANTED12345"
TOLD = """if True:
    import json, os, sys
    from gemma4_tpu.config.outputs import TrackerConfig
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.run import RunFolder
    from gemma4_tpu.tracking.trackers import make_tracker

    kind, folder, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
    config = {"name": "t", "lora": {"rank": 16, "ranks": {"layers.[0-9]+": 4}}, "model": {"path": "%SECRET%"}}
    run = RunFolder.open("unused", "t", folder, "auto", config=config)
    setup_logging(run.log_path)
    settings = TrackerConfig(kind=kind, project="p", group="g", tags=["x", "%SECRET%"])
    tracker = make_tracker(settings, run, config, name="lora.rank=16 %SECRET%")
    assert kind != "mlflow" or os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    for update in range(first, first + 2):
        tracker.log({"loss": 1 / (update + 1), "grad_norm": float("nan"), "note": "text"}, update)
    tracker.table("samples", ["prompt", "answer"], [["p", "%SECRET%"], ["q", None]], first + 1)
    tracker.artifact("checkpoint", f"gs://bucket/{first}", ["best"], {"update": first})
    tracker.summary({"status": "finished", "heldout_loss_last": 0.5, "error": None})
    tracker.close("finished" if first else "failed")
""".replace("%SECRET%", SECRET)

READ = {
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
(experiment,) = [each for each in client.search_experiments() if each.name == "p"]
(run,) = client.search_runs([experiment.experiment_id])
history = client.get_metric_history(run.info.run_id, "loss")
table = json.load(open(client.download_artifacts(run.info.run_id, "samples.json", folder)))
told = {"losses": {each.step: each.value for each in history}, "samples": [table["columns"], table["data"]],
        "name": run.info.run_name, "rank": run.data.params["lora.rank"], "patterns": run.data.params["lora.ranks"],
        "status": run.info.status, "tags": run.data.tags, "last": run.data.metrics["result/heldout_loss_last"]}
""",
    "trackio": """
import os
os.environ["TRACKIO_DIR"] = f"{folder}/trackio"
import trackio
(run,) = trackio.Api().runs("p")
rows = trackio.SQLiteStorage.get_logs("p", run.name)
tables = {key: row[key]["_value"] for row in rows for key in row if isinstance(row[key], dict)}
told = {"losses": {row["step"]: row["loss"] for row in rows if "loss" in row}, "name": run.name, "config": run.config,
        "tables": tables}
""",
}


def told(python, kind, tmp_path):
    """What the library's own reader finds after a run, that was resumed once."""
    for first in ("0", "2"):
        done = python(TOLD, kind, str(tmp_path), first, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr  # where to look
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in content and SECRET not in done.stderr
    code = f"import json\nfolder = {str(tmp_path)!r}\n{READ[kind]}\nprint(json.dumps(told))"
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert read.returncode == 0, read.stderr
    return json.loads(read.stdout.splitlines()[-1])


@pytest.mark.slow
def test_mlflow_reads_back_what_a_resumed_run_told_it(python, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'gemma4-tpu[mlflow]'")
    found = told(python, "mlflow", tmp_path)
    assert found["losses"] == {"0": 1.0, "1": 0.5, "2": 1 / 3, "3": 0.25}
    columns, rows = found["samples"]
    assert columns == ["update", "prompt", "answer"]
    assert rows == [[1, "p", "***"], [1, "q", None], [3, "p", "***"], [3, "q", None]]
    assert (found["name"], found["rank"], found["status"], found["last"]) == (
        "lora.rank=16 ***", "16", "FINISHED", 0.5
    )  # fmt: skip
    assert found["patterns"] == "{'layers.[0-9]+': 4}"
    wanted = {"group": "g", "tags": "x, ***", "checkpoint/best": "gs://bucket/2", "result/status": "finished"}
    assert wanted.items() <= found["tags"].items()


@pytest.mark.slow
def test_trackio_reads_back_what_a_resumed_run_told_it(python, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed: pip install 'gemma4-tpu[trackio]'")
    found = told(python, "trackio", tmp_path)
    assert found["losses"] == {"0": 1.0, "1": 0.5, "2": 1 / 3, "3": 0.25}
    identity = json.loads((tmp_path / "tracker.json").read_text())
    assert found["name"] == f"lora.rank=16 *** {identity['id']}"
    assert found["config"]["lora"]["rank"] == 16 and found["config"]["_Group"] == "g"
    tables = found["tables"]
    assert tables["samples"] == [{"prompt": "p", "answer": "***"}, {"prompt": "q", "answer": None}]
    assert tables["artifacts"][-1] == {"kind": "checkpoint", "place": "gs://bucket/2", "aliases": "best"}
    assert {"key": "heldout_loss_last", "value": 0.5} in tables["result"]
