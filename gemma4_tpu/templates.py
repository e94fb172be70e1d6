"""Google's chat templates of Gemma 4, told apart by their hash. No JAX."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from gemma4_tpu import assets

if TYPE_CHECKING:
    from jinja2 import Environment

_LARGE, _SMALL = "31B, 26B-A4B and 12B", "E4B and E2B"
_REVISIONS = {  # sha256 → (day of publication, sizes)
    "85a08664d16d8f3be4416c92427b3ac10df1024ac566cc0b4bc3bab409393f98": ("2026-04-13", _LARGE),
    "94899c0f917d93f6fe81c95744d1e8ddab2d21d39228d2e4aec1fb2a25bff413": ("2026-04-29", _LARGE),
    "df269903ea2e27a6426bf65f34f530a571cc04bf9b92ad8928ffa909eb46ecc5": ("2026-07-09", _LARGE),
    "93a71eb61044635cf7b1594b9b52b560e784505556b779cbf94b1da5d5d92905": ("2026-04-13", _SMALL),
    "33204f1acb5bd0002713e16a593847f24ceeafe711ed88bda2a352dc996a3373": ("2026-04-29", _SMALL),
    "3beb16a140a78c7bf71cd86609f58e56f1594e670e95fe58bd6022f941d1cb1e": ("2026-07-09", _SMALL),
}

_GIVEN = {
    "messages", "tools", "documents", "raise_exception", "strftime_now",
    "chat_template", "conversations", "return_assistant_tokens_mask", "continue_final_message",
}  # fmt: skip
"""By the server or by transformers, whose own arguments the last line has."""


def sha256(text: str) -> str:
    """Of a template."""
    return hashlib.sha256(text.encode()).hexdigest()


def revision(text: str) -> str | None:
    """Which template this is, in words; None: one of none of the known revisions.

    White space at the end does not count: some tools that save a tokenizer drop it.
    """
    if text.rstrip() == (assets.ROOT / "tiny" / "chat_template.jinja").read_text(encoding="utf-8").rstrip():
        return "the embedded tiny model's"
    for end in ("", "\n"):
        if found := _REVISIONS.get(sha256(text.rstrip() + end)):
            day, sizes = found
            return f"Google's of {day} for {sizes}"
    return None


def arguments(text: str) -> frozenset[str]:
    """Names that a template (without a mistake in it) expects from outside besides what every server gives: messages,
    tools and documents, special tokens, functions.
    """
    from jinja2 import nodes
    from jinja2.meta import find_undeclared_variables
    from jinja2.visitor import NodeVisitor

    first: dict[str, str] = {}

    class FirstUse(NodeVisitor):
        """What is written before it is read is the template's own, though jinja2 counts what one branch writes."""

        def visit_Name(self, node: nodes.Name) -> None:
            first.setdefault(node.name, node.ctx)

        def visit_Assign(self, node: nodes.Assign) -> None:
            self.visit(node.node)
            self.visit(node.target)

    environment = _environment()
    parsed = environment.parse(text)
    FirstUse().visit(parsed)
    found = find_undeclared_variables(parsed) - environment.globals.keys() - _GIVEN
    return frozenset(name for name in found if first[name] != "store" and not name.endswith("_token"))


def syntax_problem(text: str) -> str | None:
    """Why a template is none that transformers can read; None: it can. What it does shows when examples are made."""
    from jinja2 import TemplateSyntaxError

    try:
        _environment().parse(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "nested too deeply"
    return None


def _environment() -> Environment:
    """jinja2's, with what transformers adds to the language."""
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.parser import Parser

    class Generation(Extension):
        """transformers' mark around what a model says."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Environment(extensions=[Generation, LoopControlExtension])
