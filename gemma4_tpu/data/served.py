"""What servers that use a chat template may render differently from a training run, as far as the template shows it."""

from __future__ import annotations

from typing import Any

from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.tokenizer import apply_template


def differences_of_servers(tokenizer: Any, thinking: bool, bos_added: bool) -> list[str]:
    """Warnings about prompts that differ from those that are trained on.

    Args:
      tokenizer: holds the template.
      thinking: the run tells the template that thinking is on, which every server must be told; otherwise it tells it
        that thinking is off, which servers leave out.
      bos_added: examples begin with a BOS token that the template does not write.
    """
    found = []
    if bos_added:
        found.append(
            "the chat template writes no BOS token: examples begin with one, but servers that send the template's text "
            "unchanged (vLLM's chat endpoint) do not; put {{ bos_token }} at the start of the template"
        )
    if not thinking and _question(tokenizer) != _question(tokenizer, enable_thinking=False):
        found.append(
            "the chat template's prompt differs without enable_thinking=false, with which this run trains: send "
            '"chat_template_kwargs": {"enable_thinking": false} with every request, or make it the default'
        )
    if "strftime_now" in str(tokenizer.chat_template):
        found.append(
            "the chat template writes the time (strftime_now): servers send another prompt on another day, and a run "
            "that is resumed then is refused; write a fixed date into the template"
        )
    return found


def _question(tokenizer: Any, **options: Any) -> str:
    """The template's prompt for a question under these options alone; its refusal, if it refuses them."""
    try:
        return apply_template(
            tokenizer, [{"role": "user", "content": "x"}], add_generation_prompt=True, tools=None, **options
        )
    except RowDropped as problem:
        return str(problem)
