"""Figures say whose they are."""

from docs.unsourced_figures import unsourced
from tests.house.scripts import ROOT


def test_readme_has_no_figure_without_a_source():
    assert list(unsourced((ROOT / "README.md").read_text(encoding="utf-8"))) == []


def test_a_figure_needs_a_word_or_a_link():
    page = (
        "# Speed\n\nIt takes 12 s.\n\nIt costs $3, see [plans](plans.md). `12 s`\n\n## More\n\n*Measured*:\n\n40 GB.\n"
    )
    assert list(unsourced(page)) == ["It takes 12 s."]
