"""The tiny base with heads that vLLM's attention on CPUs takes: the same function of the tokens.

Heads of 16 become 32 wide by zeros. Each number keeps its rotation: of 32 dims the pair (2i, 2i + 16) turns as fast as
the pair (i, i + 8) of 16. A norm over twice as many dims is √2 larger, which q_norm, k_norm and o_proj take back.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes  # noqa: F401 (NumPy's bfloat16)
import numpy as np
from safetensors.numpy import load_file, save_file

from gemma4_tpu import assets
from gemma4_tpu.architectures import ARCHITECTURES

WIDTH = 32
NARROW = ARCHITECTURES["tiny"]
WIDE = replace(NARROW, head_dim=WIDTH)
_TIMES = WIDTH // NARROW.head_dim
_PLACES = np.concatenate([half * WIDTH // 2 + _TIMES * np.arange(NARROW.head_dim // 2) for half in (0, 1)])


def _heads(rows: np.ndarray) -> np.ndarray:
    """[heads × 16, D] → [heads × 32, D]"""
    narrow = rows.reshape(-1, NARROW.head_dim, rows.shape[-1])
    wide = np.zeros((len(narrow), WIDTH, rows.shape[-1]), np.float32)
    wide[:, _PLACES] = narrow
    return wide.reshape(-1, rows.shape[-1])


def make_wide(folder: Path) -> Path:
    """Writes the base in float32; returns the folder."""
    tiny = Path(assets.ROOT, "tiny")
    shutil.copytree(tiny, folder)
    tensors = {name: value.astype(np.float32) for name, value in load_file(tiny / "model.safetensors").items()}
    shrink = np.float32(_TIMES**-0.5)
    for layer in range(NARROW.num_layers):
        if NARROW.is_global(layer):
            continue
        at = f"model.layers.{layer}.self_attn."
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{at}{name}.weight"] = _heads(tensors[f"{at}{name}.weight"])
        for name in ("q_norm", "k_norm"):
            tensors[f"{at}{name}.weight"] = _heads(tensors[f"{at}{name}.weight"][:, None])[:, 0] * shrink
        out = _heads(tensors[f"{at}o_proj.weight"].T).T * shrink
        tensors[f"{at}o_proj.weight"] = np.ascontiguousarray(out)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": WIDTH, "dtype": "float32"}))
    return folder
