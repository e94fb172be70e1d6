"""Figures say whose they are."""

from docs.unsourced_figures import NEED_NONE, PAGES, unknown, unsourced


def test_no_figure_of_readme_and_docs_lacks_its_source():
    assert list(unknown()) == []
    pages = {page.stem: "\n".join(unsourced(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert [words for stem, words in NEED_NONE if words not in pages[stem]] == []  # none is out of date


def test_a_figure_needs_a_word_or_a_link():
    page = (
        "# Speed\n\nIt takes 12 s.\n\nIt costs $3, see [plans](plans.md). `12 s`\n\n## More\n\n*Measured*:\n\n40 GB.\n"
    )
    assert list(unsourced(page)) == ["It takes 12 s."]
    assert list(unsourced("It takes 12 s.\n\nIt is fast.\n\n*Measured*: 3 s.")) == ["It takes 12 s."]
