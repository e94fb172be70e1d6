"""Does the model see? `python experiments/pictures_smoke/run.py OUT`.

Trains the tiny base on pictures, and its twin on the same questions without them; asks both, and the base, about the
held-out rows; writes `record.json` and prints a table. Under five CPU minutes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.pictures_smoke.make_base import ARCHITECTURE, make_base
from experiments.pictures_smoke.make_data import make_data
from gemma4_tpu import Gemma4, api
from gemma4_tpu.markdown import table

SETTINGS = {
    "data": "chat_jsonl", "data.sequence_length": 200, "lora.rank": 16, "lora.alpha": 32,
    "optimizer.learning_rate": 4e-3, "optimizer.warmup_updates": 20, "optimizer.weight_decay": 0.0,
    "trainer.global_batch_sequences": 8, "trainer.eval_every": 0, "trainer.sample_prompts": 0, "checkpoint.every": 1000,
}  # fmt: skip
WHOLE = ["embeddings", "norms", "per_layer_projections"]
"""Nobody has trained this base: what a released one knows is here learnt along with the adapters."""
PARTS = ("count", "colour", "shape")


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out rows answered right, of so many."""

    rows: int
    exact: float
    count: float
    colour: float
    shape: float


def run(out: Path, *, train: int, heldout: int, updates: int) -> dict[str, Any]:
    """Makes base and rows, trains both, and asks; returns what `record.json` holds."""
    import torch

    torch.set_num_threads(1)  # the tower is so small that threads would only wait for each other
    base, data = make_base(out / "base"), out / "data"
    make_data(data, train=train, heldout=heldout)
    trained = {
        "pictures": _train(
            base,
            data,
            out / "pictures",
            updates,
            {"data.image_cache": out / "cache", "lora.modules_to_train": [*WHOLE, "projector"]},
        ),
        # Rows of text hold three times as many questions, so that both see each of them as often.
        "text only": _train(
            base, data / "text_only", out / "text_only", updates // 3, {"lora.modules_to_train": WHOLE}
        ),
    }
    seeing = trained["pictures"]["folder"]
    found = {
        "before": _ask(Gemma4.load(seeing, adapters=False), data),
        "pictures": _ask(Gemma4.load(seeing), data),
        "text only": _ask(Gemma4.load(trained["text only"]["folder"]), data / "text_only"),
    }
    losses = {name: values["heldout_loss_last"] for name, values in trained.items()}
    losses["before"] = trained["pictures"]["heldout_loss_first"]
    results = {"updates": updates, "train": train, "heldout_loss": losses,
               "accuracy": {name: asdict(accuracy) for name, accuracy in found.items()}}  # fmt: skip
    (out / "record.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _train(base: Path, data: Path, folder: Path, updates: int, more: dict[str, Any]) -> dict[str, Any]:
    done = api.train(
        SETTINGS | more | {
            "model": ARCHITECTURE, "model.path": base, "data.train": data / "train.jsonl",
            "data.heldout": data / "heldout.jsonl", "trainer.max_updates": updates, "run_dir": folder,
        }
    )  # fmt: skip
    return {**done.values, "folder": done.folder}


def _ask(model: Gemma4, data: Path) -> Accuracy:
    rows = [json.loads(line)["messages"] for line in (data / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    for question, _ in rows:
        for part in question["content"] if isinstance(question["content"], list) else []:
            if part["type"] == "image":
                part["path"] = str((data / part["path"]).absolute())
    said = model.generate([[question] for question, _ in rows], max_new_tokens=16)
    wanted = [answer["content"].split() for _, answer in rows]
    right = [
        [a == b for a, b in zip([*answer.split(), "", "", ""], right, strict=False)]
        for answer, right in zip(said, wanted, strict=True)
    ]
    exact = sum(answer.strip() == " ".join(words) for answer, words in zip(said, wanted, strict=True))
    shares = [sum(row[part] for row in right) / len(rows) for part in range(len(PARTS))]
    return Accuracy(len(rows), exact / len(rows), *shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, default=1024)
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--updates", type=int, default=250)
    args = parser.parse_args()
    results = run(args.out, train=args.train, heldout=args.heldout, updates=args.updates)
    lines = [
        [name, f"{results['heldout_loss'][name]:.3f}", *(f"{found[part]:.0%}" for part in ("exact", *PARTS))]
        for name, found in results["accuracy"].items()
    ]
    print("\n".join(table(["", "held-out loss", "exact", *PARTS], lines)))


if __name__ == "__main__":
    main()
