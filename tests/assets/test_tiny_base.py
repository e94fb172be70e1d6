"""The committed base checkpoint: what Hugging Face's classes load, and that it knows Verilog."""

from itertools import islice
from random import Random

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.verilog_smoke.families import draw_designs
from experiments.verilog_smoke.prompts import document
from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.assets import ROOT
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.models.base import resolve_base
from gemma4_tpu.models.match import match

FOLDER = ROOT / "tiny"


def test_weights_are_bfloat16_and_small():
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    with safe_open(FOLDER / "model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_project_finds_every_tensor_where_it_expects_it():
    base = resolve_base(ModelConfig(name="tiny", path="embedded:tiny"))
    shapes = {name: base.checkpoint.shape(name) for name in base.checkpoint.names()}
    assert base.arch.layer_types == ARCHITECTURES["tiny"].layer_types
    assert match(base.arch, shapes, "tiny").passthrough == ()


def test_transformers_loads_it_whole_and_it_reads_unseen_verilog():
    model, info = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rng = Random("unseen")
    losses = []
    for design in islice(draw_designs(rng, heldout=True), 44):
        ids = tokenizer(document(design, rng), return_tensors="pt").input_ids
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    # An untrained model is at ln 512 = 6.2; names, widths and families drawn at random keep any model above about 0.2.
    assert np.mean(losses) < 0.5
