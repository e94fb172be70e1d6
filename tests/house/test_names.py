"""A name means one thing: no two classes of the package share one, nor two modules of one room and another's."""

import ast
from collections import defaultdict

from tests.house.scripts import ROOT

SHARED = {"__init__.py", "checks.py", "schema.py"}
"""The same thing in each room: its door, its checks, the types of its keys."""
PLACES = ("gemma4_tpu", "launch", "hydra_plugins")


def test_no_two_public_classes_of_one_name():
    places = defaultdict(list)
    for path in (path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_two_modules_of_one_name_with_different_meanings():
    """A command's door may be called as the work that it opens (`merge`)."""
    places = defaultdict(list)
    for path in sorted((ROOT / "gemma4_tpu").glob("*/**/*.py")):
        if path.name not in SHARED:
            places[path.name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
