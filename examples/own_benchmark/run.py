"""A custom benchmark, scored by exact match with an interval: `python -m examples.own_benchmark.run`."""

from __future__ import annotations

from examples.classifier.make_data import write
from examples.own_benchmark.make_data import make_problems
from gemma4_tpu import Gemma4, api
from gemma4_tpu.evals.passk import score

MODEL, SIZE = "embedded:tiny", "tiny"  # on a TPU VM: the folder of a checkpoint, and its size, such as gemma4_e4b
HELDOUT = 60


def passes(model: Gemma4, problems: list[dict[str, str]]) -> list[tuple[int, int]]:
    """(samples, right ones) of each problem; one sample, the likeliest answer."""
    answers = model.generate([problem["prompt"] for problem in problems], max_new_tokens=12)
    return [(1, int(a.strip() == p["completion"])) for a, p in zip(answers, problems, strict=True)]


def main() -> None:
    """Trains, then scores the base and the tuned model on the same problems that neither has seen."""
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
    for name, adapters in (("base", False), ("tuned", True)):
        found = score(passes(Gemma4.load(trained.folder, adapters=adapters), problems[:HELDOUT]), 1)
        print(f"{name}: exact match {found}")


if __name__ == "__main__":
    main()
