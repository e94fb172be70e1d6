"""Chat templates, rendered in a process of their own: they come with a checkpoint, and may loop or fill the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma4_tpu.serving.local_process import CPU_SECONDS, LimitedProcess, Worker


class TemplateProcess:
    """Renders one template; every method may be called from any thread."""

    def __init__(self, template: str, tokens: Mapping[str, str], *, cpu_seconds: float = CPU_SECONDS):
        """Args:
        template: as the tokenizer has it.
        tokens: special tokens by their names in templates, such as `bos_token`.
        cpu_seconds: of one conversation at most.
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
        """The conversation as a text of `characters` at most.

        Raises:
          WorkRefused: the template doesn't take it, or takes too much time, memory or room.
        """
        asked = {"messages": messages, "tools": tools, "options": options, "characters": characters}
        return str(self._process.ask(asked)["text"])

    def close(self) -> None:
        """Ends the process, whatever it does; who waits for it hears that it is refused."""
        self._process.close()


def worker(about: Mapping[str, Any]) -> Worker:
    """What the process does: `TemplateProcess.render`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(asked: Mapping[str, Any]) -> dict[str, Any]:
        options = {"chat_template": about["template"], **about["tokens"], **asked["options"]}
        text = render_jinja_template([asked["messages"]], tools=asked["tools"] or None, **options)[0][0]
        if len(text) > asked["characters"]:
            return {"refused": f"its text has {len(text)} characters"}
        return {"text": text}

    return render
