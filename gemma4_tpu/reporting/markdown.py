"""Pieces of Markdown: tables, pictures, other reports below a heading; who says so, in every row."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from gemma4_tpu.costing.figures import ESTIMATED, MEASURED, QUOTED

ALIGN = {"l": "---", "r": "---:"}
BY = {label: f"*{label}*" for label in (MEASURED, ESTIMATED, QUOTED)}
"""How a figure is marked."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> Iterator[str]:
    """A table and an empty line.

    Args:
      heads: of the columns.
      rows: Markdown of each cell; bars and line breaks are taken care of.
      align: `l` or `r` for each column; the rest is `l`.
    """
    yield _row(heads)
    yield _row([ALIGN[kind] for kind in align.ljust(len(heads), "l")])
    yield from (_row([re.sub(r"(?<!\\)\|", r"\\|", cell).replace("\n", " ") for cell in row]) for row in rows)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


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
    """A path as seen from the working folder, if it lies in it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else str(path)


def link(path: Path, page: Path, text: str | None = None) -> str:
    """A link to a file, as seen from the page's folder."""
    return f"[{plain(text or path.name)}]({_from(path, page)})"


def pictures(paths: Sequence[Path], page: Path) -> Iterator[str]:
    """Those of them that are there, side by side."""
    shown = [f"![{path.stem.replace('_', ' ')}]({_from(path, page)})" for path in paths if path.is_file()]
    if shown:
        yield from [*shown, ""]


def _from(path: Path, page: Path) -> str:
    return quote(os.path.relpath(path, page.parent))


def below(text: str, levels: int) -> list[str]:
    """Lines of another report, without its title, headings so many levels down."""
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
