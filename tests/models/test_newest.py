"""Checkpoints that the newest transformers saves: its logits and ours are the same."""

import numpy as np
import pytest

from gemma4_tpu.checkpoint_folder import read_config
from tests.models.checkpoints import UNIFIED, make_batch
from tests.models.newest import newest
from tests.models.test_forward import LOGIT_TOLERANCE, load_folder, run

CASES = [("dense", "causal"), ("moe", "multimodal"), ("e2b", "multimodal"), (UNIFIED, "multimodal")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(kind, prefix) → folder that the newest transformers saved, with `logits.npy` of its own."""
    folders = {case: tmp_path_factory.mktemp("-".join(case)) for case in CASES}
    newest(
        make_batch()[0],
        kinds=[(*case, folder) for case, folder in folders.items()],
        logits=[(folder, folder / "logits.npy") for folder in folders.values()],
    )
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_equal_those_of_the_transformers_that_saved_them(case, saved):
    config = read_config(str(saved[case]))
    text = config.get("text_config", config)
    assert "per_layer_config" in text and "global_head_dim" not in text  # or this tests nothing new
    tokens, mask = make_batch()
    ours = run(*load_folder(saved[case]), tokens)
    theirs = np.load(saved[case] / "logits.npy")
    assert np.abs(ours - theirs)[mask].max() <= LOGIT_TOLERANCE
