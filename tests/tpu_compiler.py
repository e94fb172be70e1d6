"""What plans needs the TPU compiler, and there is a libtpu for Linux on x86-64 alone."""

import importlib.util

import pytest

MISSING = "no libtpu on this machine: nothing is planned"
needs_tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=MISSING)


def skip_without_tpu_compiler() -> None:
    """Within a test of which only some cases plan."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip(MISSING)
