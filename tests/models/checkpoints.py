"""Tiny Gemma 4 checkpoints made by transformers: the ground truth for names, layouts and logits.

Every architecture in miniature, with two or more repeats of its layer pattern, a window shorter than the sequences,
and non-trivial norms, layer scalars and router scales (transformers initialises all of those to ones).
Folders are made once per process and shared: copy one before changing it. `oldest.py` runs this module as a program,
with another transformers.
"""

from __future__ import annotations

import atexit
import json
import math
import sys
import tempfile
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

KINDS = ("dense", "moe", "e2b", "e4b")
UNIFIED = "unified"
"""12B: for us `dense` under other names, which is why not all tests take it."""
PREFIXES = ("causal", "multimodal")
VOCAB_SIZE = 128

# What `Gemma4TextConfig` takes; the rest are its defaults.
_COMMON = {
    "vocab_size": VOCAB_SIZE, "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96,
    "head_dim": 8, "global_head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 30.0,
    "max_position_embeddings": 131_072, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_TEXT = {
    # 31B: heads, KV heads and global KV heads as 4:2:1, so that tp=4 is legal; K = V on global layers
    "dense": {
        "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 4,
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
    },
    # 26B-A4B: tp=2 at most
    "moe": {
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2,
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 8,
        "top_k_experts": 2, "moe_intermediate_size": 24,
    },
    # E2B: period 5, one KV head, per-layer embeddings, half of the layers KV-shared with an MLP twice as wide
    "e2b": {
        "num_hidden_layers": 20, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 10, "use_double_wide_mlp": True,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 4,
    },
    "e4b": {
        "num_hidden_layers": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 12,
    },
    # 12B: one global KV head; its config knows nothing of per-layer embeddings and experts
    UNIFIED: {
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
}  # fmt: skip
_TOWER, _HEARING = {"vision_tower", "embed_vision"}, {"audio_tower", "embed_audio"}
OTHERS = {
    "dense": _TOWER, "moe": _TOWER, "e2b": _TOWER | _HEARING, "e4b": _TOWER | _HEARING,
    UNIFIED: {"vision_embedder", "embed_vision", "embed_audio"},
}  # fmt: skip
"""What a multimodal checkpoint holds beside the text model, as its tensors' names begin."""
_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 8,
}  # fmt: skip
_UNIFIED_VISION = {"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64}
_AUDIO = {  # the small sizes hear too
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [4, 4],
    "conv_kernel_size": 3, "output_proj_dims": 16,
}  # fmt: skip


def _randomise(model, seed: int) -> None:
    """Matrices keep the scale of their input; vectors (norms, scalars) spread around one; in sorted order of names."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name in sorted(state):
        tensor = state[name]
        if name.startswith("lm_head") or not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise / math.sqrt(tensor.shape[-1]) if tensor.ndim > 1 else 1 + 0.2 * noise.clamp(-2, 2))


@cache
def make_checkpoint(
    kind: str, *, prefix: str = "causal", shards: int = 1, seed: int = 0, dtype: str = "float32"
) -> Path:
    """A checkpoint folder as transformers' `save_pretrained` writes it; shared and cached: do not change it.

    Args:
      kind: one of `KINDS`, or `UNIFIED`.
      prefix: `causal` (`Gemma4ForCausalLM`, keys `model.layers.…`) or `multimodal` (`Gemma4ForConditionalGeneration`
        with a small vision tower, E2B and E4B with an audio tower too; keys `model.language_model.layers.…`). Same
        seed, not the same weights.
      shards: 1 writes `model.safetensors`; more write at least that many shards and an index.
      dtype: of the saved weights, `float32` or `bfloat16`.
    """
    folder = _root() / f"{kind}-{prefix}-{shards}-{seed}-{dtype}"
    save(_model(kind, prefix), folder, shards=shards, seed=seed, dtype=dtype)
    return folder


def save(model, folder: Path, *, shards: int = 1, seed: int = 0, dtype: str = "float32") -> None:
    """Gives a transformers model random weights, and saves it."""
    import torch

    with torch.no_grad():
        _randomise(model, seed)
    model = model.to(getattr(torch, dtype))
    total_bytes = sum(t.numel() * t.element_size() for t in model.parameters())
    model.save_pretrained(folder, max_shard_size=total_bytes * 2 if shards == 1 else total_bytes // shards)


def _model(kind: str, prefix: str):
    import transformers as hf

    family = "Gemma4Unified" if kind == UNIFIED else "Gemma4"

    def of(name: str):
        return getattr(hf, f"{family}{name}")

    values = _COMMON | _TEXT[kind]
    if kind == UNIFIED:
        del values["vocab_size_per_layer_input"]
    text = of("TextConfig")(**values)
    if prefix == "causal":
        return of("ForCausalLM")(text)
    vision = of("VisionConfig")(**(_UNIFIED_VISION if kind == UNIFIED else _VISION))
    audio = None
    if kind == UNIFIED:
        audio = of("AudioConfig")(audio_embed_dim=16)
    elif kind in ("e2b", "e4b"):
        audio = of("AudioConfig")(**_AUDIO)
    return of("ForConditionalGeneration")(of("Config")(text_config=text, vision_config=vision, audio_config=audio))


@cache
def _root() -> Path:
    scratch = tempfile.TemporaryDirectory(prefix="gemma4-checkpoints-")
    atexit.register(scratch.cleanup)
    return Path(scratch.name)


def make_batch(*, batch: int = 3, length: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [B, T] and their mask [B, T] (True = real), right-padded with 0 by a different amount per row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB_SIZE, (batch, length), dtype=np.int32)
    lengths = length - np.arange(batch) * (length // 4)
    mask = np.arange(length)[None, :] < lengths[:, None]
    return np.where(mask, tokens, 0).astype(np.int32), mask


@lru_cache(maxsize=8)
def load_hf(folder: Path):
    """The transformers model of a folder, in fp32 with plain attention, in eval mode."""
    import torch
    import transformers

    architecture = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def hf_logits(folder: Path, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """transformers' logits [B, T, V] in fp32 for `tokens` [B, T]; those of padding positions mean nothing."""
    import torch

    attention_mask = None if mask is None else torch.tensor(np.asarray(mask)).long()
    with torch.no_grad():
        return load_hf(folder)(torch.tensor(np.asarray(tokens)).long(), attention_mask=attention_mask).logits.numpy()


def _program(job: dict) -> None:
    """What a child process is asked for: checkpoints to make, and logits [B, T, V] to write as .npy files."""
    import transformers

    for config, folder in job.get("configs", []):
        config = transformers.AutoConfig.for_model(**config)
        save(transformers.AutoModelForCausalLM.from_config(config), Path(folder))
    tokens = np.array(job["tokens"])
    for folder, out in job.get("logits", []):
        np.save(out, hf_logits(Path(folder), tokens))


if __name__ == "__main__":
    _program(json.load(sys.stdin))
