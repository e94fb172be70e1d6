"""Tickets and their labels: sentences put together at random, without repeats, so that what is held out is new."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

THINGS = ["the export", "my login", "the search", "a report", "the upload", "the calendar", "our invoice", "the app"]
SENTENCES = {
    "bug": ["{} crashes again", "{} shows an error", "{} is broken", "{} stopped working", "{} fails every time"],
    "feature": ["please add {}", "we would like {}", "could you build {}", "it would help to have {}", "we miss {}"],
    "question": ["how do I use {}", "where do I find {}", "what does {} cost", "who can see {}", "when is {} ready"],
}


def make_rows(seed: int = 0) -> list[dict[str, str]]:
    """Rows with `prompt` and `completion`, in random order."""
    rows = [
        {"prompt": f"Ticket: {sentence.format(thing)}", "completion": label}
        for label, sentences in SENTENCES.items()
        for sentence, thing in itertools.product(sentences, THINGS)
    ]
    random.Random(seed).shuffle(rows)
    return rows


def write(rows: list[dict[str, str]], path: str) -> str:
    """As JSON lines; returns the path."""
    Path(path).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
