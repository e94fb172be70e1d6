"""Which rows are held out where no held-out source is given: a share of the training rows, by what they say."""

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
    """What a row is told apart by: 64 bits of a hash each."""

    prompt: int
    """Of everything before the first answer (of the whole where nothing is)."""
    whole: int


def identity(said: Said) -> Identity:
    """Follows from the normal form alone: neither template nor tokenizer nor the form of the row matter.

    Raises:
      UnicodeEncodeError: a text holds half of a surrogate pair.
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
    """Which of the rows are held out, in any order of the rows the same ones.

    Rows with the same first prompt stay together, and what they are decides on their side; at least one row is held
    out, at most half of them share a prompt. Where that can't be (all rows begin alike), whole conversations stay
    together; where all are the same, single rows are told apart. A row that is alone is trained on.
    """
    if len(rows) < 2 or not fraction:
        if fraction:
            logger.warning("data.heldout_fraction=%g: a single row can't be divided; it is trained on", fraction)
        return [False] * len(rows)
    ways = (
        ([row.prompt for row in rows], ""),
        ([row.whole for row in rows], "rows that begin with the same prompt are on both sides: most begin alike"),
        ([_hash(b"%d %d" % (row.whole, number)) for number, row in enumerate(rows)], "the same row is on both sides"),
    )
    for keys, warning in ways:
        chosen = _chosen_keys(Counter(keys), fraction)
        if chosen:
            if warning:
                logger.warning("data.heldout_fraction=%g: %s", fraction, warning)
            return [key in chosen for key in keys]
    raise AssertionError("the last way gives each row a key of its own")


def _chosen_keys(counts: Counter[int], fraction: float) -> set[int]:
    """The keys whose rows are held out; empty: no key will do."""
    half = counts.total() // 2
    fitting = sorted(key for key, count in counts.items() if count <= half)
    # Hashes are uniform in 64 bits, so those below a share of their range are about that share of the rows, and a row's
    # side stays what it is when others are added. Where chance puts none there, the smallest hash goes.
    below = [key for key in fitting if key < fraction * 2**64] or fitting[:1]
    # Something has to be left to train on.
    return set(below[:-1] if len(below) == len(counts) else below)
