"""Checkpoints that are all header: every tensor of a real size in its place, and nothing but holes for values."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

from gemma4_tpu import assets
from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.models.names import name_map

BYTES = {"BF16": 2, "F32": 4, "U8": 1, "I8": 1, "I32": 4, "F8_E4M3": 1}


def text_tensors(name: str, prefix: str = "model.") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Full name → (dtype, shape) of every text tensor, in bfloat16."""
    tensors = name_map(ARCHITECTURES[name]).values()
    return {prefix + hf_name: ("BF16", t.hf_shape) for t in tensors for hf_name in t.hf_names}


def write_skeleton(folder: Path, name: str, *, more=None, without=(), config=None, prefix: str = "model.") -> Path:
    """A checkpoint folder with the tiny model's tokenizer; its file takes no room on disk, whatever its size.

    Args:
      folder: where it goes.
      name: key of `ARCHITECTURES`.
      more: further tensors, or others of the same names.
      without: names to leave out.
      config: changes to `config.json`.
      prefix: of the text model's tensors.
    """
    folder.mkdir(parents=True)
    tensors = {n: t for n, t in (text_tensors(name, prefix) | (more or {})).items() if n not in without}
    header, stop = {}, 0
    for tensor, (dtype, shape) in tensors.items():
        start, stop = stop, stop + math.prod(shape) * BYTES[dtype]
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + stop)
    (folder / "config.json").write_text(json.dumps(to_hf_config(ARCHITECTURES[name]) | (config or {})))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(assets.ROOT / "tiny" / file, folder / file)
    return folder
