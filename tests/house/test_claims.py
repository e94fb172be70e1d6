"""What README and docs/ claim is held by something."""

import pytest

from docs import unproven


def test_every_section_is_held_by_what_exists():
    assert list(unproven.unproven()) == []


@pytest.mark.parametrize(
    ("held_by", "wrong"),
    [
        ("tests/house/test_claims.py", None),
        ("tests/house/test_claims.py::test_what_is_wrong_is_told", None),
        ("tests/house/test_claims.py::test_that_is_gone", "has no test_that_is_gone"),
        ("tests/test_that_is_gone.py", "does not exist"),
        ("https://example.org/a", None),
        ("https://example.org/b", "is not cited there"),
        ("no claim: steps", None),
        ("no claim: ", "does not say why"),
    ],
)
def test_what_is_wrong_is_told(held_by, wrong):
    found = unproven.amiss(held_by, "See https://example.org/a.")
    assert found is None if wrong is None else wrong in found


def test_sections_without_text_and_headings_in_code_are_none():
    page = "# Title\n\n## First\n\nIt holds.\n\n```\n# not a heading\n```\n\n## Second\n"
    assert unproven.sections(page) == {"First": "It holds."}
