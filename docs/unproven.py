"""Lists the sections of README and docs/ whose claims nothing holds: neither a test, a table nor a source.

    python -m docs.unproven

`claims.toml` names what holds each section: tests (a file of `tests/`, or one test in it), records and tables of this
repository, addresses that the section cites; or, after `no claim: `, why there is nothing to hold. A test fails where a
section is missing or what is named does not exist.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

from docs.unsourced_figures import PAGES, ROOT

CLAIMS = ROOT / "docs/claims.toml"
NONE = "no claim: "
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def sections(page: str) -> dict[str, str]:
    """Heading → the text beneath it, up to the next one; those that are empty are left out."""
    text = _CODE.sub("", page)
    headings = list(_HEADING.finditer(text))
    ends = [*(heading.start() for heading in headings[1:]), len(text)]
    found = {heading[1].strip(): text[heading.end() : end].strip() for heading, end in zip(headings, ends, strict=True)}
    return {heading: body for heading, body in found.items() if body}


def unproven() -> Iterator[str]:
    """One line for each section without an entry, and for each entry without its section or with something amiss."""
    claims = tomllib.loads(CLAIMS.read_text(encoding="utf-8"))
    names = {str(page.relative_to(ROOT)): page for page in PAGES}
    for name, page in names.items():
        held, found = claims.pop(name, {}), sections(page.read_text(encoding="utf-8"))
        for heading, body in found.items():
            holds = held.pop(heading, [])
            if not holds:
                yield f"{name}, {heading}: held by nothing"
            yield from (f"{name}, {heading}: {what}" for what in filter(None, (amiss(one, body) for one in holds)))
        yield from (f"{name} has no section {heading!r}" for heading in held)
    yield from (f"there is no page {name}" for name in claims)


def amiss(held_by: str, body: str) -> str | None:
    """What is wrong with an entry of a section; None: nothing."""
    if held_by.startswith(NONE):
        return None if held_by.removeprefix(NONE).strip() else "no claim, but it does not say why"
    if held_by.startswith("https://"):
        return None if held_by in body else f"{held_by} is not cited there"
    path, _, test = held_by.partition("::")
    if not (ROOT / path).exists():
        return f"{path} does not exist"
    if test and not re.search(rf"\bdef {re.escape(test)}\(", (ROOT / path).read_text(encoding="utf-8")):
        return f"{path} has no {test}"
    return None


def main() -> None:
    """Prints the list."""
    for line in unproven():
        print(line)


if __name__ == "__main__":
    main()
