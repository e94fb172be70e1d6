"""An OpenAI-compatible server on loopback that misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Serves `/v1/models` and every POST; a context manager.

    Args:
      answer: request body and number of earlier requests of the same problem text → (status, body[, headers]) or the
        completion's text.
      models: what it lists.
      delay_seconds: before each answer.
    """

    def __init__(self, answer: Callable[[dict, int], Any], models: tuple[str, ...] = ("gemma",), delay_seconds=0.0):
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once, self._lock = 0, threading.Lock()
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self._send(200, {"data": [{"id": name} for name in models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with served._lock:
                    key = (body.get("messages"), body.get("seed"))
                    earlier = sum((b.get("messages"), b.get("seed")) == key for b in served.bodies)
                    served.bodies.append(body)
                    served.headers.append(dict(self.headers))
                    served._at_once += 1
                    served.most_at_once = max(served.most_at_once, served._at_once)
                time.sleep(delay_seconds)
                made = answer(body, earlier)
                with served._lock:
                    served._at_once -= 1
                self._send(*made) if isinstance(made, tuple) else self._send(200, completion(made))

            def _send(self, status: int, body: Any, headers: dict[str, str] | None = None):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has given up
                    pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(text: str, finish: str = "stop", tokens: int = 7) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}
