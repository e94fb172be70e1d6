"""experiments/README.md and the heads of recipes: figures are those of the records, and each names its command."""

import re

import pytest

from experiments import make_leaderboard
from experiments.plans import make_picture
from tests.house.scripts import ROOT

RECIPES = sorted((ROOT / "conf/experiment").glob("*.yaml"))


def test_what_is_committed_is_what_the_records_say():
    differing = [path.name for path, text in make_leaderboard.made().items() if path.read_text("utf-8") != text]
    assert differing == [], "run python -m experiments.make_leaderboard, then python docs/make_configuration.py"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_command_and_what_to_expect(path):
    package, *head = path.read_text("utf-8").splitlines()[:9]
    head = head[: next(number for number, line in enumerate(head) if not line.startswith("#"))]
    assert package == "# @package _global_"
    assert any(re.fullmatch(rf"#   python -m gemma4_tpu\.train .*experiment={path.stem}\b.*", line) for line in head)
    assert [line.split(":")[0] for line in head[-2:]] == ["# Expected loss", "# Expected time and cost"]


@pytest.mark.parametrize("mode", make_picture.MODES)
def test_the_picture_shows_the_plans(mode):
    drawn = set(re.findall(r"<!-- (.*?) -->", (ROOT / f"experiments/plans/price_{mode}.svg").read_text("utf-8")))
    assert {bar.label for bar in make_picture.bars()} <= drawn, "run python -m experiments.plans.make_picture"


def test_readme_and_the_tour_name_the_same_estimate():
    (bar,) = [bar for bar in make_picture.bars() if (bar.size, bar.machine) == ("gemma4_31b", "v5p-8")]
    usd, minutes = re.fullmatch(r"v5p-8: (.*), (.*) min", bar.label).groups()
    for page in ("README.md", "docs/tour.md"):
        assert f"{minutes} minutes and {usd}" in " ".join((ROOT / page).read_text("utf-8").split())


def test_runs_of_a_sweep_add_up():
    sweep, one = make_leaderboard.planned("lr_sweep"), make_leaderboard.planned("v5p8")
    assert (sweep.runs, one.runs) == (8, 1)
    assert sweep.usd == pytest.approx({end: 8 * usd for end, usd in one.usd.items()})  # of the same program
    assert make_leaderboard.planned("smoke") is None and make_leaderboard.ran("v5p8") is None
