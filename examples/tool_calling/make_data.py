"""Questions about the weather and the time in cities, and the call that each of them needs."""

from __future__ import annotations

import itertools
import random
from typing import Any

CITIES = ["Oslo", "Rome", "Lima", "Cairo", "Paris", "Tokyo", "Delhi", "Quito", "Bern", "Riga", "Doha", "Seoul"]
ASKED = {
    "get_weather": ["Is it cold in {}?", "Will it rain in {}?", "How is the weather in {}?"],
    "get_time": ["How late is it in {}?", "What time is it in {}?", "Is it night in {}?"],
}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"{name} of a city", "parameters": PLACE}}
    for name in ASKED
]


def make_rows(seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of a question and a call, with the tools that there are; in random order."""
    rows = []
    for name, questions in ASKED.items():
        for question, city in itertools.product(questions, CITIES):
            call = {"type": "function", "function": {"name": name, "arguments": {"city": city}}}
            asked = {"role": "user", "content": question.format(city)}
            rows.append({"messages": [asked, {"role": "assistant", "tool_calls": [call]}], "tools": TOOLS})
    random.Random(seed).shuffle(rows)
    return rows
