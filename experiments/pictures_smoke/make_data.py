"""Draw the rows of the experiment: `python experiments/pictures_smoke/make_data.py OUT`.

Pictures of one to four shapes of one kind and colour, each with a question that only the picture answers. Writes
`pictures/*.png`, `train.jsonl` and `heldout.jsonl`, and the same questions without pictures in `text_only/`.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

SIDE = 96  # pixels
CELL = SIDE // 2  # one shape at most in each quarter
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220), "yellow": (235, 205, 50)}
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = (1, 2, 3, 4)
QUESTION = "What is in the picture?"
BACKGROUND = (245, 245, 245)


def draw(shape: str, colour: str, count: int, rng: Random) -> Any:
    """A PIL image of `count` shapes in different quarters, of sizes and at places that vary."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    for quarter in rng.sample(range(4), count):
        size = rng.randint(28, 40)
        x = quarter % 2 * CELL + rng.randint(2, CELL - size - 2)
        y = quarter // 2 * CELL + rng.randint(2, CELL - size - 2)
        box = (x, y, x + size, y + size)
        third = size // 3
        match shape:
            case "circle":
                pen.ellipse(box, fill)
            case "square":
                pen.rectangle(box, fill)
            case "triangle":
                pen.polygon([(x, y + size), (x + size, y + size), (x + size / 2, y)], fill)
            case "cross":
                pen.rectangle((x + third, y, x + size - third, y + size), fill)
                pen.rectangle((x, y + third, x + size, y + size - third), fill)
    return image


def answer(shape: str, colour: str, count: int) -> str:
    """What is in the picture: `3 red circles`."""
    many = {"cross": "crosses"}.get(shape, f"{shape}s")
    return f"{count} {colour} {shape if count == 1 else many}"


def make_data(folder: Path, *, train: int, heldout: int, seed: int = 0) -> None:
    """Writes so many rows of each side; no picture is on both."""
    rng, number = Random(seed), 0
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "text_only").mkdir(exist_ok=True)
    for side, count in (("train", train), ("heldout", heldout)):
        rows: dict[str, list[dict[str, Any]]] = {"": [], "text_only": []}
        for shape, colour, shapes in islice(_kinds(rng), count):
            name = f"pictures/{number:05}.png"
            draw(shape, colour, shapes, rng).save(folder / name)
            number += 1
            question = {"type": "text", "text": QUESTION}
            said = {"role": "assistant", "content": answer(shape, colour, shapes)}
            picture = {"type": "image", "path": name}
            rows[""].append({"messages": [{"role": "user", "content": [picture, question]}, said]})
            rows["text_only"].append({"messages": [{"role": "user", "content": QUESTION}, said]})
        for where, own in rows.items():
            text = "".join(json.dumps(row) + "\n" for row in own)
            (folder / where / f"{side}.jsonl").write_text(text, encoding="utf-8")


def _kinds(rng: Random) -> Any:
    """Shape, colour and count, every combination as often as the others."""
    every = [(shape, colour, count) for shape in SHAPES for colour in COLOURS for count in COUNTS]
    while True:
        yield from rng.sample(every, len(every))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, default=2048)
    parser.add_argument("--heldout", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_data(args.out, train=args.train, heldout=args.heldout, seed=args.seed)
    print(f"{args.out}: {args.train} rows to train on, {args.heldout} held out")


if __name__ == "__main__":
    main()
