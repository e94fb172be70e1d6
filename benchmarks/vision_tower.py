"""Pictures a second through the frozen vision tower, as `data.image_cache` is filled.

    python -m benchmarks.vision_tower [--checkpoint FOLDER]

The processor and E2B's and E4B's tower (16 layers of 768, random weights unless a
checkpoint is given) on this machine's CPU, by number of soft tokens and of pictures at a time.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from gemma4_tpu.data.picture_cache import BATCH
from gemma4_tpu.markdown import table
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.models.vision_tower import PREFIX, PictureProcessor, Tower

SOFT_TOKENS = (70, 280, 1120)


def random_tower(folder: Path) -> Checkpoint:
    """A checkpoint that holds the released small sizes' tower alone."""
    import torch
    from safetensors.torch import save_file
    from transformers import Gemma4VisionConfig, Gemma4VisionModel

    config = Gemma4VisionConfig()
    state = Gemma4VisionModel(config).state_dict()
    save_file({PREFIX + name: value.to(torch.bfloat16) for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"vision_config": {config.to_json_string(use_diff=False)}}}', "utf-8")
    return Checkpoint(str(folder))


def rate(checkpoint: Checkpoint, soft_tokens: int, batch: int, repeats: int) -> tuple[int, float]:
    """(soft tokens of a picture of 4:3, pictures a second) for so many pictures at a time; the best of some repeats."""
    from PIL import Image

    processor = PictureProcessor({"max_soft_tokens": soft_tokens})
    tower, rng = Tower(checkpoint, processor), np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (768, 1024, 3), np.uint8)) for _ in range(batch)]
    tower.encode(images[:1])  # loads the weights
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        tower.encode(images)
        seconds.append(time.perf_counter() - started)
    return processor.tokens(1024, 768), batch / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="an E2B or E4B checkpoint's folder, instead of random weights")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, BATCH])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Checkpoint(args.checkpoint) if args.checkpoint else random_tower(Path(scratch))
        rows = []
        for soft_tokens in SOFT_TOKENS:
            for batch in args.batches:
                tokens, per_second = rate(checkpoint, soft_tokens, batch, args.repeats)
                rows.append([soft_tokens, tokens, batch, f"{per_second:.3g}", f"{3600 * per_second:,.0f}"])
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores\n")
    heads = ["`max_soft_tokens`", "tokens of a picture of 4:3", "pictures at a time", "pictures a second", "an hour"]
    print("\n".join(table(heads, rows, "rrrrr")))


if __name__ == "__main__":
    main()
