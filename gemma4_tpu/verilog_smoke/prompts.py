"""Text made from a design: the specification a chat user would give, its answer, and plain documents for the base."""

from __future__ import annotations

from random import Random

from gemma4_tpu.verilog_smoke.design import MODULE_NAME, Design

PREAMBLES = (
    f"Please write a Verilog module named {MODULE_NAME} with this interface. Ports without a width have one bit.",
    f"Implement the module {MODULE_NAME}. Its ports, one bit wide unless stated, are:",
    f"I need a Verilog module called {MODULE_NAME} with the following ports (one bit each unless given):",
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
    """A source file as the base model reads it: a terse comment, perhaps, and a module; no specification, no chat."""
    comment = f"// {design.summary}\n" if rng.random() < 0.8 else ""
    return comment + design.module(rng.choice(DOCUMENT_NAMES))
