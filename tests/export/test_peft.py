"""The adapter's files; that PEFT computes the LoRA model's logits with them is in test_merge.py."""

import json
import logging
import re

import pytest
from safetensors.numpy import load_file

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.export.peft import vllm_warning
from tests.models.checkpoints import UNIFIED, load_hf


@pytest.mark.parametrize(
    ("kind", "prefix", "targets"),
    [
        ("dense", "causal", None),
        ("dense", "multimodal", None),
        ("e2b", "multimodal", ["mlp"]),
        ("moe", "causal", None),
        (UNIFIED, "multimodal", None),
    ],
)
def test_target_modules_match_the_adapted_modules_and_no_others(kind, prefix, targets, run_of, merge):
    lora = LoraConfig(rank=4, **({"targets": targets} if targets else {}))
    run, base = run_of(kind, prefix=prefix, lora=lora)
    merge(run, "export=peft")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    named = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
             for name in load_file(run / "adapter" / "adapter_model.safetensors")}  # fmt: skip
    modules = {name for name, _ in load_hf(base).named_modules()}
    assert {name for name in modules if re.fullmatch(config["target_modules"], name)} == named
    assert not [name for name in named if "vision" in name or "experts" in name]


def test_configuration_carries_rank_alpha_and_rslora(run_of, merge):
    run, base = run_of(lora=LoraConfig(rank=4, alpha=6.0, rslora=True, dropout=0.1))
    merge(run, "export=peft")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    expected = {"r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    assert {key: config[key] for key in expected} == expected
    assert config["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(("rank", "told"), [(16, None), (12, "--max-lora-rank 16"), (600, "serve the merged model")])
def test_ranks_that_vllm_does_not_take(rank, told):
    warning = vllm_warning(rank)
    assert (warning is None) if told is None else (told in warning)


def test_such_a_rank_is_reported(run_of, merge, caplog):
    run, _ = run_of(lora=LoraConfig(rank=5))
    with caplog.at_level(logging.WARNING):
        merge(run, "export=peft")
    assert "adapters of rank 5: vLLM refuses --max-lora-rank 5; give it --max-lora-rank 8" in caplog.text
