"""SIGTERM, SIGUSR1, SIGUSR2: save at the next update boundary and exit with code 42; a second one exits at once.

A separate thread reads the signal, so that it is handled while the main thread compiles or loads. Until there is
something to save, the first SIGTERM ends the process at once, also with code 42: the same command starts again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from gemma4_tpu.errors import PREEMPTED, TERMINATED, TERMINATING, exit_now

log = logging.getLogger(__name__)


class Preemption:
    """Watches for SIGTERM while open as a context manager, on the main thread: elsewhere (a notebook's worker), Python
    lets nobody take signals, and none is watched for.

    With several processes, JAX's preemption service takes the signal, whichever of them it reaches, and names the
    update at which all of them stop; start-up is then not cut short, but ends after the first update.
    """

    def __init__(self, last_words: Callable[[], None] = lambda: None):
        """`last_words` is called before an exit that has nothing to save."""
        self.last_words = last_words
        self._requested = threading.Event()
        self._something_to_save = False
        self._signals = 0
        self._before: dict[signal.Signals, Any] = {}
        self._watches = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Preemption:
        if not self._watches:
            log.warning("not on the main thread: SIGTERM ends this process as it did before, without a save")
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._before = {number: signal.getsignal(number) for number in TERMINATING}
        self.listen()
        self._woken_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="sigterm", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._watches:
            return
        signal.set_wakeup_fd(self._woken_before)  # an event loop's, in a notebook
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write_end)  # ends the thread

    def listen(self) -> None:
        """Installs the handlers, also over JAX's preemption service, which installs its own when it starts."""
        for number in TERMINATING if self._watches else ():
            signal.signal(number, lambda *_: None)  # so that Python writes it to the pipe

    @property
    def requested(self) -> bool:
        """Whether this process was asked to end; `reached` is what all processes agree on."""
        return self._requested.is_set()

    def something_to_save(self) -> None:
        """Called after an update: from now on SIGTERM waits for a save."""
        self._something_to_save = True

    def reached(self, update: int) -> bool:
        """Whether to save and stop now that `update` updates are done: the same answer on every process."""
        import jax
        from jax.experimental import multihost_utils

        several = jax.process_count() > 1 and not self._requested.is_set()
        if several and multihost_utils.reached_preemption_sync_point(update):
            self._requested.set()
            self._signals = 1
            self.listen()  # for the second signal
        return self._requested.is_set()

    def _listen(self) -> None:
        with os.fdopen(self._read_end, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] == signal.SIGTERM:
                    self._terminate()
                elif number[0] in TERMINATING:
                    os.kill(os.getpid(), signal.SIGTERM)  # handled by JAX's preemption service

    def _terminate(self) -> None:
        self._signals += 1
        if self._signals > 1:
            log.warning("a second SIGTERM: exiting at once, without waiting for the save")
            exit_now(TERMINATED)
        elif self._something_to_save:
            log.warning("SIGTERM: saving at the next update boundary; another SIGTERM exits at once")
            self._requested.set()
        else:
            log.warning("SIGTERM before the first update: there is nothing to save; the same command starts again")
            self.last_words()
            exit_now(PREEMPTED)
