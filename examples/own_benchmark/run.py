"""A custom benchmark, scored by accuracy with an interval: `python -m examples.own_benchmark.run`."""

from __future__ import annotations

from examples.classifier.make_data import write
from examples.own_benchmark.make_data import make_problems
from gemma4_tpu import api

MODEL, SIZE = "embedded:tiny", "tiny"  # on a TPU VM: the folder of a checkpoint, and its size, such as gemma4_e4b
HELDOUT = 60


def main() -> None:
    """Trains, then scores the tuned model and its base on the same problems that neither has seen."""
    problems = make_problems()
    trained = api.train(
        {
            "model": SIZE,
            "model.path": MODEL,
            "data": "chat_jsonl",
            "data.train": [write(problems[HELDOUT:], "problems.jsonl")],
            "data.sequence_length": 256,
            "trainer.max_updates": 100,
            "trainer.global_batch_sequences": 4,
            "optimizer.learning_rate": 1e-2,
        }
    )
    heldout = {"eval.problems_path": write(problems[:HELDOUT], "heldout.jsonl"), "eval.max_new_tokens": 12}
    api.evaluate("eval=accuracy", "eval.adapter=both", f"run={trained.folder}", heldout)


if __name__ == "__main__":
    main()
