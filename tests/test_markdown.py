"""Tables of Markdown, read back by the reader that makes pages of them."""

from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from gemma4_tpu.markdown import code, plain, table

ANY_TIME = settings(deadline=None, derandomize=True, database=None)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), max_size=20)


def cells(lines):
    """Rows of cells, as text."""
    tokens = MarkdownIt("commonmark").enable("table").parse("\n".join(lines))
    rows, row = [], []
    for token in tokens:
        if token.type == "inline":
            row.append("".join(child.content for child in token.children))
        elif token.type == "tr_close":
            rows.append(row)
            row = []
    return rows


@ANY_TIME
@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3), min_size=1, max_size=4), st.sampled_from(["", "lrr", "rl"]))
def test_any_text_stays_in_its_cell(rows, align):
    read = cells(table(["a", "b", "c"], [[plain(text) for text in row] for row in rows], align))
    assert read == [["a", "b", "c"], *([" ".join(text.split()) for text in row] for row in rows)]


@ANY_TIME
@given(TEXTS.filter(lambda text: text.strip() and "\\" not in text))
def test_code_stays_in_its_cell(text):
    shown = " ".join(text.split())
    assert cells(table(["x", "y"], [[code(text), "end"]]))[1] == [shown, "end"]


def test_a_bar_is_escaped_once_and_a_line_break_ends_no_row():
    lines = list(table(["a|b", "n"], [["x|y\nz", 1], [r"x\|y", None]], "lr"))
    assert lines == [r"| a\|b |   n |", "|-----------|----:|", r"| x\|y<br>z |   1 |", r"| x\|y |     |", ""]


def test_numbers_that_are_texts_keep_their_form():
    assert list(table(["v"], [["1e-4"], ["007"], ["1_000"]]))[2:5] == ["| 1e-4 |", "| 007 |", "| 1_000 |"]
