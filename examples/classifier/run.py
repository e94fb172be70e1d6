"""A classifier that answers with its label: `python -m examples.classifier.run`."""

from __future__ import annotations

from examples.classifier.make_data import make_rows, write
from gemma4_tpu import Gemma4, api

MODEL, SIZE = "embedded:tiny", "tiny"  # on a TPU VM: the folder of a checkpoint, and its size, such as gemma4_e4b
HELDOUT = 24


def accuracy(model: Gemma4, rows: list[dict[str, str]]) -> float:
    """The share of rows whose answer is the label, to the letter."""
    answers = model.generate([row["prompt"] for row in rows], max_new_tokens=8)
    return sum(a.strip() == row["completion"] for a, row in zip(answers, rows, strict=True)) / len(rows)


def main() -> None:
    """Trains, then measures the base and the tuned model on tickets that neither has seen."""
    rows = make_rows()
    trained = api.train(
        {
            "model": SIZE,
            "model.path": MODEL,
            "data": "chat_jsonl",
            "data.train": [write(rows[HELDOUT:], "tickets.jsonl")],
            "data.sequence_length": 128,
            "trainer.max_updates": 80,
            "trainer.global_batch_sequences": 4,
            "optimizer.learning_rate": 1e-2,
        }
    )
    for name, adapters in (("base", False), ("tuned", True)):
        found = accuracy(Gemma4.load(trained.folder, adapters=adapters), rows[:HELDOUT])
        print(f"{name}: {found:.2f} of {HELDOUT} held-out tickets")


if __name__ == "__main__":
    main()
