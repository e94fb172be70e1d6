"""A judge as a reward, from Python: verdicts on batches of completions while a model trains.

```python
from gemma4_tpu.evals.reward import JudgeProcess

with JudgeProcess("eval=verilog_eval", "eval.problems_path=/data/verilog-eval") as judge:
    rows = judge([("Prob001_zero", completion), ...])      # in this order
    rewards = [row["score"] for row in rows]               # or float(row["passed"])
```

The judge is `python -m gemma4_tpu.judge` in a separate process: callers need no `__main__` guard, can call it from many
threads, and inherit none of its workers. The process ends with its caller, however that ends. Imports no JAX.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import httpx

from gemma4_tpu.errors import UserError, last_words

ANNOUNCEMENT = "judging at "
"""Start of the line on stdout that ends with the server's address."""
END_SECONDS = 15.0


class JudgeProcess:
    """A judge that starts on construction and serves until `close`. Thread-safe; a context manager.

    Rows have `problem`, `passed`, `score` (see `judge_server.graded`), `kind` (a verdict class), `mismatches` and
    `samples` (null if the bench counted none), `refused_by` and `detail`.
    """

    def __init__(self, *words: str):
        """Starts the judge.

        Args:
          words: overrides of `python -m gemma4_tpu.judge`.

        Raises:
          UserError: it can't start: no simulator, sandbox or problems, or a canary passes.
        """
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, until close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gemma4_tpu.judge", *words, "port=0", "with_parent=true"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line.startswith(ANNOUNCEMENT)), None)
        if line is None:
            self._process.wait()
            said = self._said()
            self.close()
            raise UserError(f"the judge does not start: {said}")
        self.pid = self._process.pid
        self.url = line.removeprefix(ANNOUNCEMENT).strip()
        self._client = httpx.Client(base_url=self.url, timeout=None)

    def __call__(self, samples: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Judges each (problem's name, completion) and returns a row for each, in order.

        Raises:
          UserError: the benchmark lacks a problem, or the judge has ended.
        """
        asked = [{"problem": problem, "completion": completion} for problem, completion in samples]
        try:
            response = self._client.post("/judge", json={"samples": asked})
        except httpx.HTTPError as error:
            raise UserError(f"the judge at {self.url} has ended ({error or repr(error)}): {self._said()}") from None
        answer = response.json()
        if response.status_code != 200:
            raise UserError(f"judge: {answer['error']}")
        return list(answer["verdicts"])

    def health(self) -> dict[str, Any]:
        """Simulator, sandbox, the problems that can't be passed here, and the number of judged samples."""
        return dict(self._client.get("/health").json())

    def close(self) -> None:
        """Ends the judge and its workers."""
        if hasattr(self, "_client"):
            self._client.close()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _said(self) -> str:
        """Its refusal, or else the end of its stderr."""
        self._errors.seek(0)
        return last_words(self._errors.read()) or f"exit code {self._process.poll()}"

    def __enter__(self) -> JudgeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
