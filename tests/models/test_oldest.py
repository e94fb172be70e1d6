"""The oldest transformers that pyproject.toml allows, in everything that is done with one."""

import pytest

from tests.models.oldest import oldest

TESTS = (
    "tests/models/test_forward.py::test_logits_equal_transformers",
    "tests/assets/test_tiny_tokenizer.py",
    "tests/serving/test_local_engine.py",
    "tests/pictures/test_forward.py",
)
"""What transformers computes, and what it is asked for: logits of its own checkpoints, templates, serving, features of
pictures."""


@pytest.mark.slow
def test_what_is_asked_of_transformers_is_there_in_the_oldest():
    oldest("pytest", *TESTS, "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
