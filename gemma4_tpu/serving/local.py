"""The embedded server from start to end: PyTorch on the CPU behind OpenAI's endpoints, for small checkpoints.

Three threads: this one waits for signals, one speaks HTTP (uvicorn), one computes (`local_engine`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvicorn

from gemma4_tpu.config.files import PROBE_NAME
from gemma4_tpu.config.schema import ServingConfig
from gemma4_tpu.config.serve_checks import ServeChecked
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import GIB
from gemma4_tpu.models.kv_cache import DTYPE_BYTES, parameter_count
from gemma4_tpu.serving.command import model_name
from gemma4_tpu.serving.local_api import Api, api_key
from gemma4_tpu.serving.local_engine import LOADING, Engine
from gemma4_tpu.serving.local_metrics import Metrics
from gemma4_tpu.serving.probe import probe
from gemma4_tpu.serving.signals import Signals, Stopped
from gemma4_tpu.tracking.progress import format_seconds

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
STOP_SECONDS = 2
"""Clients may take so long to hear the end of their answers."""


@dataclass
class LocalOutcome:
    """What `result.json` holds."""

    status: str
    """`stopped` (on request, after it had answered), `interrupted` (before) or `failed`."""
    endpoint: str
    model: str
    folder: str
    slice: str
    weight_bytes: int
    """Estimated: parameters × bytes."""
    ready_seconds: float | None = None
    """From the start to the first answer."""
    served_seconds: float | None = None
    probe: dict[str, Any] | None = None
    error: str | None = None

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def weight_bytes(serving: ServingConfig, checked: ServeChecked) -> int:
    """Bytes of the weights in `weight_dtype`."""
    return parameter_count(checked.architecture) * DTYPE_BYTES[serving.weight_dtype]


def check_host_memory(serving: ServingConfig, checked: ServeChecked) -> None:
    """Raises `UserError` where this machine's free memory does not hold the weights."""
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
        self._engine = Engine(
            checked.model, serving.weight_dtype, metrics, sequences=serving.max_num_seqs,
            prompt_tokens=serving.max_num_batched_tokens,
        )  # fmt: skip
        self._key = api_key()
        app = Api(self._engine, metrics, name, serving.max_model_len, self._key).app()
        self._http = uvicorn.Server(
            uvicorn.Config(
                app, host=serving.host, port=serving.port, log_level="warning", access_log=False, lifespan="off",
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )  # fmt: skip
        host = "127.0.0.1" if serving.host in ("0.0.0.0", "") else serving.host
        self._url = f"http://{host}:{serving.port}"
        self.outcome = LocalOutcome(
            status="failed", endpoint=f"{self._url}/v1", model=name, folder=str(checked.model), slice=serving.slice,
            weight_bytes=weight_bytes(serving, checked),
        )  # fmt: skip

    def run(self) -> int:
        """Exit code: 0 stopped after it answered; 130 or 143 (128 + signal) stopped before.

        Raises:
          UserError: it does not start, or is not the trained model. Whatever ended the engine comes as it is.
        """
        with Signals():
            try:
                with self._threads():
                    self._serve()
            except Stopped as stopped:
                answered = self.outcome.ready_seconds is not None
                self.outcome.status = "stopped" if answered else "interrupted"
                log.info("%s: the server is stopped", stopped)
                return 0 if answered else 128 + stopped.number
            except Exception as error:
                self.outcome.error = (str(error) or repr(error)).splitlines()[0]
                raise
        raise AssertionError("a server ends by a signal or an error")

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """HTTP and engine, both ended with the block."""
        http = threading.Thread(target=self._listen, name="http", daemon=True)
        http.start()
        try:
            while not self._http.started:
                if not http.is_alive():
                    raise UserError(
                        f"serving.port={self._serving.port}: can't listen on {self._serving.host}; another server took"
                        " it meanwhile? give another serving.port"
                    )
                time.sleep(POLL_SECONDS)
            self._engine.start()
            yield
        finally:
            self._http.should_exit = True
            self._engine.stop()
            http.join(2 * STOP_SECONDS)

    def _listen(self) -> None:
        try:
            self._http.run()
        except SystemExit:  # uvicorn's way to say that it can't listen; it has logged why
            return

    def _serve(self) -> None:
        started = time.monotonic()
        self._wait_until_ready(started + self._serving.ready_timeout_seconds)
        ready = time.monotonic()
        self._confirm()
        self.outcome.ready_seconds = ready - started
        log.info("ready after %s; Ctrl-C stops the server", format_seconds(self.outcome.ready_seconds))
        print(f"endpoint: {self.outcome.endpoint}\nmodel: {self.outcome.model}", flush=True)
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
                    " loaded yet; give more"
                )
            time.sleep(POLL_SECONDS)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._engine.error is not None:
            raise self._engine.error

    def _confirm(self) -> None:
        """Asks whether it is the trained model, where the folder holds prompts for that."""
        if not self._serving.probe:
            return
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        with httpx.Client(base_url=self._url, headers=headers, trust_env=False, verify=False) as client:
            found = probe(client, self.outcome.model, Path(self._checked.model))
        if found is None:
            log.warning("%s holds no prompts to ask (%s): nobody asked if it is the trained model",
                        self._checked.model, PROBE_NAME)  # fmt: skip
            return
        self.outcome.probe = found.plain()
        log.info("the server %s", found.told)
