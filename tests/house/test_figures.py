"""Figures say whose they are."""

import json
import re

from docs.unsourced_figures import NEED_NONE, PAGES, unknown, unsourced
from tests.house.scripts import ROOT


def test_what_readme_and_an_example_estimate_is_in_their_records():
    readme, page = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/concepts/plan.md"))
    told = re.search(r"one epoch: (.+?) minutes and \$(.+?) on a v5p-8", readme)
    table = (ROOT / "experiments/plans/README.md").read_text().splitlines()
    (cells,) = (
        [cell.strip() for cell in row.split("|")] for row in table if row.startswith("| gemma4_31b | v5p-8 | lora")
    )
    assert list(told.groups()) == cells[-4:-2]
    shown = json.loads(re.search(r"```json (\{.+?\}\}) ```", page)[1])
    folder = ROOT / "experiments/e4b_v6e1"
    assert shown.items() <= json.loads((folder / "plan.json").read_text()).items()
    (run,) = (row for row in (folder / "README.md").read_text().splitlines() if row.startswith("| the run |"))
    (example,) = re.findall(
        r"\| (29[^|]+GiB) \| (\d+) ms[^|]+\| (\d+) ms[^|]+\| ([^|]+) \| ([^|]+) \| ([^|]+) \|", page
    )
    assert {cell.removesuffix(" GiB") for cell in example} <= {cell.strip() for cell in run.split("|")}


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
