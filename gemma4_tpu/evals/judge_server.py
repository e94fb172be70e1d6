"""The judge as a loopback service: takes batches of (problem, completion), returns verdicts and graded scores.

```
POST /judge   {"samples": [{"problem": NAME, "completion": TEXT}, …]}  →  {"verdicts": [{…}, …]}, in this order
GET /health   {"status": "ok", "problems", "simulator", "sandbox", "judged", "remembered"}
```

Invalid requests are answered with 400 and `{"error": …}`. Imports no JAX.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gemma4_tpu.evals.problems import LEAKED, Problem, Verdict, VerdictClass, is_leaked_thought
from gemma4_tpu.evals.verilog.selfcheck import VerilogSelfCheck
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
REMEMBERED = 16_384  # latest verdicts kept
LARGEST_BODY_BYTES = 64 << 20
RAN, BUILT, AGREEING = 0.2, 0.1, 0.6


def graded(verdict: Verdict) -> float:
    """A score for use as a reward, from 0 to 1.

    1: it passes. 0.2 to 0.8: it ran to the end of its bench; 0.6 of this is the share of comparisons without an error.
    0.1: it builds, but crashes or does not end. 0: everything else. A design that does nothing agrees wherever the
    reference does nothing, so learn from `passed` as soon as some samples pass.
    """
    if verdict.passed:
        return 1.0
    if verdict.kind is VerdictClass.MISMATCH:
        agreeing = 1 - verdict.mismatches / verdict.samples if verdict.mismatches and verdict.samples else 0.0
        return round(RAN + AGREEING * agreeing, 6)
    ran = verdict.refused_by not in ("text", "build")  # a compiler can also crash or not end
    return BUILT if ran and verdict.kind in (VerdictClass.RUNTIME, VerdictClass.TIMEOUT) else 0.0


class Service:
    """Verdicts, with the latest remembered; equal samples are simulated once, even at the same time. Thread-safe."""

    def __init__(self, problems: Sequence[Problem], judge: VerilogJudge, check: VerilogSelfCheck):
        """Args:
        problems: problems prepared by `judge`.
        judge: the judge.
        check: its self-check.
        """
        self._problems = {problem.name: problem for problem in problems}
        self._judge, self._check = judge, check
        self._lock = threading.RLock()  # a finished future calls back at once
        self._known: OrderedDict[tuple[str, bytes], Future[Verdict]] = OrderedDict()
        self._judged = 0

    def verdicts(self, samples: Any) -> list[dict[str, Any]]:
        """One row per sample, in order.

        Raises:
          ValueError: the samples are not a list of `{"problem", "completion"}`, or name an unknown problem.
        """
        if not isinstance(samples, list):
            raise ValueError('give {"samples": [{"problem": NAME, "completion": TEXT}, …]}')
        pairs = [self._pair(number, sample) for number, sample in enumerate(samples)]
        futures = [self._future(problem, completion) for problem, completion in pairs]
        return [_row(name, future.result()) for (name, _), future in zip(pairs, futures, strict=True)]

    def health(self) -> dict[str, Any]:
        """The service's state, for people and probes."""
        check = self._check
        return {
            "status": "ok", "problems": len(self._problems), "simulator": check.simulator, "sandbox": check.sandbox,
            "cannot_pass": check.cannot_pass, "judged": self._judged, "remembered": len(self._known),
        }  # fmt: skip

    def _pair(self, number: int, sample: Any) -> tuple[str, str]:
        match sample:
            case {"problem": str(name), "completion": str(completion)} if name in self._problems:
                return name, completion
            case {"problem": str(name), "completion": str()}:
                raise ValueError(f"sample {number}: no problem {name!r} in this benchmark")
        raise ValueError(f'sample {number}: not {{"problem": NAME, "completion": TEXT}}')

    def _future(self, name: str, completion: str) -> Future[Verdict]:
        key = (name, hashlib.sha256(completion.encode("utf-8", errors="surrogatepass")).digest())
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            if is_leaked_thought(completion):
                future: Future[Verdict] = Future()
                future.set_result(LEAKED)
            else:
                future = self._judge.submit(self._problems[name], completion, official=False)
            self._judged += 1
            self._known[key] = future
            future.add_done_callback(lambda done: self._forget_failure(key, done))
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return future

    def _forget_failure(self, key: tuple[str, bytes], done: Future[Verdict]) -> None:
        """Forgets a failure without a verdict (such as a full disk), so that the next request tries again."""
        if done.cancelled() or done.exception():
            with self._lock:
                self._known.pop(key, None)


def _row(name: str, verdict: Verdict) -> dict[str, Any]:
    row = verdict.to_row()
    kept = {key: row[key] for key in ("kind", "mismatches", "samples", "refused_by", "detail")}
    return {"problem": name, "passed": verdict.passed, "score": graded(verdict), **kept}


def make_server(service: Service, port: int, broken: Callable[[], None]) -> ThreadingHTTPServer:
    """A loopback server, bound but not serving yet; `broken` is called when the workers have died.

    Raises:
      OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 600.0  # seconds for which a connection can be idle

        def do_GET(self) -> None:
            known = self.path == "/health"
            self._send(200 if known else 404, service.health() if known else {"error": "GET /health, POST /judge"})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or len(length) > 18 or int(length) > LARGEST_BODY_BYTES:
                self.close_connection = True
                self._send(413, {"error": f"send at most {LARGEST_BODY_BYTES} bytes, with a Content-Length"})
                return
            body = self.rfile.read(int(length))
            if self.path != "/judge":
                self._send(404, {"error": "GET /health, POST /judge"})
                return
            try:
                asked = json.loads(body)
                self._send(200, {"verdicts": service.verdicts(asked.get("samples") if isinstance(asked, dict) else 0)})
            except (ValueError, RecursionError) as error:
                self._send(400, {"error": str(error) or "not JSON"})
            except BrokenExecutor as error:
                log.error("the judge's workers have died: %s", error)
                self._send(500, {"error": "the judge's workers have died"})
                broken()
            except CancelledError:
                self._send(503, {"error": "the judge is shutting down"})

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            with contextlib.suppress(ConnectionError):  # the client is gone
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    server = ThreadingHTTPServer((HOST, port), Handler)
    server.daemon_threads = True
    return server
