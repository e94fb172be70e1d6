"""Text made from a design: the specification a chat user would give, its answer, and plain documents for the base."""

from __future__ import annotations

from random import Random

from experiments.verilog_smoke.design import MODULE_NAME, Design

PREAMBLES = (
    f"Write a Verilog module named {MODULE_NAME} with these ports:",
    f"Implement the module {MODULE_NAME} with this interface:",
    f"I need a module called {MODULE_NAME}. Its ports are:",
)
DOCUMENT_NAMES = ("unit", "block", "core", "part", "logic_cell", "stage")


def specification(design: Design, rng: Random) -> str:
    """A prompt in the benchmarks' style: interface as a list, then the behaviour in one of its phrasings."""
    interface = "\n".join(
        f" - {'output' if port.output else 'input'} {port.name}" + (f" ({port.width} bits)" if port.width > 1 else "")
        for port in design.ports
    )
    return f"{rng.choice(PREAMBLES)}\n\n{interface}\n\n{rng.choice(design.behaviours)}\n"


def answer(design: Design) -> str:
    """The canonical answer: one fenced module."""
    return f"```verilog\n{design.module()}```"


def chat_row(row_id: str, prompt: str, reply: str) -> dict:
    """A row of chat data."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {"id": row_id, "messages": messages}


def explanation(design: Design, rng: Random) -> list[dict[str, str]]:
    """A conversation the other way round, module in and specification out: chat markup and the words of prompts."""
    return chat_row("", answer(design), specification(design, rng))["messages"]


def document(design: Design, rng: Random, *, ports: float = 0.6, behaviour: float = 0.8) -> str:
    """A source file as the base model reads it: perhaps comments, and a module. No chat.

    Args:
      design: what the file implements.
      rng: draws wording and order.
      ports: share of files with a comment on their ports.
      behaviour: share of files with a comment on what they do.
    """
    notes = []
    if rng.random() < ports:
        notes.append(
            "\n".join(
                f"{port.name}: {'output' if port.output else 'input'}"
                + (f", {port.width} bits" if port.width > 1 else "")
                for port in design.ports
            )
        )
    if rng.random() < behaviour:
        notes.append(rng.choice((design.summary, *design.behaviours)))
    rng.shuffle(notes)
    comment = "".join(f"// {line}\n" for note in notes for line in note.splitlines() if line)
    return comment + design.module(rng.choice(DOCUMENT_NAMES))
