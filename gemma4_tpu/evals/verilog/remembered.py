"""Remembers what benches did, by the responses they were given."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from gemma4_tpu.evals.verilog.running import Finished
from gemma4_tpu.evals.verilog.stage import Stage

MOST_REMEMBERED = 2048
LONGEST_REMEMBERED = 4096
"""Longest output of a bench to remember, in characters: 8 MiB in all."""


class Remembered:
    """The latest results of benches that gave their first stimulus again for some responses.

    Designs for a problem often respond alike, and a bench with the same responses does the same.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, bytes], Finished] = OrderedDict()

    def get(self, stage: Stage, responses: str) -> Finished | None:
        """The bench's result, if remembered."""
        key = self._key(stage, responses)
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def put(self, stage: Stage, responses: str, done: Finished) -> None:
        """Remembers a result, unless its output is long."""
        if len(done.stdout) + len(done.stderr) > LONGEST_REMEMBERED:
            return
        self._known[self._key(stage, responses)] = done
        if len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)

    def _key(self, stage: Stage, responses: str) -> tuple[str, bytes]:
        return stage.result_marker, hashlib.sha256(responses.encode()).digest()
