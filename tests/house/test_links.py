"""Links and paths in the documentation lead somewhere."""

import re

import pytest

from tests.house.commands import PAGES
from tests.house.scripts import ROOT

_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
_SOURCE = re.compile(r"""\bsrc(?:set)?="([^"]+)"|^```{image} (\S+)$""", re.M)
_FOLDERS = r"docs|gemma4_tpu|conf(?!/local)|launch|experiments|benchmarks|tests|requirements"
_PATH = re.compile(rf"`((?:{_FOLDERS})/[\w/-]*(?:/|\.\w+))`")
_PAGE = re.compile(r"\b(?:docs|benchmarks|experiments/\w+)/\w+\.md\b")


def anchors(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them from its headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        twin = next(f"{slug}{'' if number == 0 else f'-{number}'}" for number in range(99)
                    if f"{slug}{'' if number == 0 else f'-{number}'}" not in found)  # fmt: skip
        found.add(twin)
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_and_paths_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    broken = []
    for link in [*_LINK.findall(text), *("".join(found) for found in _SOURCE.findall(text))]:
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    broken += [path for path in _PATH.findall(text) if not (ROOT / path).exists()]
    assert not broken


@pytest.mark.parametrize(
    "target",
    [
        "../data.md#your-own-csv-in-three-steps",
        "../../experiments/plans/README.md",
        "../data.md#why-rows-are-dropped",
        "../rewards.md",
    ],
    ids=["train on my own CSV", "what a v6e-4 costs", "why a row was dropped", "how to write a reward"],
)
def test_the_index_of_the_site_answers_what_is_asked_most(target):
    """Each is one click away; three are allowed."""
    assert target in _LINK.findall((ROOT / "docs/site/index.md").read_text(encoding="utf-8"))


def test_pages_that_code_and_configuration_name_are_there():
    files = [path for pattern in ("gemma4_tpu/**/*.py", "launch/*", "conf/**/*.yaml", "tests/**/*.py", "Makefile")
             for path in ROOT.glob(pattern) if path.is_file()]  # fmt: skip
    named = {(name, path) for path in files for name in _PAGE.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 5
    assert [f"{path.relative_to(ROOT)}: {name}" for name, path in sorted(named) if not (ROOT / name).exists()] == []
