"""Stores roll-outs on disk, one update at a time: samples and verdicts, each written as it arrives.

```
rollouts/<update>.samples.jsonl    {"problem", "sample", "seed", "adapter", "ids", "logprobs", "stopped"}
rollouts/<update>.verdicts.jsonl   {"problem", "sample", "reward", "kind", "detail", "well_formed"}
```

For validation prompts, the files are `<update>.validation_samples.jsonl` and `<update>.validation_verdicts.jsonl`, from
the policy after that update.

`logprobs` are float32 bits (base64, little-endian), so that a resumed run trains on exactly the same numbers. A verdict
is never requested twice: a judge can be slow, expensive, or inconsistent.
"""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_tpu.evals.store import Key, Rows
from gemma4_tpu.rollouts.rewarding import Rewarded
from gemma4_tpu.rollouts.sampler import Drawn, Wanted

log = logging.getLogger(__name__)

FOLDER = "rollouts"
_BITS = np.dtype("<f4")


class StoredUpdate:
    """The roll-outs of one update; a context manager."""

    def __init__(self, run: Path, update: int, adapter: str, prefix: str = ""):
        """Opens what an earlier start left of this update, provided that it was drawn from the same policy.

        Args:
          run: the run folder.
          update: from 1.
          adapter: digest of the policy's trained values.
          prefix: part of the file names after the update: `validation_` for answers that are not trained on.
        """
        folder = run / FOLDER
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{update:06}.{prefix}{name}.jsonl" for name in ("samples", "verdicts")]
        self.adapter = adapter
        """Digest of the policy."""
        self._samples, self._verdicts = (Rows(path) for path in paths)
        if any(row.get("adapter") != adapter for row in self._samples.rows.values()):
            log.warning("%s: drawn from another policy than this start's; drawn and judged again", paths[0].name)
            self.close()
            for path in paths:
                path.unlink()
            self._samples, self._verdicts = (Rows(path) for path in paths)

    def drawn(self, key: Key, wanted: Wanted) -> Drawn | None:
        """The stored sample (problem's name, number), if any."""
        row = self._samples.rows.get(key)
        if row is None:
            return None
        bits = np.frombuffer(base64.b64decode(row["logprobs"]), _BITS).astype(np.float32)
        return Drawn(wanted, np.array(row["ids"], np.int32), bits, row["stopped"])

    def add_drawn(self, key: Key, drawn: Drawn) -> None:
        """Stores a sample."""
        bits = base64.b64encode(drawn.logprobs.astype(_BITS).tobytes()).decode()
        self._samples.add(_named(key) | {
            "seed": drawn.wanted.seed, "adapter": self.adapter, "ids": drawn.tokens.tolist(), "logprobs": bits,
            "stopped": drawn.stopped,
        })  # fmt: skip

    def rewarded(self, key: Key) -> Rewarded | None:
        """The stored verdict on a sample, if any."""
        row = self._verdicts.rows.get(key)
        if row is None:
            return None
        return Rewarded(row["reward"], row["kind"], row["detail"], row["well_formed"])

    def add_rewarded(self, key: Key, found: Rewarded) -> None:
        """Stores a verdict."""
        self._verdicts.add(_named(key) | vars(found))

    def close(self) -> None:
        """Closes the files; everything added is already in them."""
        self._samples.close()
        self._verdicts.close()

    def __enter__(self) -> StoredUpdate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _named(key: Key) -> dict[str, Any]:
    return {"problem": key[0], "sample": key[1]}
