"""Renders chat templates in a separate process: they come with a checkpoint, and can loop or exhaust memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma4_tpu.serving.local_process import CPU_SECONDS, LimitedProcess, Worker


class TemplateProcess:
    """Renders one template; every method can be called from any thread."""

    def __init__(self, template: str, tokens: Mapping[str, str], *, cpu_seconds: float = CPU_SECONDS):
        """Prepares a process for a template.

        Args:
          template: the tokenizer's.
          tokens: special tokens by their names in templates, such as `bos_token`.
          cpu_seconds: limit per conversation.
        """
        about = {"template": template, "tokens": dict(tokens)}
        self._process = LimitedProcess(__name__, about, cpu_seconds=cpu_seconds)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        options: Mapping[str, Any],
        *,
        characters: int,
    ) -> str:
        """The conversation as a text of at most `characters`.

        Raises:
          WorkRefused: the template refuses it, or takes too much time, memory or space.
        """
        asked = {"messages": messages, "tools": tools, "options": options, "characters": characters}
        return str(self._process.ask(asked)["text"])

    def close(self) -> None:
        """Ends the process, whatever it is doing; waiting callers get a refusal."""
        self._process.close()


def worker(about: Mapping[str, Any]) -> Worker:
    """The process's task: `TemplateProcess.render`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(asked: Mapping[str, Any]) -> dict[str, Any]:
        options = {"chat_template": about["template"], **about["tokens"], **asked["options"]}
        text = render_jinja_template([asked["messages"]], tools=asked["tools"] or None, **options)[0][0]
        if len(text) > asked["characters"]:
            return {"refused": f"its text has {len(text)} characters"}
        return {"text": text}

    return render
