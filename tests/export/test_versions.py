"""Checkpoints from two versions of transformers: trained, merged, and loaded again in both of them."""

import json
import shutil

import numpy as np
import pytest

from gemma4_tpu import assets, check, merge, train
from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.hf_config import with_both_key_sets
from tests.models.checkpoints import hf_logits, make_batch, save
from tests.models.oldest import by_oldest
from tests.models.test_forward import LOGIT_TOLERANCE

KINDS = {"31B": "tiny", "26B-A4B": "tiny_moe", "E2B": "tiny_e2b", "12B": "tiny"}
"""Size → the architecture that is it in miniature."""
QUICK = [
    "lora.rank=2", "data.sequence_length=128", "data.max_rows=40", "data.heldout=[]", "data.heldout_fraction=0",
    "data.max_drop_fraction=1", "trainer.global_batch_sequences=4", "trainer.max_updates=1", "trainer.eval_every=0",
    "optimizer.warmup_updates=0", "optimizer.learning_rate=0.1",
]  # fmt: skip


def config_of(size):
    """As `AutoConfig.for_model` takes it; without what only one of the two versions writes."""
    config = to_hf_config(ARCHITECTURES[KINDS[size]]) | {"dtype": "float32"}
    for key in ("per_layer_config", "architectures"):
        del config[key]
    if size == "12B":
        config["model_type"] = "gemma4_unified_text"
        for key in [key for key in config if "per_layer_input" in key or "moe" in key or "expert" in key]:
            del config[key]
    return config


def saved_by_the_installed(size, folder):
    import transformers

    config = transformers.AutoConfig.for_model(**config_of(size))
    save(transformers.AutoModelForCausalLM.from_config(config), folder)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["oldest", "installed"])
@pytest.mark.parametrize("size", KINDS)
def test_it_trains_merges_and_loads_back_in_both(size, version, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base, run = tmp_path / "base", tmp_path / "run"
    tokens = np.maximum(make_batch()[0], 3)
    if version == "oldest":
        by_oldest(tokens, configs=[(config_of(size), base)])
    else:
        saved_by_the_installed(size, base)
    saved = json.loads((base / "config.json").read_text())
    assert ("per_layer_config" in saved, "global_head_dim" in saved) == (version == "installed", version == "oldest")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(assets.ROOT / "tiny" / name, base / name)

    assert check.main([f"model.path={base}"]) == 0
    assert f"model          {KINDS[size]} (" in capsys.readouterr().out
    model = [f"model={KINDS[size]}", f"model.path={base}"]
    assert train.main([*model, *QUICK, f"run_dir={run}"]) == 0
    assert merge.main([f"run={run}"]) == 0

    merged = json.loads((run / "merged" / "config.json").read_text())
    assert merged == with_both_key_sets(saved)
    by_oldest(tokens, logits=[(run / "merged", tmp_path / "merged.npy")])
    in_both = hf_logits(run / "merged", tokens), np.load(tmp_path / "merged.npy")
    assert np.abs(in_both[0] - in_both[1]).max() <= LOGIT_TOLERANCE
    parity = json.loads(next(run.glob("merges/*/parity.json")).read_text())  # the LoRA model's, by our forward pass
    assert parity["passed"] and parity["logits"]["differs_from_base"]
