"""A tiny checkpoint that sees, made once."""

import pytest

from experiments.pictures_smoke.make_base import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of the experiment's base."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    return make_base(tmp_path_factory.mktemp("sees") / "base")
