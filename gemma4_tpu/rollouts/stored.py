"""Stores roll-outs on disk, one update at a time: samples and verdicts, each written as it arrives.

```
rollouts/<update>.samples.jsonl    {"problem", "sample", "seed", "adapter", "model", "ids", "logprobs", "stopped"}
rollouts/<update>.verdicts.jsonl   {"problem", "sample", "reward", "kind", "detail", "well_formed"}
```

Process 0 reads and writes them, and the others hear from it what there is.

Those of prompts that are validated on are `<update>.validation_samples.jsonl` and `<update>.validation_verdicts.jsonl`,
of the policy after that update.

`logprobs` are float32 bits (base64, little-endian), so that a resumed run trains on exactly the same numbers. A verdict
is never requested twice: a judge can be slow, expensive, or inconsistent.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_tpu.evals.store import Key, Rows
from gemma4_tpu.rollouts.on_policy_run import OnPolicyRun
from gemma4_tpu.rollouts.rewarding import Rewarded
from gemma4_tpu.rollouts.sampler import Drawn, Wanted
from gemma4_tpu.tracking.files import write_text
from gemma4_tpu.tracking.records import ROLLOUTS
from gemma4_tpu.tracking.typed import COUNT, FLAG, NUMBER, TEXT, fields, listed

log = logging.getLogger(__name__)

_BITS = np.dtype("<f4")

_DRAWN = fields({"ids": listed(COUNT), "logprobs": TEXT, "stopped": FLAG}, {"adapter": TEXT, "model": TEXT})
_REWARDED = fields({"reward": NUMBER, "kind": TEXT, "detail": TEXT, "well_formed": FLAG})


class StoredUpdate:
    """The roll-outs of one update; a context manager."""

    def __init__(self, run: OnPolicyRun, update: int, adapter: str, prefix: str = "", *, any_model: bool = False):
        """Opens what an earlier start left of this update, if it was drawn from the same policy.

        Args:
          run: its folder has them; if it has none yet, those of `rollouts.recorded` are taken over.
          update: from 1.
          adapter: digest of the policy's trained values.
          prefix: of the files' names behind the update: `validation_` for answers that are not trained on.
          any_model: accepts answers of these trained values on another base, for other prompts or in another dtype:
            they are of an earlier policy in any case.
        """
        self.adapter = adapter
        """Digest of the trained values that these are of."""
        self._model, self._any_model = run.model, any_model
        self._files: tuple[Rows, Rows] | None = None  # samples and verdicts; on process 0 alone
        paths = [run.folder / ROLLOUTS / f"{update:06}.{prefix}{name}.jsonl" for name in ("samples", "verdicts")]
        recorded = Path(run.config.recorded) if run.config.recorded else None
        known = run.hosts.from_first(lambda: self._open(paths, recorded))
        self._known = {(row["problem"], row["sample"]): row for row in known}

    def _open(self, paths: Sequence[Path], recorded: Path | None) -> list[dict[str, Any]]:
        """The samples that are there.

        Verdicts are copied before the samples they belong to, and removed before them: a process that is killed in
        between never leaves verdicts on samples of another policy.
        """
        paths[0].parent.mkdir(exist_ok=True)
        if recorded is not None and not paths[0].exists():
            for other in (recorded / ROLLOUTS / path.name for path in reversed(paths)):
                if other.exists():
                    write_text(paths[0].with_name(other.name), other.read_text(encoding="utf-8"))
        samples, verdicts = (Rows(path, shape) for path, shape in zip(paths, (_DRAWN, _REWARDED), strict=True))
        if not all(map(self._is_own, samples.rows.values())):
            log.warning(
                "%s: drawn from another policy than this start's, or for other prompts; drawn and judged again",
                paths[0].name,
            )
            for rows in (verdicts, samples):
                rows.close()
                rows.path.unlink()
            samples, verdicts = (Rows(path, shape) for path, shape in zip(paths, (_DRAWN, _REWARDED), strict=True))
        self._files = samples, verdicts
        return list(samples.rows.values())

    def _is_own(self, row: dict[str, Any]) -> bool:
        """Whether this policy gave the answer."""
        return row.get("adapter") == self.adapter and (self._any_model or row.get("model", "") == self._model)

    def drawn(self, key: Key, wanted: Wanted) -> Drawn | None:
        """The sample (problem's name, number), if it is there."""
        row = self._known.get(key)
        if row is None:
            return None
        bits = np.frombuffer(base64.b64decode(row["logprobs"]), _BITS).astype(np.float32)
        return Drawn(wanted, np.array(row["ids"], np.int32), bits, row["stopped"])

    def add_drawn(self, key: Key, drawn: Drawn) -> None:
        """Stores a sample."""
        if self._files is None:
            return
        bits = base64.b64encode(drawn.logprobs.astype(_BITS).tobytes()).decode()
        self._files[0].add(_named(key) | {
            "seed": drawn.wanted.seed, "adapter": self.adapter, "model": self._model, "ids": drawn.tokens.tolist(),
            "logprobs": bits, "stopped": drawn.stopped,
        })  # fmt: skip

    def rewarded(self, key: Key) -> Rewarded | None:
        """What a sample was found to be worth, if it has been judged; asked on process 0."""
        row = self._files[1].rows.get(key) if self._files else None
        if row is None:
            return None
        return Rewarded(row["reward"], row["kind"], row["detail"], row["well_formed"])

    def add_rewarded(self, key: Key, found: Rewarded) -> None:
        """Stores a verdict."""
        if self._files is not None:
            self._files[1].add(_named(key) | vars(found))

    def close(self) -> None:
        """Closes the files; what was added is in them already."""
        for rows in self._files or ():
            rows.close()

    def __enter__(self) -> StoredUpdate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _named(key: Key) -> dict[str, Any]:
    return {"problem": key[0], "sample": key[1]}
