"""Chooses the held-out rows when no held-out source is given: a share of the training rows, by content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from gemma4_tpu.data.forms import Conversation, Pair, Said

logger = logging.getLogger(__name__)


class Identity(NamedTuple):
    """Identifies a row by its content: two 64-bit hashes."""

    prompt: int
    """Hash of everything before the first answer, or of the whole row if nothing precedes it."""
    whole: int


def identity(said: Said) -> Identity:
    """Identity of a row, computed from its normal form alone: template, tokenizer and input form do not affect it.

    Raises:
      UnicodeEncodeError: a text contains half of a surrogate pair.
    """
    if isinstance(said, Pair):
        sides = [identity(side) for side in said.sides.values()]
        return Identity(sides[0].prompt, _hash(b"%d %d" % (sides[0].whole, sides[1].whole)))
    conversation: Conversation = said
    turns = conversation.messages
    first = next((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), 0)
    prompt = _canonical(turns[:first])
    whole = _hash(prompt + _canonical([turns[first:], conversation.tools, conversation.text]))
    return Identity(_hash(prompt) if first else whole, whole)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def set_aside(rows: Sequence[Identity], fraction: float) -> list[bool]:
    """Selects the held-out rows, independently of the order of the rows.

    Rows with the same first prompt stay on the same side, which their hash decides. At least one row is held out, and
    at most half of the rows that share a prompt are. If that is impossible because all rows begin alike, whole
    conversations are hashed instead; if those are identical too, rows are split individually. A single row is trained
    on.
    """
    if len(rows) < 2 or not fraction:
        if fraction:
            logger.warning(
                "data.heldout_fraction=%g: there is only one row, which is trained on; nothing is held out", fraction
            )
        return [False] * len(rows)
    ways = (
        ([row.prompt for row in rows], ""),
        ([row.whole for row in rows], "all rows begin alike, so rows with the same prompt are on both sides"),
        ([_hash(b"%d %d" % (row.whole, number)) for number, row in enumerate(rows)], "the same row is on both sides"),
    )
    for keys, warning in ways:
        chosen = _chosen_keys(Counter(keys), fraction)
        if chosen:
            if warning:
                logger.warning("data.heldout_fraction=%g: %s", fraction, warning)
            return [key in chosen for key in keys]
    raise AssertionError("the last resort gives each row its own key")


def _chosen_keys(counts: Counter[int], fraction: float) -> set[int]:
    """Keys whose rows are held out; empty if no choice of keys works."""
    half = counts.total() // 2
    fitting = sorted(key for key, count in counts.items() if count <= half)
    # Hashes are uniform over 64 bits, so a threshold at a fraction of the range selects about that fraction of the
    # rows, and a row keeps its side when others are added. If no hash falls below the threshold, the smallest one is
    # taken.
    below = [key for key in fitting if key < fraction * 2**64] or fitting[:1]
    # Something must be left to train on.
    return set(below[:-1] if len(below) == len(counts) else below)
