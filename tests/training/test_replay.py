"""Replays: what differs from a record is named and refused, losses come again bit for bit, experiments are checked."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.reporting.experiments import _compare, check_experiment
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.provenance import Provenance
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.replay import Replay, compare_losses, differing_parts

REPO = Path(__file__).parents[2]
SMOKE = REPO / "experiments" / "smoke"
PARTS = {
    "code": ("code", "sha256"),
    "packages": ("packages", "jax"),
    "tokenizer": ("fingerprints", "chat_template"),
    "base": ("fingerprints", "base"),
    "data": ("fingerprints", "heldout"),
    "hardware": ("hardware", "kind"),
}


def provenance() -> dict:
    return json.loads((SMOKE / "provenance.json").read_text())


def replay_of(folder: Path, tmp_path: Path) -> Replay:
    """A replay whose new run folder has the recorded configuration and seed 1."""
    config = RunFolder.existing(folder).read_config()
    config["trainer"]["seed"] = 1
    return Replay(str(folder), RunFolder.open("", "t", str(tmp_path / "new"), "auto", config=config))


@pytest.mark.parametrize("part", PARTS)
def test_each_part_that_differs_is_named_and_refused_unless_allowed(part, tmp_path, caplog):
    group, key = PARTS[part]
    recorded = provenance()
    now = copy.deepcopy({key: value for key, value in recorded.items() if key != "resumed"})
    now[group][key] = "another"
    parts = differing_parts(recorded, now)
    assert list(parts) == [part]
    assert parts[part] == [f"{key} {recorded[group][key][:12]} → another"]

    replay = replay_of(SMOKE, tmp_path)
    with pytest.raises(UserError) as refusal:
        replay.check(Provenance(**now), [])
    for word in (str(SMOKE), f"\n  {part}: {key} ", f"replay_allow=[{part}]"):
        assert word in str(refusal.value)
    replay.check(Provenance(**now), ["code", part])
    assert f"differs from the record: {part}: {key}" in caplog.text


def test_what_the_configuration_or_the_start_explains_is_no_difference():
    recorded = provenance()
    now = copy.deepcopy(recorded)
    now["started"], now["command"], now["host"] = "later", ["x"], "elsewhere"
    now["seeds"]["trainer"] = 9
    now["fingerprints"]["sequence_length"] = 9
    now["code"]["git_commit"] = "another"  # that changed no Python file of the package
    del recorded["hardware"]["cores"]  # by a version that did not look
    assert differing_parts(recorded, now) == {}
    recorded["fingerprints"]["tokenizer"] = recorded["fingerprints"]["examples"] = "another"
    assert list(differing_parts(recorded, now)) == ["tokenizer"]  # of which other tokens follow


def test_the_first_loss_that_differs_is_told_once_and_kept(tmp_path, caplog):
    replay = replay_of(SMOKE, tmp_path)
    rows = read_metrics(SMOKE / "metrics.jsonl")
    rows[3]["heldout_loss"] += 2**-40  # after update 2
    rows[5]["loss"] += 0.5  # at update 4
    with (tmp_path / "new" / "metrics.jsonl").open("w") as file:
        for row in rows:
            replay.watch({key: value for key, value in row.items() if key != "update"}, row["update"])
            file.write(json.dumps(row) + "\n")
    recorded = rows[3]["heldout_loss"] - 2**-40
    assert caplog.text.count(f"from here on: update 2: heldout_loss {recorded:.6f}"[:-2]) == 1
    assert caplog.text.count("from here on") == 1
    replay.finish()
    kept = json.loads((tmp_path / "new" / "replay.json").read_text())
    assert kept["config"] == {"trainer.seed": [0, 1]}
    losses = kept["losses"]
    assert (losses["recorded"], losses["compared"], losses["largest"]) == (7, 7, 0.5)
    assert (losses["first_difference"]["update"], losses["first_difference"]["key"]) == (2, "heldout_loss")


def test_runs_of_other_lengths_are_compared_as_far_as_both_go():
    rows = [{"update": update, "loss": float(update)} for update in range(4)]
    assert compare_losses(rows, rows[:2]) == {
        "recorded": 4, "compared": 2, "first_difference": None, "largest": 0.0
    }  # fmt: skip
    assert compare_losses([], rows)["largest"] is None


def test_a_run_that_never_began_has_nothing_to_repeat(tmp_path):
    shutil.copytree(SMOKE, tmp_path / "run")
    (tmp_path / "run" / "provenance.json").unlink()
    with pytest.raises(UserError, match=r"has no provenance\.json: it ended before its training began"):
        replay_of(tmp_path / "run", tmp_path)


# ── report check= ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def experiment(tmp_path):
    return shutil.copytree(SMOKE, tmp_path / "experiment")


def repeated(tmp_path, *, apart=0.0, parts=(), compared=7, **result) -> Path:
    """The run folder of a repetition that came out so."""
    folder = shutil.copytree(SMOKE, tmp_path / "repeated")
    first = {"update": 2, "key": "loss", "recorded": 0.5, "now": 0.5 + apart} if apart else None
    losses = {"recorded": 7, "compared": compared, "first_difference": first, "largest": apart}
    differences = {part: ["x 1 → 2"] for part in parts}
    (folder / "replay.json").write_text(json.dumps({"losses": losses, "differences": differences}))
    values = json.loads((folder / "result.json").read_text()) | result
    (folder / "result.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        ({}, []),
        ({"parts": ["code"]}, []),
        ({"apart": 1e-6, "parts": ["packages"]}, []),
        ({"apart": 1e-6}, ["nothing has changed since it was recorded, but its losses have"]),
        ({"apart": 1e-2, "parts": ["hardware"]}, ["losses are up to 0.01 apart; 0.0001 is allowed"]),
        ({"apart": float("nan"), "parts": ["hardware"]}, ["losses are up to nan apart"]),
        ({"compared": 6}, ["only 6 of 7 recorded losses were reproduced"]),
        ({"compared": 0}, ["only 0 of 7"]),
        ({"real_tokens": 1}, ["real_tokens: 1 (recorded: "]),
    ],
)  # fmt: skip
def test_the_verdict_on_a_repetition(outcome, told, tmp_path, capsys):
    failures = _compare(SMOKE, repeated(tmp_path, **outcome), 1e-4)
    assert len(failures) == len(told)
    for failure, start in zip(failures, told, strict=True):
        assert failure.startswith(start)
    assert all(part in capsys.readouterr().out for part in outcome.get("parts", ()))


def test_what_cannot_be_checked_is_refused(experiment):
    with pytest.raises(UserError, match="no such folder"):
        check_experiment(f"{experiment}/nowhere")
    (experiment / "check.yaml").write_text("loss_tolerance: some\n")
    with pytest.raises(UserError, match=r"check.yaml: loss_tolerance=some: give the largest accepted difference"):
        check_experiment(str(experiment))
    (experiment / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"no metrics.jsonl, so it records no run .*give one that does: experiment$"):
        check_experiment(str(experiment))


def test_what_was_recorded_on_hardware_that_is_not_here_is_refused_by_name(experiment, monkeypatch):
    recorded = provenance()
    recorded["hardware"] = {"slice": "v5p-8", "devices": 4, "kind": "TPU v5p"}
    (experiment / "provenance.json").write_text(json.dumps(recorded))
    monkeypatch.setenv("XLA_FLAGS", "")
    said = r"recorded on 4 TPU v5p \(v5p-8\); this machine has 1 cpu\. On the recorded hardware: python"
    with pytest.raises(UserError, match=said):
        check_experiment(str(experiment))


# ── whole runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """Runs `python -m gemma4_tpu.<name>` as a user would, without settings of the compiler."""
    folder = tmp_path_factory.mktemp("replay")
    dropped = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "WANDB_API_KEY", "WANDB_MODE")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {"PYTHONPATH": str(REPO), "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}

    def run(*command: str, exit_code: int = 0) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", *command]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == exit_code, f"{done.stdout}\n{done.stderr}"
        return done

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def checked(module) -> Path:
    """`report check=` of the committed experiment; the run folder of its repetition."""
    done = module("gemma4_tpu.report", f"check={SMOKE}")
    assert done.stdout.endswith("\npassed\n"), done.stdout
    assert "7 losses compared" in done.stdout
    (folder,) = (module.folder / "outputs" / "checks" / "smoke").iterdir()
    return folder


@pytest.mark.slow
def test_a_replay_has_the_same_bits_and_is_tracked(module, checked):
    new = module.folder / "again"
    words = [f"replay={checked}", f"run_dir={new}", "tracker=wandb", "tracker.group=study", "tracker.tags=[smoke]"]
    words.append("replay_allow=[code]")  # which somebody may be editing while the tests run
    done = module("gemma4_tpu.train", *words)
    assert "losses bit-identical to the recorded ones: 7 of 7" in done.stderr
    kept = json.loads((new / "replay.json").read_text())
    assert set(kept["differences"]) <= {"code"} and kept["losses"]["first_difference"] is None
    assert kept["config"]["tracker.kind"] == ["none", "wandb"]
    before, now = (read_metrics(folder / "metrics.jsonl") for folder in (checked, new))
    assert [(row.get("loss"), row.get("grad_norm")) for row in before] == [
        (row.get("loss"), row.get("grad_norm")) for row in now
    ]

    (file,) = new.glob("wandb/offline-run-*/*.wandb")
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(read, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    (start,) = (record["run"] for record in records if record["type"] == "run")
    assert (start["run_group"], start["tags"], start["job_type"]) == ("study", ["smoke"], "train")
    assert start["display_name"].startswith(f"replay={checked}"[:127])
    assert start["config"]["update"]["trainer"]["max_updates"] == 4
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    logged = {row["_step"]: {k: v for k, v in row.items() if not k.startswith("_")} for row in history}
    rows: dict[int, dict] = {}
    for row in now:
        rows.setdefault(row["update"], {}).update({key: value for key, value in row.items() if key != "update"})
    assert logged == rows  # what is in metrics.jsonl, and nothing of any library's own
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert [sorted(a["aliases"]) for a in artifacts] == [["latest", "update-2"], ["best", "latest", "update-4"]]
    for artifact in artifacts:
        assert {a["ref"].startswith(f"file://{new}/checkpoints/") for a in artifact["manifest"]["contents"]} == {True}

    shown = module("gemma4_tpu.report", f"wandb={new}").stdout
    assert f"wandb sync again/{file.parent.relative_to(new)}\n" in shown


@pytest.mark.slow
def test_a_replay_elsewhere_is_refused_and_says_why(module, checked):
    recorded = json.loads((checked / "provenance.json").read_text())
    recorded["packages"]["jax"] = "0.9.0"
    recorded["hardware"] |= {"kind": "TPU v5p", "devices": 4}
    other = module.folder / "other"
    other.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(checked / name, other)
    (other / "provenance.json").write_text(json.dumps(recorded))
    refused = module("gemma4_tpu.train", f"replay={other}", "replay_allow=[packages]", exit_code=2)
    lines = refused.stderr[refused.stderr.index("error: ") :].splitlines()
    assert lines[0] == f"error: replay={other}: differences from the recorded run:"
    parts = [line.partition(":")[0].strip() for line in lines[1:-1] if not line.startswith("  code: ")]
    assert parts == ["packages", "hardware"]
    assert "\n  packages: jax 0.9.0 → " in refused.stderr
    assert "\n  hardware: devices 4 → 1; kind TPU v5p" in refused.stderr
    assert lines[-1].endswith("packages,hardware]")
