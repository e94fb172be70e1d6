"""Runs `vllm bench serve` where the server's vLLM is: the same cells by another client, as a cross-check."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from pathlib import Path
from typing import Any

from gemma4_tpu.benching.cells import Cell, generator
from gemma4_tpu.benching.client import prefix_cache_growth, prefix_cache_tokens, session
from gemma4_tpu.benching.one_cell import FAILED, OK
from gemma4_tpu.benching.vllm_place import InContainer, OnThisMachine, VllmPlace
from gemma4_tpu.config.serving import BenchConfig, ServingConfig

log = logging.getLogger(__name__)

_REASON = 300  # characters of a log's last line
_FIXED = 1e6  # burstiness at which intervals between arrivals are equal to one part in a thousand


class VllmClient:
    """Runs cells, one at a time."""

    def __init__(self, serving: ServingConfig, bench: BenchConfig, endpoint: str, folder: Path | None):
        """`folder`: the model's, on this machine, which a client outside a container needs for its tokenizer."""
        self._bench, self._endpoint = bench, endpoint
        self._place: VllmPlace = InContainer(serving) if serving.runner == "docker" else OnThisMachine(serving, folder)

    def check(self) -> None:
        """Raises `UserError` if vLLM can't run."""
        self._place.check()

    def words(self, cell: Cell, model: str, attempt: int = 0) -> list[str]:
        """The words after `vllm`, except those for the result's destination."""
        bench = self._bench
        seed = int(generator(bench, cell, attempt).integers(2**31))
        flags: dict[str, Any] = {
            "backend": "openai", "base-url": self._endpoint, "model": self._place.model, "served-model-name": model,
            "dataset-name": "random", "random-input-len": cell.input_tokens, "random-output-len": cell.output_tokens,
            "num-prompts": cell.requests(bench), "num-warmups": bench.warmup_requests, "seed": seed,
            "temperature": bench.temperature, "percentile-metrics": "ttft,tpot,itl,e2el", "metric-percentiles": "99",
        }  # fmt: skip
        if bench.shared_tokens:
            flags |= {
                "random-prefix-len": bench.shared_tokens,
                "random-input-len": cell.input_tokens - bench.shared_tokens,
            }
        if cell.users is not None:
            flags["max-concurrency"] = cell.users
        elif cell.rate is not None and not math.isinf(cell.rate):
            flags["request-rate"] = cell.rate
            flags |= {"burstiness": _FIXED} if bench.arrivals == "fixed" else {}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        switches = ["--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]
        return ["bench", "serve", *words, *switches]

    def shown(self, cell: Cell, model: str) -> str:
        """The whole command, for a shell."""
        return self._place.shown(self.words(cell, model))

    def run(self, cell: Cell, model: str, output: Path, attempt: int) -> dict[str, Any]:
        """Runs a cell; returns its result under vLLM's own key names, with `state` and, if that isn't ok, `reason`.

        Args:
          cell: the load.
          model: name of the model on the server.
          output: file for the client's output.
          attempt: how many times this cell has failed before; each attempt uses other prompts.
        """
        about = {"cell": cell.name, "attempt": attempt}
        before = self._prefix_cache()
        code, text = self._place.run(self.words(cell, model, attempt), output)
        if text is None:
            return {**about, "state": FAILED, "reason": f"exit code {code}: {_last_line(output)}"}
        found = json.loads(text)
        found.pop("generated_texts", None)
        hits, queries = prefix_cache_growth(before, self._prefix_cache())
        return {
            **about, **_judged(found, cell.requests(self._bench)), **found,
            "prefix_cache_hit_tokens": hits, "prefix_cache_query_tokens": queries,
        }  # fmt: skip

    def _prefix_cache(self) -> tuple[float, float] | None:
        async def ask() -> tuple[float, float] | None:
            async with session(30.0) as client:
                return await prefix_cache_tokens(client, self._endpoint)

        return asyncio.run(ask())


def _judged(found: dict[str, Any], wanted: int) -> dict[str, str]:
    """State and reason: vLLM's client exits with 0 even if its requests failed."""
    failed = wanted - found["completed"]
    if not failed:
        return {"state": OK}
    reason = next((error.strip().splitlines()[-1] for error in found.get("errors", []) if error.strip()), "no reason")
    return {"state": FAILED, "reason": f"{failed} of {wanted} requests: {reason[:_REASON]}"}


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:_REASON] if lines else "it printed nothing"
