"""What a run has spent, in passes over a token: 1 to read, draw or score one, 3 to train on it (forward and backward).

Counted from what runs leave behind, without padding and idle slots, and without checks that are not part of learning
(validation, sampler against trainer).
"""

from __future__ import annotations

import json
from pathlib import Path

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.data.chat import ChatFormat
from gemma4_tpu.evals.any_model import find_model
from gemma4_tpu.rollouts.policy_tasks import of_problems
from gemma4_tpu.tracking.metrics import read_metrics

TRAINED = 3


def passes(run: Path, problems: Path) -> int:
    """Passes over a token of a whole run; `problems` are those that it was asked, if any."""
    trained = sum(row.get("real_tokens", 0) for row in read_metrics(run / "metrics.jsonl"))
    stored = sorted(run.glob("rollouts/*[0-9].samples.jsonl"))
    if not stored:
        return TRAINED * trained
    config = RolloutsConfig(problems_path=str(problems))
    tasks = of_problems(config, ChatFormat(find_model(str(run)).tokenizer))
    prompt = {task.name: len(task.ids) for task in tasks}
    drawn = read = 0
    for path in stored:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        drawn += sum(len(row["ids"]) for row in rows)
        read += sum(prompt[name] for name in {row["problem"] for row in rows})
    return read + drawn + (TRAINED + 1) * trained  # and once more, for how far it moved
