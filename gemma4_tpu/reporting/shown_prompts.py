"""What an on-policy run would ask: prompts as the policy reads them, their lengths, how many are set aside."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.text import Text

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.config.schema import DataConfig, ModelConfig
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.models.base import resolve_base
from gemma4_tpu.reporting.preview import ROWS_SHOWN, histogram, rendered


def show_prompts(model: ModelConfig, data: DataConfig, rows_are: str, rollouts: RolloutsConfig) -> int:
    """Builds a training configuration's prompts and shows some.

    Args:
      model: names the tokenizer.
      data: sources, form and policies.
      rows_are: the kind of rows (`forms.py`).
      rollouts: what is asked, and how often.

    Returns:
      The exit code, 0.

    Raises:
      UserError: no base model or tokenizer, unreadable rows or problems, or not a single prompt.
    """
    from gemma4_tpu.rollouts.policy_tasks import asked

    base = resolve_base(model)
    tokenizer = load_tokenizer(base.tokenizer_folder, base.new_tokens)
    data = replace(data, max_drop_fraction=1.0)
    rows = build_data(data, tokenizer, rows_are)
    tasks, validated_on = asked(rollouts, data, rows.train, tokenizer)
    console = Console(highlight=False)
    console.print(Text(f"{len(tasks)} prompts; answers to each are drawn from the policy\n", "bold"))
    for index in np.linspace(0, len(tasks) - 1, min(ROWS_SHOWN, len(tasks)), dtype=int).tolist():
        task = tasks[index]
        console.print(Text(f"── {task.name} · {len(task.ids)} tokens", "bold"), soft_wrap=True)
        console.print(rendered(task.ids, np.zeros(len(task.ids), bool), tokenizer, colour=False), soft_wrap=True)
        console.print(Text("reference, which the policy does not see:", "bold"))
        reference = np.array(tokenizer(task.reference, add_special_tokens=False)["input_ids"], np.int32)
        console.print(rendered(reference, np.zeros(len(reference), bool), tokenizer, colour=False), soft_wrap=True)
    console.print(Text("── lengths of the prompts in tokens", "bold"))
    lengths = np.array([len(task.ids) for task in tasks])
    console.print(Text(histogram(lengths, rollouts.prompt_tokens)), soft_wrap=True)
    updates = math.ceil(len(tasks) / rollouts.prompts)
    console.print(
        f"one pass: {updates} updates of {rollouts.prompts} prompts × {rollouts.samples} answers of at most"
        f" {rollouts.new_tokens} tokens; set aside for validation: {len(validated_on)} prompts; reward:"
        f" {rollouts.reward or 'none'}",
        soft_wrap=True,
    )
    return 0
