"""The embedded server's metrics in Prometheus' text format, named like vLLM's where it has an equivalent."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gemma4_tpu.serving.local_sampling import GeneratedAnswer

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


class Metrics:
    """Updated by the engine's thread, read by requests to `/metrics`."""

    def __init__(self, model: str):
        self._registry = CollectorRegistry()
        self._model = model
        options: dict[str, Any] = {"labelnames": ["model_name"], "registry": self._registry}
        self._running = Gauge("vllm:num_requests_running", "Answers in progress.", **options).labels(model)
        self._waiting = Gauge("vllm:num_requests_waiting", "Requests that wait for their turn.", **options).labels(
            model
        )
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens read.", **options).labels(model)
        self._generated = Counter("vllm:generation_tokens", "Tokens generated.", **options).labels(model)
        for kind, told in (("queries", "looked up in"), ("hits", "found in")):
            # There is no prefix cache: both counters stay at 0, as in a vLLM whose cache is off.
            Counter(f"vllm:prefix_cache_{kind}", f"Prompt tokens {told} the prefix cache.", **options).labels(model)
        self._ended = Counter(
            "vllm:request_success", "Answers ended, by reason.", ["model_name", "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        self._first = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            **options,
        ).labels(model)
        self._between = Histogram(
            "vllm:inter_token_latency_seconds", "From one token of an answer to the next.", buckets=_SECONDS, **options
        ).labels(model)
        self._whole = Histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", buckets=_SECONDS, **options
        ).labels(model)

    def under_way(self, running: int, waiting: int) -> None:
        """Sets the numbers of answers in progress and waiting."""
        self._running.set(running)
        self._waiting.set(waiting)

    def read(self, answer: GeneratedAnswer) -> None:
        """Records that the prompt was read."""
        self._prompt.inc(len(answer.prompt))

    def token(self, answer: GeneratedAnswer, finish: str | None) -> None:
        """Records a generated token; `finish` marks the last one."""
        self._generated.inc()
        now = time.monotonic()
        if answer.last_token is None:
            self._first.observe(now - answer.arrived)
        else:
            self._between.observe(now - answer.last_token)
        answer.last_token = now
        if finish:
            self.ended(answer, finish)

    def ended(self, answer: GeneratedAnswer, finish: str) -> None:
        """Records that an answer ended, for the reason `finish`."""
        self._ended.labels(self._model, finish).inc()
        self._whole.observe(time.monotonic() - answer.arrived)

    def text(self) -> bytes:
        """The metrics in text format."""
        return generate_latest(self._registry)
