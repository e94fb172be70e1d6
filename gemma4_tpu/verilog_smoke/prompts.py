"""Text made from a design: the specification a chat user would give, its answer, and plain documents for the base."""

from __future__ import annotations

from random import Random

from gemma4_tpu.verilog_smoke.design import MODULE_NAME, Design

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


def document(design: Design, rng: Random) -> str:
    """A source file as the base model reads it: comments on ports and behaviour, perhaps, and a module. No chat."""
    notes = []
    if rng.random() < 0.6:
        notes.append(
            "\n".join(
                f"{port.name}: {'output' if port.output else 'input'}"
                + (f", {port.width} bits" if port.width > 1 else "")
                for port in design.ports
            )
        )
    if rng.random() < 0.8:
        notes.append(rng.choice((design.summary, *design.behaviours)))
    rng.shuffle(notes)
    comment = "".join(f"// {line}\n" for note in notes for line in note.splitlines() if line)
    return comment + design.module(rng.choice(DOCUMENT_NAMES))
