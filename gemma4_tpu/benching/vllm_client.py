"""`vllm bench serve`, run in the server's own container: the same cells by another client, a cross-check."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from pathlib import Path
from typing import Any

from gemma4_tpu.benching.cells import Cell, generator
from gemma4_tpu.benching.client import prefix_cache_tokens, session
from gemma4_tpu.benching.one_cell import FAILED, OK
from gemma4_tpu.config.serving import BenchConfig, ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.serving.command import MODEL_MOUNT, container_name, shown
from gemma4_tpu.serving.engine import ContainerEngine, exec_words

log = logging.getLogger(__name__)

PLACE = "/tmp/gemma4-bench"
"""Folder in the container for one run: the client's process id and its result."""
_START = 'rm -rf "$0" && mkdir "$0" && echo $$ > "$0/pid" && exec "$@"'
_KILL = 'kill "$(cat "$0/pid")"; rm -rf "$0"'
_RESULT = "result.json"
_REASON = 300  # characters of a log's last line
_FIXED = 1e6  # burstiness of arrivals at distances that are the same to one in a thousand


class VllmClient:
    """Runs cells, one at a time."""

    def __init__(self, serving: ServingConfig, bench: BenchConfig, endpoint: str):
        self._bench, self._endpoint = bench, endpoint
        self._container = container_name(serving)
        self._engine, self._command = ContainerEngine(serving.engine), serving.engine

    def check(self) -> None:
        """Raises `UserError` where there is no such container, or it does not run."""
        self._engine.check()
        if not self._engine.state(self._container).running:
            raise UserError(f"bench.cross_check=true: the container {self._container} does not run; is it starting?")

    def words(self, cell: Cell, model: str, attempt: int = 0) -> list[str]:
        """The command in the container."""
        bench = self._bench
        seed = int(generator(bench, cell, attempt).integers(2**31))
        flags: dict[str, Any] = {
            "backend": "openai", "base-url": self._endpoint, "model": MODEL_MOUNT, "served-model-name": model,
            "dataset-name": "random", "random-input-len": cell.input_tokens, "random-output-len": cell.output_tokens,
            "num-prompts": cell.requests(bench), "num-warmups": bench.warmup_requests, "seed": seed,
            "temperature": bench.temperature, "percentile-metrics": "ttft,tpot,itl,e2el", "metric-percentiles": "99",
            "result-dir": PLACE, "result-filename": _RESULT,
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
        return ["sh", "-c", _START, PLACE, "vllm", "bench", "serve", *words, *switches]

    def shown(self, cell: Cell, model: str) -> str:
        """The whole command, for a shell."""
        return f"{self._command} {shown(exec_words(self._container, self.words(cell, model)))}"

    def run(self, cell: Cell, model: str, output: Path, attempt: int) -> dict[str, Any]:
        """Its result under vLLM's own key names, with `state` and, if it isn't ok, `reason`.

        Args:
          cell: the load.
          model: name of the model on the server.
          output: file for what it prints.
          attempt: how many times this cell has failed before; another attempt has other prompts.
        """
        before = self._prefix_cache()
        try:
            code = self._engine.execute(self._container, self.words(cell, model, attempt), output)
        except BaseException:
            self._inside("sh", "-c", _KILL, PLACE)
            raise
        text = self._inside("cat", f"{PLACE}/{_RESULT}") if code == 0 else None
        self._inside("rm", "-rf", PLACE)
        about = {"cell": cell.name, "attempt": attempt}
        if text is None:
            return {**about, "state": FAILED, "reason": f"exit code {code}: {_last_line(output)}"}
        found = json.loads(text)
        found.pop("generated_texts", None)
        after = self._prefix_cache()
        hits, queries = (b - a for a, b in zip(before, after, strict=True)) if before and after else (None, None)
        return {
            **about, **_judged(found, cell.requests(self._bench)), **found,
            "prefix_cache_hit_tokens": hits, "prefix_cache_query_tokens": queries,
        }  # fmt: skip

    def _inside(self, *words: str) -> str | None:
        return self._engine.ask_inside(self._container, words)

    def _prefix_cache(self) -> tuple[float, float] | None:
        async def ask() -> tuple[float, float] | None:
            async with session(30.0) as client:
                return await prefix_cache_tokens(client, self._endpoint)

        return asyncio.run(ask())


def _judged(found: dict[str, Any], wanted: int) -> dict[str, str]:
    """State and reason: vLLM's client exits with 0 whatever became of its requests."""
    failed = wanted - found["completed"]
    if not failed:
        return {"state": OK}
    reason = next((error.strip().splitlines()[-1] for error in found.get("errors", []) if error.strip()), "no reason")
    return {"state": FAILED, "reason": f"{failed} of {wanted} requests: {reason[:_REASON]}"}


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:_REASON] if lines else "it printed nothing"
