"""The dashboard asks for metrics that vLLM has, and the embedded server's are among them."""

import itertools
import json
import re
from pathlib import Path

import pytest

from gemma4_tpu.serving.local_metrics import Metrics

DASHBOARD = Path(__file__).parents[2] / "launch" / "grafana.json"
KINDS = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
"""Kind of a metric → what Prometheus' text format puts behind its name."""


@pytest.fixture(scope="module")
def of_vllm():
    lines = Path(__file__).with_name("vllm_0_32_metrics.txt").read_text().splitlines()[1:]
    return {name + end for name, kind in map(str.split, lines) for end in KINDS[kind]}


@pytest.fixture(scope="module")
def panels():
    return json.loads(DASHBOARD.read_text())["panels"]


def test_every_metric_is_one_of_vllms(panels, of_vllm):
    asked = {
        name for panel in panels for target in panel["targets"]
        for name in re.findall(r"vllm:\w+", target["expr"])
    }  # fmt: skip
    assert len(asked) > 10 and asked - of_vllm == set()
    for panel in panels:
        for target in panel["targets"]:
            named = re.findall(r"vllm:\w+(\{[^}]*\})?", target["expr"])
            assert set(named) == {'{job=~"$job", model_name=~"$model"}'}, panel["title"]
            assert target["expr"].count("(") == target["expr"].count(")")
            counted = re.findall(r"vllm:\w+_(?:total|bucket)", target["expr"])
            assert target["expr"].count("[$__rate_interval]") == len(counted)


def test_the_embedded_server_has_some_of_them_under_the_same_names(panels, of_vllm):
    told = set(re.findall(r"^(vllm:\w+)[{ ]", Metrics("m").text().decode(), re.MULTILINE))
    told = {name for name in told if not name.endswith("_created")}  # prometheus-client's own, as in vLLM
    assert told and told - of_vllm == set()
    shown = [panel["title"] for panel in panels if any(name in json.dumps(panel["targets"]) for name in told)]
    assert {"Requests", "Tokens per second", "Time to first token", "Time between tokens"} <= set(shown)


def test_panels_stand_side_by_side_and_say_what_they_show(panels):
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        apart = [one[at] + one[size] <= other[at] or other[at] + other[size] <= one[at] for at, size in ("xw", "yh")]
        assert any(apart)
    for panel in panels:
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
