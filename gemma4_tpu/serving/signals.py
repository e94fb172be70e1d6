"""Handles Ctrl-C, SIGTERM and a closed terminal alike, and never in the middle of starting a container."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from gemma4_tpu.errors import TERMINATING, none_dropped, send_again

_HANDLED = (signal.SIGINT, signal.SIGHUP, *TERMINATING)


class Stopped(BaseException):
    """A signal requested the end; not an `Exception`, so that nothing treats it as a failure."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """While open, these signals raise `Stopped` in the main thread; afterwards, the previous handlers are restored."""

    def __init__(self) -> None:
        self._held = 0
        self._waiting: int | None = None
        self._before: dict[int, object] = {}
        self._open = ExitStack()

    def __enter__(self) -> Signals:
        self._open.enter_context(none_dropped(Stopped, lambda stopped: send_again(stopped.number)))
        for number in _HANDLED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._open.close()

    @contextmanager
    def held(self, *, drop: bool = False) -> Iterator[None]:
        """Delays signals until the block ends; with `drop`, discards them."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._held and (number := self._waiting) is not None:
            self._waiting = None
            if not drop:
                raise Stopped(number)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._held:
            self._waiting = number
        else:
            raise Stopped(number)
