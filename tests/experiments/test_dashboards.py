"""W&B dashboards as code: they build offline, and show nothing that runs do not record."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from gemma4_tpu.config.keys import leaf_keys
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.tracking import metrics
from gemma4_tpu.tracking.result import Result

SCRIPT = Path(__file__).parents[2] / "experiments" / "dashboards" / "sweep.py"


def accessors(value):
    """Every `config:…` and `summary:…` that a definition names."""
    if isinstance(value, dict):
        return {name for item in value.values() for name in accessors(item)} | accessors(list(map(str, value)))
    if isinstance(value, list):
        return {name for item in value for name in accessors(item)}
    return {value} if isinstance(value, str) and re.match("(config|summary):", value) else set()


def test_the_workspace_of_a_sweep_builds_offline_and_shows_what_is_recorded(tmp_path):
    out = tmp_path / "workspace.json"
    command = [sys.executable, str(SCRIPT), "--group", "ranks", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    definition = json.loads(out.read_text())["spec"]["section"]
    panels = [panel for section in definition["panelBankConfig"]["sections"] for panel in section["panels"]]
    (runs,) = definition["runSets"]
    assert [f["value"] for f in runs["filters"]["filters"]] == ["ranks"]

    curves = {key for panel in panels for key in panel["config"].get("metrics") or [] if isinstance(key, str)}
    assert {
        "loss",
        "heldout_loss",
        "learning_rate",
        "grad_norm",
        "real_tokens_per_second",
        "mfu",
        "hbm_bytes",
        "usd",
    } <= curves
    assert curves <= set(re.findall(r"`(\w+)`", metrics.__doc__))
    named = accessors(definition)
    results = {field.name for field in dataclasses.fields(Result)}
    keys = {key.replace(".", ".value.", 1) for key in leaf_keys(TrainRoot)}
    assert {name.removeprefix("summary:") for name in named if name.startswith("summary:")} <= results
    assert {name.removeprefix("config:") for name in named if name.startswith("config:")} <= keys
    assert {"config:lora.value.rank", "summary:heldout_loss_best"} <= named


def test_without_a_team_it_asks_for_one():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "--entity: which user or team at W&B?" in done.stderr
