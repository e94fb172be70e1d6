"""Runs on tiny checkpoints of every architecture, and the export of them."""

import json

import numpy as np
import pytest

from gemma4_tpu.architectures import ARCHITECTURES, from_hf_config
from gemma4_tpu.merge import main
from tests.export.runs import make_run
from tests.models.checkpoints import make_checkpoint


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Makes a run on a tiny checkpoint; returns (run folder, base folder)."""

    def make(kind="dense", *, prefix="causal", shards=1, dtype="float32", folder="run", **options):
        base = make_checkpoint(kind, prefix=prefix, shards=shards, dtype=dtype)
        config = json.loads((base / "config.json").read_text())
        monkeypatch.setitem(ARCHITECTURES, f"test_{kind}", from_hf_config(config, name=f"test_{kind}"))
        return make_run(tmp_path / folder, base, name=f"test_{kind}", **options), base

    return make


@pytest.fixture
def merge():
    """Runs `python -m gemma4_tpu.merge` in this process and expects success."""

    def run(folder, *words):
        assert main([f"run={folder}", *words]) == 0

    return run


@pytest.fixture
def refused(capsys):
    """Runs it and expects a refusal; returns the message."""

    def run(*words):
        capsys.readouterr()
        assert main(list(words)) == 2
        return capsys.readouterr().err

    return run


def tree(folder):
    """Every file below a folder with its bytes, records and locks of exports aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
