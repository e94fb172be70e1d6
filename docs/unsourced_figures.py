"""Lists the paragraphs of README and docs/ with a figure of time, size, speed or money that says nowhere whose it is.

    python docs/unsourced_figures.py

A figure is *measured*, *estimated* or *quoted*: one of these words is in its paragraph or the one before or after it,
as with tables, or a link to the record is in its own. `NEED_NONE` names the paragraphs that were read by a person and
need none, with the reason; a test holds that there is no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem != "configuration"),
    *sorted((ROOT / "docs/concepts").glob("*.md")),
]

NEED_NONE = {
    ("benchmarking", "until a rate that holds and one that doesn't are within 2%"): "a constant of the search",
    ("benchmarking", "this client sent in time (median lag at most 10 ms)"): "a constant of the search",
    ("benchmarking", "its figure is between the true p98.4 and p99.6"): "arithmetic: the binomial law",
    ("benchmarking", "holds the search to within 5% of the capacity"): "the tolerance of the test that it names",
    ("benchmarking", "30 requests at 64 per second are half a second"): "arithmetic",
    ("data", "the line is longer than 16 MiB"): "a limit that the code sets",
    ("data", "A row has 10 s, its rendering 2 GiB of memory"): "limits that the code sets",
    ("data", "more than 2 GiB and 512 bytes per character"): "the same",
    ("evaluation", "(, in seconds or as a date, at most 300 s)"): "a limit that the code sets",
    ("evaluation", "*Interval over problems*: 95%"): "a definition",
    ("experts", "238 M at rank 8, which with gradient and moments take 3.81 GB"): "arithmetic: 238 M × 16 bytes",
    ("first_tpu_run", "Any machine with 65 GB of disk can copy that model"): "arithmetic: 31B in bfloat16",
    ("long_context", "on TPUs, of 256 × cp"): "a limit that the code sets",
    ("long_context", "keys and values take 1 GiB, a quarter of that"): "arithmetic, on the page",
    ("long_context", "a halo of 2 × window × heads of keys × width"): "a formula",
    ("on_policy", "200 problems × 2 samples cannot resolve differences below 0.04"): "arithmetic: the interval's width",
    ("pictures", "A feature takes 1.5 KB in bfloat16"): "arithmetic: 768 values of 2 bytes, at most 280 features",
    ("pictures", "1.5 KB each: 6 MB for a row of 4096"): "arithmetic: the same, 4,096 times",
    ("planning", "the first policy that leaves 3% of HBM free"): "a constant of the search",
}
"""(Page, words of the paragraph, without its code) → why its figures need no source."""

_UNITS = r"×|%|ms|s|min|minutes|seconds|hours?|GiB|MiB|GB|MB|TFLOP|tokens/s"
_FIGURE = re.compile(rf"\$\d|(?<![\w.`=/-])\d[\d,.]*\s?(?:{_UNITS})(?!\w)")
_SOURCE = re.compile(r"measured|estimated|quoted|schedule", re.IGNORECASE)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def unsourced(text: str) -> Iterator[str]:
    """The paragraphs of a page, on one line each."""
    for section in re.split(r"^#+ ", _CODE.sub("", text), flags=re.MULTILINE):
        paragraphs = re.split(r"\n\s*\n", section)
        for i, paragraph in enumerate(paragraphs):
            sourced = "](" in paragraph or any(map(_SOURCE.search, paragraphs[max(0, i - 1) : i + 2]))
            if _FIGURE.search(paragraph) and not sourced:
                yield " ".join(paragraph.split())


def unknown() -> Iterator[tuple[str, str]]:
    """(Page, paragraph) of all that are listed and not in `NEED_NONE`."""
    for page in PAGES:
        for paragraph in unsourced(page.read_text(encoding="utf-8")):
            if not any(page.stem == stem and words in paragraph for stem, words in NEED_NONE):
                yield page.stem, paragraph


def main() -> None:
    """Prints the list."""
    for page, paragraph in unknown():
        print(f"{page}: {paragraph[:160]}")


if __name__ == "__main__":
    main()
