"""CONTRIBUTING's way from a command to its work: every stop is there, and an earlier one leads to it."""

import ast
import re

import pytest

from tests.house.scripts import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
WAYS = dict(re.findall(r"^`(\w+)`: [^\n]*\n((?:\n?\d+\. .*\n)+)", PAGE, re.M))
STOP = re.compile(r"^\d+\. `([\w/]+\.py): ([\w.]+)`", re.M)


def source(path: str) -> str:
    return (ROOT / "gemma4_tpu" / path).read_text("utf-8")


def defined(path: str) -> set[str]:
    """Functions and classes of a module, methods as `Class.method`."""
    nodes = [node for node in ast.parse(source(path)).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name for node in nodes} | {
        f"{node.name}.{inner.name}" for node in nodes for inner in node.body if isinstance(inner, ast.FunctionDef)
    }


@pytest.mark.parametrize("command", ["train", "plan", "merge"])
def test_every_stop_is_there_and_leads_on(command):
    stops = STOP.findall(WAYS[command])
    assert 2 <= len(stops) <= 10
    passed = ""
    for path, name in stops:
        assert name in defined(path), f"{path} has no {name}"
        if passed:  # named there, or its module is started as a process
            module = path.removesuffix(".py").replace("/", ".")
            named = "|".join(map(re.escape, (*name.split("."), f"gemma4_tpu.{module}")))
            assert re.search(rf"\b({named})\b", passed), f"nothing before it leads to {path}: {name}"
        passed += source(path)
