"""Trackers, read back with their own readers; and what happens without key, network or service."""

import http.server
import json
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from gemma4_tpu.config.outputs import TrackerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.tracking.tracker import Tracker
from gemma4_tpu.tracking.trackers import make_tracker, run_name

KEY = "0123456789abcdef" * 3

WANDB = """if True:
    import logging, os, sys, time
    import wandb  # its import takes a second or two of processor time, which is not what is measured
    from gemma4_tpu.config.outputs import TrackerConfig
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.run import RunFolder
    from gemma4_tpu.tracking.trackers import make_tracker

    config = {"name": "t", "lora": {"rank": 16}}
    run = RunFolder.open("unused", "t", sys.argv[1], "auto", config=config)
    setup_logging(run.log_path)
    settings = TrackerConfig(kind="wandb", project="p", group="g", tags=["x"])
    start = time.monotonic()
    tracker = make_tracker(settings, run, config, name="my run")
    started_seconds = time.monotonic() - start
"""


def read_wandb(run_path: Path) -> list[list[dict]]:
    """The records of each W&B run file under a run folder, oldest first, by W&B's own reader."""
    runs = []
    for file in sorted(run_path.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        runs.append([json.loads(line) for line in done.stdout.splitlines()])
    return runs


def history(records: list[dict]) -> dict[int, dict]:
    """update → the metrics logged at it, without W&B's own."""
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return {row["_step"]: {k: v for k, v in row.items() if not k.startswith("_")} for row in rows}


@contextmanager
def listening(handler: type[http.server.BaseHTTPRequestHandler], done: threading.Event) -> Iterator[str]:
    """A server's address on this machine; `done` is set at its end, for requests that wait."""
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    done.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def vanishing_server():
    """As much of a W&B server as a run needs to start, until GET /vanish: then it answers nothing more.

    Yields its address and the variables of the requests that it saw, by the name of the operation.
    """
    seen: dict[str, list[dict]] = {}
    gone = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.path == "/vanish":
                gone.set()
            elif gone.is_set():
                done.wait()
            asked = json.loads(body) if body.startswith(b"{") else {}
            variables = asked.get("variables") or {}
            seen.setdefault(asked.get("query", self.path).partition("(")[0].split()[-1], []).append(variables)
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            made = {
                "id": "r",
                "name": variables.get("name"),
                "displayName": "",
                "historyLineCount": 0,
                "project": project,
            }
            data = {"upsertBucket": {"bucket": made, "inserted": True}, "viewer": {"entity": "e"}, "model": {}}
            content = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET = do_POST = do_PUT = answer

    done = threading.Event()
    with listening(Handler, done) as address:
        yield address, seen


@pytest.fixture
def black_hole():
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def hanging_server():
    """Answers HEAD at once and nothing else, ever."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            done.wait()

    done = threading.Event()
    with listening(Handler, done) as address:
        yield address


def test_none_and_other_processes_keep_nothing(run):
    before = set(run.path.iterdir())
    reader = RunFolder(run.path, write=False)
    for tracker in (
        make_tracker(TrackerConfig(), run, {}, name="t"),
        make_tracker(TrackerConfig(kind="wandb"), reader, {}, name="t"),
    ):
        tracker.log({"loss": 1.0}, 1)
        tracker.summary({"loss": 1.0})
        tracker.table("samples", ["a"], [[1]], 1)
        tracker.artifact("checkpoint", "gs://bucket/run/checkpoints/1", ["best"], {})
        tracker.close()
        assert type(tracker) is Tracker
    assert set(run.path.iterdir()) == before


def test_an_unknown_kind_is_refused(run):
    with pytest.raises(UserError, match=r"tracker\.kind=aim: unknown; give none, wandb, mlflow, trackio, tensorboard"):
        make_tracker(TrackerConfig(kind="aim"), run, {}, name="t")


def test_tensorboard_files_hold_the_metrics(run):
    tracker = make_tracker(TrackerConfig(kind="tensorboard"), run, {}, name="t")
    for update in (1, 2):
        tracker.log({"loss": 1 / update, "grad_norm": float("nan"), "note": "text"}, update)
    tracker.table("samples", ["prompt", "answer"], [["a|b", "c\nd"], ["0/0?", "NaN"]], 2)
    tracker.artifact("checkpoint", "gs://b/2", ["update-2", "best"], {"update": 2})
    tracker.close()
    (file,) = run.path.glob("tensorboard/events*")
    data, at, values, texts = file.read_bytes(), 0, {}, []
    while at < len(data):  # TFRecord: length, its checksum, the record, its checksum
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            if value.HasField("simple_value"):
                values[value.tag, event.step] = value.simple_value
            else:
                texts += value.tensor.string_val
    assert values["loss", 1] == 1.0
    assert values["loss", 2] == 0.5
    assert {tag for tag, _ in values} == {"loss", "grad_norm"}
    assert [re.sub(rb"-{3,}", b"---", text) for text in texts] == [
        b"| prompt | answer |\n|---|---|\n| a\\|b | c<br>d |\n| 0/0? | NaN |",
        b"| kind | place | aliases |\n|---|---|---|\n| checkpoint | gs://b/2 | update-2, best |",
    ]


def test_json_lines_hold_all_that_a_tracker_is_told_across_restarts(run):
    for first in (0, 2):
        tracker = make_tracker(TrackerConfig(kind="jsonl"), run, {"lora": {"rank": 4}}, name="lora.rank=4")
        tracker.log({"loss": float("nan") if first else 0.5}, first)
        tracker.close()
    tracker = make_tracker(TrackerConfig(kind="jsonl"), run, {}, name="t")
    tracker.table("samples", ["prompt", "answer"], [["p", "a"]], 2)
    tracker.artifact("checkpoint", "gs://b/2", ["best"], {"update": 2})
    tracker.summary({"heldout_loss_last": 0.25})
    tracker.close("failed")
    lines = [json.loads(line) for line in (run.path / "tracker.jsonl").read_text().splitlines()]
    assert lines[:6] == [
        line
        for update, loss in ((0, 0.5), (2, "NaN"))
        for line in (
            {"event": "start", "name": "lora.rank=4", "config": {"lora": {"rank": 4}}},
            {"event": "metrics", "update": update, "loss": loss},
            {"event": "close", "status": "finished"},
        )
    ]
    assert lines[7:] == [
        {"event": "table", "update": 2, "name": "samples", "columns": ["prompt", "answer"], "rows": [["p", "a"]]},
        {
            "event": "artifact",
            "kind": "checkpoint",
            "place": "gs://b/2",
            "aliases": ["best"],
            "metadata": {"update": 2},
        },
        {"event": "summary", "heldout_loss_last": 0.25},
        {"event": "close", "status": "failed"},
    ]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "train"),
        (
            ["run_dir=x", "tracker=wandb", "tracker.group=g", "checkpoint.every=5", "trainer.compile_cache=null"],
            "train",
        ),
        (["lora.rank=16", "run_dir='a/lora.rank=16'", "+trainer.seed=1"], "lora.rank=16 trainer.seed=1"),
        (["name=train", "mesh=tp", r"model.path=random\:0"], "train mesh=tp model.path=random:0"),
        (["data.train.0.path=" + "x" * 200], "data.train.0.path=" + "x" * 109 + "…"),
    ],
)
def test_a_run_is_named_after_what_tells_it_from_others(overrides, name):
    assert run_name("train", overrides) == name
    assert len(name) <= 128


def test_a_tracker_that_breaks_warns_once_and_the_run_goes_on(run, caplog, monkeypatch):
    tracker = make_tracker(TrackerConfig(kind="tensorboard"), run, {}, name="t")

    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("tensorboardX.SummaryWriter.add_scalar", full)
    for update in range(3):
        tracker.log({"loss": 1.0}, update)
    tracker.close()
    assert caplog.text.count("disk full") == 1


@pytest.mark.slow  # starts three processes that import wandb
def test_wandb_without_a_key_is_offline_quiet_and_continues_under_one_id(python, tmp_path):
    body = """
    first = int(sys.argv[2])
    for update in range(first, first + 2):
        tracker.log({"loss": 1 / (update + 1), "grad_norm": float("inf")}, update)
    tracker.table("samples", ["prompt"], [["p"]], first + 1)
    saved = run.path / "checkpoints" / str(first)
    (saved / "state").mkdir(parents=True)
    (saved / "state" / "weights").write_bytes(b"large")
    tracker.artifact("checkpoint", str(saved), ["best"], {"update": first})
    tracker.artifact("merged", "gs://bucket/model", [], {"update": first})  # looks for no credentials
    tracker.summary({"heldout_loss_last": 0.5})
    tracker.close()
    assert not {"jax", "tensorflow"} & set(sys.modules)
    """
    for first in ("0", "2"):
        done = python(WANDB + body, str(tmp_path), first, "--api-key=planted-secret", HF_TOKEN="planted-secret-2")
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert [line for line in done.stderr.splitlines() if "W&B is offline (no key" not in line] == []
    before, after = read_wandb(tmp_path)
    start = next(record["run"] for record in before if record["type"] == "run")
    assert (start["project"], start["run_group"], start["tags"], start["display_name"]) == ("p", "g", ["x"], "my run")
    config = start["config"]["update"]
    assert {key: value for key, value in config.items() if key != "_wandb"} == {"name": "t", "lora": {"rank": 16}}
    ids = {
        next(record["run"]["run_id"] for record in records if record["type"] == "run") for records in (before, after)
    }
    assert ids == {json.loads((tmp_path / "tracker.json").read_text())["id"]}
    assert history(before)[0] == {"loss": 1.0, "grad_norm": "Infinity"}
    artifacts = {record["artifact"]["type"]: record["artifact"] for record in before if record["type"] == "artifact"}
    checkpoint, merged = artifacts["checkpoint"], artifacts["merged"]
    assert sorted(checkpoint["aliases"]) == ["best", "latest"]
    assert [entry["ref"] for entry in checkpoint["manifest"]["contents"]] == [
        f"file://{tmp_path}/checkpoints/0/state/weights"
    ]
    assert [entry["ref"] for entry in merged["manifest"]["contents"]] == ["gs://bucket/model"]
    assert sorted({**history(before), **history(after)}) == [0, 1, 2, 3]
    assert {key.split(".")[0] for key in history(after)[3]} == {"loss", "grad_norm", "samples"}
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("files/media/table/samples_*.table.json")]
    assert [(table["columns"], table["data"]) for table in tables] == [(["prompt"], [["p"]])] * 2
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"planted-secret" not in content


REPORT = """
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    print(started_seconds)
"""


@pytest.mark.slow  # waits for time limits
def test_wandb_with_a_key_but_no_network_goes_on_offline_within_ten_seconds(
    python, tmp_path, hanging_server, black_hole
):
    for name, url in [("refuses", "http://127.0.0.1:9"), ("swallows", black_hole), ("hangs", hanging_server)]:
        done = python(WANDB + REPORT, str(tmp_path / name), WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
        assert done.returncode == 0, done.stderr
        # 7 s of them waiting; the rest is W&B's work on a busy machine. Its own limits are minutes, also at the exit,
        # which `python` would not wait for.
        assert float(done.stdout) < 40
        assert "W&B is offline" in done.stderr
        (records,) = read_wandb(tmp_path / name)
        assert history(records) == {1: {"loss": 1.0}}
        content = b"".join(path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file())
        assert KEY.encode() not in content


@pytest.mark.slow
def test_wandb_online_knows_the_run_and_a_network_that_goes_costs_seconds(python, tmp_path, vanishing_server):
    url, seen = vanishing_server
    limits = """from gemma4_tpu.tracking import wandb_tracker
    wandb_tracker.ANSWER_TIMEOUT_SECONDS = wandb_tracker.FINISH_TIMEOUT_SECONDS = 1.5
    start = time.monotonic()"""
    body = """
    import urllib.request
    tracker.log({"loss": 1.0}, 1)
    urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/vanish")
    start = time.monotonic()
    for update in range(2, 5):
        tracker.log({"loss": 1.0}, update)
        tracker.table("samples", ["prompt"], [["p"]], update)
        tracker.artifact("checkpoint", "gs://bucket/1", [], {})
    tracker.close()
    print(time.monotonic() - start)
    """
    code = WANDB.replace("start = time.monotonic()", limits) + body
    done = python(code, str(tmp_path), WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert done.returncode == 0, done.stderr
    # 1.5 s for the first table and at the end; the rest is W&B's work on a busy machine. Its own limits are minutes.
    assert 1 < float(done.stdout) < 60
    assert f"W&B: {url}/e/p/runs/" in done.stderr
    assert done.stderr.count("takes no more samples and artifacts (TimeoutError: no answer within 1.5 s)") == 1
    asked = seen["UpsertBucket"][0]
    assert (asked["groupName"], asked["displayName"], asked["tags"]) == ("g", "my run", ["x"])
    assert asked["name"] == json.loads((tmp_path / "tracker.json").read_text())["id"]
    assert json.loads(asked["config"])["lora"]["value"] == {"rank": 16}


@pytest.mark.slow
def test_wandb_takes_no_harm_from_a_bad_key_and_its_service_dying(python, tmp_path):
    body = """
    import contextlib, psutil
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with the one before
            child.kill()
            child.wait(60)
    for update in range(3):
        tracker.log({"loss": 1.0}, update)
        time.sleep(0.5)
    tracker.close()
    print("trained on")
    """
    done = python(WANDB + body, str(tmp_path), WANDB_API_KEY="tooshort")
    assert done.stdout == "trained on\n", done.stderr
    assert done.returncode == 0
    assert "API key must have 40+ characters" in done.stderr
    assert done.stderr.count("tracker wandb failed") == 1


def test_online_without_a_key_is_refused_before_anything_starts(run, monkeypatch, tmp_path):
    import wandb

    monkeypatch.setattr(wandb, "login", lambda **options: False)
    with pytest.raises(UserError, match=r"tracker\.mode=online: no key; give WANDB_API_KEY"):
        make_tracker(TrackerConfig(kind="wandb", mode="online"), run, {}, name="t")
