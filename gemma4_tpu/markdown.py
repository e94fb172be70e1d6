"""Markdown: tables, texts that stay texts, links, parts of other pages. Every page and table is written with these."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from tabulate import tabulate

_SIDES = {"l": None, "r": "right"}
"""Words are not padded: one long cell would widen every line of the table, and of each later diff."""


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], align: str = "") -> Iterator[str]:
    """Lines of a table, and an empty one.

    Args:
      heads: of the columns.
      rows: Markdown of each cell, None for nothing; bars and line breaks are taken care of.
      align: `l` or `r` for each column; the rest is `l`.
    """
    sides = [_SIDES[side] for side in align.ljust(len(heads), "l")]
    cells = [[_cell(value) for value in row] for row in rows]
    titles = [_cell(head) for head in heads]
    text = tabulate(cells, titles, tablefmt="pipe", disable_numparse=True, stralign=None, colalign=sides)
    yield from text.split("\n")
    yield ""


def _cell(value: object) -> str:
    """What stays in its cell: a bar that isn't escaped would end it, a line break the row."""
    text = "" if value is None else str(value)
    return re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\\|", text).replace("\n", "<br>")


def plain(text: object) -> str:
    """A text that means nothing in Markdown."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """A text in fixed width, whatever it holds."""
    shown = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def shown(path: Path | str) -> str:
    """A path as seen from the working folder, if it is in it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else str(path)


def link(path: Path, page: Path, text: str | None = None) -> str:
    """A link to a file, as seen from the page's folder."""
    return f"[{plain(text or path.name)}]({_from(path, page)})"


def pictures(paths: Sequence[Path], page: Path) -> Iterator[str]:
    """Links to the pictures that exist, side by side, and an empty line."""
    shown = [f"![{path.stem.replace('_', ' ')}]({_from(path, page)})" for path in paths if path.is_file()]
    if shown:
        yield from [*shown, ""]


def _from(path: Path, page: Path) -> str:
    return quote(os.path.relpath(path, page.parent))


def below(text: str, levels: int) -> list[str]:
    """Lines of another page, without its title, headings so many levels down."""
    lines, fenced = [], False
    for line in text.splitlines():
        fenced ^= line.startswith(("```", "~~~"))
        if not fenced and re.match("# ", line):
            continue
        lines.append("#" * levels + line if not fenced and re.match("#+ ", line) else line)
    return lines


def included(report: Path, page: Path, levels: int) -> list[str]:
    """As `below`, from a file; what it links to is found from the page's folder."""
    folder = _from(report.parent, page)
    text = re.sub(r"\]\((?!\w+:|/|#)", f"]({folder}/", report.read_text(encoding="utf-8"))
    return below(text, levels)
