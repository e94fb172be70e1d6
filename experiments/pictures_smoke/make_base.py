"""Make a tiny checkpoint that sees: `python experiments/pictures_smoke/make_base.py OUT`.

E2B in miniature with a vision tower, by transformers' own classes: `Gemma4ForConditionalGeneration` with random
weights, its image processor, and the embedded tiny tokenizer with the tokens of pictures. Text model: `tiny_e2b` of
`architectures.py`, with a larger vocabulary. Nothing is downloaded; the same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.assets import ROOT
from gemma4_tpu.data.markup import IMAGE, IMAGE_END, IMAGE_START

ARCHITECTURE = "tiny_e2b"
MULTIPLE = 8  # the vocabulary is a multiple of this, so that it can be split
VISION = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 12, "patch_size": 4, "pooling_kernel_size": 3, "position_embedding_size": 256,
}  # fmt: skip
SOFT_TOKENS = 70
"""Most that a picture takes; the least that transformers' processor knows."""


def make_base(folder: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Writes the checkpoint, and returns its folder."""
    import torch
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig

    tokens = _save_tokenizer(folder)
    vocabulary = -(-len(tokens) // MULTIPLE) * MULTIPLE
    text = to_hf_config(ARCHITECTURES[ARCHITECTURE])
    text |= {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**text), vision_config=Gemma4VisionConfig(**VISION), audio_config=None,
        boi_token_id=tokens[IMAGE_START], eoi_token_id=tokens[IMAGE_END], image_token_id=tokens[IMAGE],
    )  # fmt: skip
    model = Gemma4ForConditionalGeneration(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    processor = {
        "image_processor_type": "Gemma4ImageProcessor", "patch_size": VISION["patch_size"],
        "pooling_kernel_size": VISION["pooling_kernel_size"], "max_soft_tokens": SOFT_TOKENS,
    }  # fmt: skip
    _write(folder / "processor_config.json", {"image_processor": processor, "processor_class": "Gemma4Processor"})
    shutil.copy(ROOT / "tiny" / "generation_config.json", folder)
    return folder


def _randomise(model: Any, generator: Any) -> None:
    """Matrices keep the scale of what they are given; norms and scalars are ones."""
    import torch

    with torch.no_grad():
        for _, tensor in sorted(model.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]) if tensor.ndim > 1 else torch.ones(tensor.shape))


def _save_tokenizer(folder: Path) -> dict[str, int]:
    """The embedded tiny tokenizer with the tokens of pictures and a template that shows them; token → id."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "tiny"), local_files_only=True, trust_remote_code=False)
    tokenizer.add_tokens([IMAGE_START, IMAGE, IMAGE_END], special_tokens=True)
    tokenizer.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return tokenizer.get_vocab()


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    print(make_base(args.out, seed=args.seed, dtype=args.dtype))


if __name__ == "__main__":
    main()
