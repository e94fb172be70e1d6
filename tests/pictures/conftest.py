"""A tiny checkpoint that sees, made once."""

import pytest

from experiments.pictures_smoke.make_base import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of the experiment's base."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.set_num_threads(1)  # this tower is so small that threads only wait for each other, on busy cores for long
    return make_base(tmp_path_factory.mktemp("sees") / "base")
