"""Lists the paragraphs of README and docs/ with a figure of time, size, speed or money that says nowhere whose it is.

    python docs/unsourced_figures.py

A figure is *measured*, *estimated* or *quoted*: one of these words, or a link to the record, stands in its paragraph or
in its section. What is listed is to be read by a person: a limit that the code sets needs no source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem != "configuration")]

_UNITS = r"×|%|ms|s|min|minutes|seconds|hours?|GiB|MiB|GB|MB|TFLOP|tokens/s"
_FIGURE = re.compile(rf"\$\d|(?<![\w.`=/-])\d[\d,.]*\s?(?:{_UNITS})(?!\w)")
_SOURCE = re.compile(r"measured|estimated|quoted|schedule", re.IGNORECASE)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def unsourced(text: str) -> Iterator[str]:
    """The paragraphs of a page, on one line each."""
    for section in re.split(r"^#+ ", _CODE.sub("", text), flags=re.MULTILINE):
        if _SOURCE.search(section):
            continue
        for paragraph in re.split(r"\n\s*\n", section):
            if _FIGURE.search(paragraph) and "](" not in paragraph:
                yield " ".join(paragraph.split())


def main() -> None:
    """Prints the list."""
    for page in PAGES:
        for paragraph in unsourced(page.read_text(encoding="utf-8")):
            print(f"{page.relative_to(ROOT)}: {paragraph[:160]}")


if __name__ == "__main__":
    main()
