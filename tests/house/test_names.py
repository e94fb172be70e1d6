"""A name means one thing, and a function asks for no more than it needs."""

import ast
import re
from collections import defaultdict

from tests.house.scripts import ROOT

SHARED = {"__init__.py", "checks.py", "schema.py"}
"""The same thing in each room: its door, its checks, the types of its keys."""
PLACES = ("gemma4_tpu", "launch", "hydra_plugins", "benchmarks", "experiments", "docs", "examples")
ROOTS_BELONG_TO = {
    "launch/tpu_vm.py": "a door",
    "launch/gke.py": "a door",
    "planning/planned.py": "holds the configuration that is planned",
    "planning/compilation.py": "hands it to the process that compiles it",
    "planning/misfit.py": "holds a change to the whole, to be tried",
    "sweeping/plan_check.py": "makes a plan of a training",
}
"""Beside the doors (`gemma4_tpu/*.py`) and the checks."""


def test_no_two_classes_of_one_name():
    """Those that a module keeps to itself included: `_Reader` is no other `Reader`'s."""
    places = defaultdict(list)
    for path in (path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(str(path.relative_to(ROOT)))
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_two_modules_of_one_name_with_different_meanings():
    places = defaultdict(list)
    for path in sorted((ROOT / "gemma4_tpu").rglob("*.py")):
        if path.name not in SHARED:
            places[path.name].append(str(path.relative_to(ROOT / "gemma4_tpu")))
    several = {name: found for name, found in places.items() if len(found) > 1}
    assert several == {"merge.py": ["export/merge.py", "merge.py"]}  # the work, and the door that opens it


def test_roots_stay_at_the_doors():
    """CONTRIBUTING: functions and classes get the dataclass of their own concern, never the root configuration."""
    found = set()
    for path in sorted((ROOT / "gemma4_tpu").glob("*/**/*.py")):
        if path.stem == "checks" or path.parent.name == "config":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        held = [part for node in nodes if isinstance(node, ast.ClassDef) for part in node.body]
        taken = [node for node in nodes if isinstance(node, ast.arg)]
        typed = [one.annotation for one in (*held, *taken) if isinstance(one, ast.arg | ast.AnnAssign)]
        if any(re.search(r"\w+Root\b", ast.unparse(annotation)) for annotation in typed if annotation is not None):
            found.add(str(path.relative_to(ROOT / "gemma4_tpu")))
    assert found == set(ROOTS_BELONG_TO), "take the groups that are needed, or say why the root is right"
