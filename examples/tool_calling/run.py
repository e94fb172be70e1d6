"""A model that calls the right tool with the right arguments: `python -m examples.tool_calling.run`."""

from __future__ import annotations

import re
from typing import Any

from examples.classifier.make_data import write
from examples.tool_calling.make_data import TOOLS, make_rows
from gemma4_tpu import Gemma4, api
from gemma4_tpu.data.calls import read_call

MODEL, SIZE = "embedded:tiny", "tiny"  # on a TPU VM: the folder of a checkpoint, and its size, such as gemma4_e4b
HELDOUT = 16


def right(answer: str, row: dict[str, Any]) -> bool:
    """Whether the answer holds the one call of the row, name and arguments."""
    (wanted,) = row["messages"][1]["tool_calls"]
    try:
        (call,) = (read_call(written) for written in re.findall(r"<\|tool_call>(.*?)<tool_call\|>", answer, re.S))
    except ValueError:
        return False
    return call == (wanted["function"]["name"], wanted["function"]["arguments"])


def main() -> None:
    """Trains, then counts right calls of the base and the tuned model for questions that neither has seen."""
    rows = make_rows()
    trained = api.train(
        {
            "model": SIZE,
            "model.path": MODEL,
            "data": "chat_jsonl",
            "data.train": [write(rows[HELDOUT:], "calls.jsonl")],
            "data.sequence_length": 320,
            "trainer.max_updates": 180,
            "trainer.global_batch_sequences": 4,
            "optimizer.learning_rate": 1e-2,
        }
    )
    asked = [row["messages"][:1] for row in rows[:HELDOUT]]
    for name, adapters in (("base", False), ("tuned", True)):
        answers = Gemma4.load(trained.folder, adapters=adapters).generate(
            asked, tools=TOOLS, whole=True, max_new_tokens=48
        )
        found = sum(map(right, answers, rows))
        print(f"{name}: {found} of {HELDOUT} calls are right")


if __name__ == "__main__":
    main()
