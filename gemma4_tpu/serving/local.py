"""The embedded server: PyTorch on the CPU behind OpenAI's endpoints, for small checkpoints.

Three threads: this one waits for signals, one serves HTTP (uvicorn), one computes (`local_engine`).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import uvicorn
from transformers.utils.logging import disable_progress_bar

from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import GIB
from gemma4_tpu.models.kv_cache import DTYPE_BYTES, parameter_count
from gemma4_tpu.serving.checks import ServeChecked
from gemma4_tpu.serving.command import model_name
from gemma4_tpu.serving.local_api import Api, api_key
from gemma4_tpu.serving.local_engine import LOADING, LocalEngine
from gemma4_tpu.serving.local_metrics import Metrics
from gemma4_tpu.serving.outcome import ServerOutcome, client_of, confirm, until_stopped
from gemma4_tpu.serving.signals import Signals, Stopped

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
STOP_SECONDS = 2
"""Time for clients to receive the end of their answers."""


@dataclass(kw_only=True)
class LocalOutcome(ServerOutcome):
    """Contents of `result.json` for a server in this process."""

    weight_bytes: int
    """Estimated: parameters × bytes."""


def weight_bytes(serving: ServingConfig, checked: ServeChecked) -> int:
    """Bytes of the weights in `weight_dtype`."""
    return parameter_count(checked.architecture) * DTYPE_BYTES[serving.weight_dtype]


def check_host_memory(serving: ServingConfig, checked: ServeChecked) -> None:
    """Raises `UserError` if the weights do not fit into this machine's free memory."""
    wanted, there = weight_bytes(serving, checked), psutil.virtual_memory().available
    if wanted > there:
        raise UserError(
            f"run={checked.model}: {wanted / GIB:.1f} GiB of weights in {serving.weight_dtype}, and {there / GIB:.1f}"
            " GiB of memory are free; serving=local is for small checkpoints (serving.weight_dtype=bfloat16 takes half)"
        )


class LocalServer:
    """Runs one server from start to end."""

    def __init__(self, serving: ServingConfig, checked: ServeChecked):
        self._serving, self._checked = serving, checked
        name = model_name(serving, checked)
        metrics = Metrics(name)
        self._engine = LocalEngine(
            checked.model, serving.weight_dtype, metrics, sequences=serving.max_num_seqs,
            prompt_tokens=serving.max_num_batched_tokens,
        )  # fmt: skip
        app = Api(self._engine, metrics, name, serving.max_model_len, api_key()).app()
        self._http = uvicorn.Server(
            uvicorn.Config(
                app, host=serving.host, port=serving.port, log_level="warning", access_log=False, lifespan="off",
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )  # fmt: skip
        self.outcome = LocalOutcome(
            **ServerOutcome.about(serving, checked), weight_bytes=weight_bytes(serving, checked)
        )

    def run(self) -> int:
        """Returns 0 if stopped after it answered, 130 or 143 (128 + signal) if stopped before.

        Raises:
          UserError: it does not start, or does not serve the trained model. Errors of the engine are passed on.
        """
        if not sys.stderr.isatty():
            disable_progress_bar()
        return until_stopped(self.outcome, self._serve, "the server is stopped")

    @contextmanager
    def _threads(self, signals: Signals) -> Iterator[None]:
        """HTTP and engine threads, both ended with the block."""
        http = threading.Thread(target=self._listen, name="http", daemon=True)
        http.start()
        try:
            while not self._http.started:
                if not http.is_alive():
                    raise UserError(
                        f"serving.port={self._serving.port}: cannot listen on {self._serving.host}; if a server took"
                        " it in the meantime, set another serving.port"
                    )
                time.sleep(POLL_SECONDS)
            with signals.held():  # a half-started thread cannot be joined
                self._engine.start()
            yield
        finally:
            self._http.should_exit = True
            self._engine.stop(wait=not isinstance(sys.exception(), Stopped))
            http.join(2 * STOP_SECONDS)

    def _listen(self) -> None:
        try:
            self._http.run()
        except SystemExit:  # uvicorn could not listen; it has logged why
            return

    def _serve(self, signals: Signals) -> None:
        with self._threads(signals):
            self._answer()

    def _answer(self) -> None:
        started = time.monotonic()
        self._wait_until_ready(started + self._serving.ready_timeout_seconds)
        ready = time.monotonic()
        with client_of(self._serving) as client:
            confirm(client, self._serving, self._checked, self.outcome)
        self.outcome.announce(ready - started, "stops the server")
        try:
            while self._engine.alive:
                time.sleep(POLL_SECONDS)
        finally:
            self.outcome.served_seconds = time.monotonic() - ready
        self._raise_error()

    def _wait_until_ready(self, deadline: float) -> None:
        while self._engine.state == LOADING:
            if time.monotonic() > deadline:
                raise UserError(
                    f"serving.ready_timeout_seconds={self._serving.ready_timeout_seconds:g}: the checkpoint is not"
                    " loaded yet; allow more time"
                )
            time.sleep(POLL_SECONDS)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._engine.error is not None:
            raise self._engine.error
