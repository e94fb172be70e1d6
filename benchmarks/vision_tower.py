"""What a picture costs the frozen vision tower, as `data.image_cache` is filled, beside transformers alone.

    python -m benchmarks.vision_tower [--checkpoint FOLDER]

Photographs of 1024 × 768 pixels (JPEG); the tower of E2B and E4B, with random weights unless a checkpoint is given; on
one thread of this machine's CPU, in seconds that it worked: other work hardly matters.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.pages import measured
from gemma4_tpu.data.drops import Origin
from gemma4_tpu.data.picture_cache import FeatureCache
from gemma4_tpu.data.pictures import PictureReader
from gemma4_tpu.markdown import table
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.models.vision_tower import PREFIX, PictureProcessor, Tower

WIDTH, HEIGHT = 1024, 768


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


def photographs(folder: Path, count: int) -> list[Path]:
    """Files of smooth noise."""
    from PIL import Image

    rng, paths = np.random.default_rng(0), [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).resize((WIDTH, HEIGHT)).save(path)
    return paths


def transformers_alone(soft_tokens: int, paths: Sequence[Path]) -> None:
    """Its processor and tower as they come, in float32, one picture at a time."""
    import torch
    from PIL import Image
    from transformers import Gemma4VisionConfig, Gemma4VisionModel
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    processor, model = Gemma4ImageProcessorPil(max_soft_tokens=soft_tokens), Gemma4VisionModel(Gemma4VisionConfig())
    with torch.inference_mode():
        for path in paths:
            given = processor(images=[Image.open(path).convert("RGB")], return_tensors="pt")
            model(given["pixel_values"], given["image_position_ids"])


def start_of_a_run(processor: PictureProcessor, tower: Tower, paths: Sequence[Path], cache: Path) -> None:
    """Reads and checks the files, and makes the features that are not in `cache` yet."""
    reader = PictureReader(processor)
    pictures = [reader.read(str(path), Origin("", 0)) for path in paths]
    FeatureCache(str(cache), tower).ensure(pictures)


def core_seconds(paths: Sequence[Path], work: Callable[[], None]) -> float:
    """Of each picture."""
    started = time.process_time()
    work()
    return (time.process_time() - started) / len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="an E2B or E4B checkpoint's folder, instead of random weights")
    parser.add_argument("--soft-tokens", type=int, nargs="+", default=[70, 280], help="at most, of a picture")
    parser.add_argument("--pictures", type=int, default=2, help="with the most tokens; of smaller ones as many more")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(f"{measured('torch', 'transformers', 'pillow')} Core-seconds a picture:\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = Path(scratch), []
        checkpoint = Checkpoint(args.checkpoint) if args.checkpoint else random_tower(folder)
        for most in args.soft_tokens:
            paths = photographs(folder, args.pictures * max(args.soft_tokens) // most)
            processor = PictureProcessor({"max_soft_tokens": most})
            tower = Tower(checkpoint, processor)
            assert tower.key  # a hash of the weights, which is made once a start, however many pictures there are
            start = partial(start_of_a_run, processor, tower, paths, folder / f"cache{most}")
            works = partial(transformers_alone, most, paths), start, start
            tokens = processor.tokens(WIDTH, HEIGHT)
            alone, first, later = (core_seconds(paths, work) for work in works)
            rows.append([most, tokens, f"{alone:.3g}", f"{first:.3g}", f"{later:.3g}", f"{3600 / first:,.0f}"])
    heads = [
        "`max_soft_tokens`", "tokens of each", "transformers alone", "first start", "later starts",
        "pictures an hour and core",
    ]  # fmt: skip
    print("\n".join(table(heads, rows, "rrrrrr")))


if __name__ == "__main__":
    main()
