"""The one exception for what users can fix, how a command ends, and the exit codes of every entry point."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import format_exception
from types import FrameType, TracebackType
from typing import Any, NamedTuple, NoReturn, TypeVar

from gemma4_tpu import scratch
from gemma4_tpu.redact import redact

REFUSED = 2
"""A `UserError`: one message on stderr."""
STALLED = 3
"""No progress for `trainer.stall_seconds`; all stacks are in log.txt."""
STORAGE_GONE = 4
"""The run's bucket was unreachable for `storage.deadline`; saved on this machine, at the place that the message
names.
"""
OVERRUN = 64
"""A template or tokenizer took too long or too much memory where nothing could interrupt it: one message on stderr, and
no restart helps. Also the number of the signal that ends the process then (`data/hard_limit.py`).
"""
PREEMPTED = 42
"""Preempted and saved (or nothing to save yet): the same command resumes. Nothing else uses this code."""
INTERRUPTED = 130
"""Ctrl-C."""
TERMINATED = 143
"""SIGTERM to a command that is not a training run, or before training starts; or a second one, which does not wait for
the save. The same command resumes.
"""
TERMINATING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that request an end: schedulers send SIGUSR1 or SIGUSR2 some time before the machine is taken."""
SECONDS_TO_UNWIND = 30.0
"""Time that a command has to unwind."""
SECONDS_TO_BE_SEEN = 3.0
"""Time after which Ctrl-C is sent again if the main thread neither unwinds nor has handled it."""
_AGAIN_SECONDS = 0.02
Stop = TypeVar("Stop", bound=BaseException)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of an OSError when no more can be written."""
BAD_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
)  # fmt: skip
"""Error numbers of an OSError when a path can't be used as it was given: a matter of the path or of permissions."""
_CLIENTS = ("aiohttp", "fsspec", "gcsfs", "google", "httpx", "huggingface_hub", "requests")
"""Packages that talk to other machines: their exceptions concern an address or a connection, not a bug of ours."""


class UserError(ValueError):
    """A refusal: names the key, file or row, what was given, and what would work.

    Entry points print its message without a traceback and exit with `exit_code`.
    """

    exit_code = REFUSED


class Terminated(KeyboardInterrupt):
    """One of `TERMINATING` arrived: unwinds what is open, as Ctrl-C does."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C."""

    handled = False
    """Whether a command has taken it as its end."""


class Ended(NamedTuple):
    """How a command that was not refused ended."""

    code: int
    """Its exit code."""
    folders: tuple[Path, ...] = ()
    """The run folders that it wrote."""


def exit_code(run: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Exit code of an entry point's work: a refusal, a full disk or an unreachable address is one message on stderr;
    Ctrl-C and SIGTERM print a line that says `interrupted`.
    """
    if logging.lastResort is not None:  # for what libraries log before there is a log
        logging.lastResort.setFormatter(_Untraced())
    try:
        with _terminable():
            return run()
    except Exception as error:
        if (stop := _interruption(error)) is not None:
            return _stopped(stop, interrupted)
        if isinstance(error, UserError):
            print(redact(f"error: {error}"), file=sys.stderr)
            return error.exit_code
        if (known := _outside(error)) is None:
            if sys.excepthook is sys.__excepthook__:  # not yet that of the log
                sys.excepthook = _without_secrets
            raise
        logging.getLogger("gemma4_tpu.uncaught").info("where it happened", exc_info=True)
        code, message = known
        print(redact(f"error: {message}"), file=sys.stderr)
        return code
    except KeyboardInterrupt as stop:
        return _stopped(stop, interrupted)


def _stopped(stop: KeyboardInterrupt, told: str) -> int:
    print(f"\n{told}", file=sys.stderr)
    return stopped_code(stop)


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """What cut short the work that raised this because it was half done, as OmegaConf does; None: nothing did."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return error
        error = error.__context__
    return None


def _without_secrets(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """The traceback of a defect; its message may hold what the user gave."""
    sys.stderr.write(redact("".join(format_exception(kind, error, where))))


def _outside(error: Exception) -> tuple[int, str] | None:
    """(exit code, message) of an error whose cause is outside this program; None: it may be a bug of ours."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f" ({error.filename})" if error.filename else ""
        return REFUSED, f"the disk is full{where}: make space, and the same command resumes"
    if (unusable := bad_place(error)) is not None:
        return REFUSED, f"{unusable}; give another path, or allow access to it"
    if is_of_client(error):
        return STORAGE_GONE, f"{type(error).__name__}: {first_line(error)}"
    return None


def bad_place(error: Exception) -> str | None:
    """`<path>: Permission denied`, for an error that concerns a path as it was given; None: another error."""
    if isinstance(error, OSError) and error.errno in BAD_PLACE and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def is_of_client(error: BaseException) -> bool:
    """Whether a package that talks to other machines raised this."""
    return type(error).__module__.partition(".")[0] in _CLIENTS


class _Untraced(logging.Formatter):
    """Omits tracebacks, which concern those who have a log."""

    def formatException(self, ei: object) -> str:
        return ""


def stopped_code(stop: KeyboardInterrupt) -> int:
    """Exit code after Ctrl-C or a signal that requests an end, which is handled with that."""
    handle(stop)
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def handle(stop: KeyboardInterrupt) -> None:
    """Notes that a command takes this as its end, and only closes what is open from now on."""
    if isinstance(stop, Interrupted):
        stop.handled = True


@contextmanager
def _terminable() -> Iterator[None]:
    """Makes signals that request an end unwind the main thread, as Ctrl-C does; a second one ends the process at once.

    A command that handles them differently (a training run saves first) installs its own handlers while it works. If
    something swallows the exception (imports of optional packages do), the process still ends some time later; Ctrl-C,
    which may take long to unwind while a checkpoint is written, is sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    unwound = threading.Event()

    def end_anyway() -> None:
        if not unwound.wait(SECONDS_TO_UNWIND):
            print("\nended without unwinding", file=sys.stderr)
            exit_now(TERMINATED)

    def stop(number: int, _: FrameType | None) -> None:
        threading.Thread(target=end_anyway, name="end", daemon=True).start()
        for each in TERMINATING:
            signal.signal(each, lambda *_: exit_now(TERMINATED))
        raise Terminated(signal.Signals(number).name)

    newest = Interrupted()

    def ask_again(interrupt: Interrupted) -> None:
        while not unwound.wait(SECONDS_TO_BE_SEEN) and interrupt is newest and not interrupt.handled:
            if not _in_flight(interrupt):
                os.kill(os.getpid(), signal.SIGINT)
                return

    def interrupt(*_: object) -> None:
        nonlocal newest
        newest = Interrupted()
        threading.Thread(target=ask_again, args=(newest,), name="again", daemon=True).start()
        raise newest

    def again(dropped: KeyboardInterrupt) -> None:
        if isinstance(dropped, Terminated):
            for each in TERMINATING:
                signal.signal(each, stop)
        send_again(signal.Signals[str(dropped)] if isinstance(dropped, Terminated) else signal.SIGINT)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *TERMINATING)}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, stop)
        elif handler == signal.default_int_handler:
            signal.signal(number, interrupt)
    try:
        with none_dropped(KeyboardInterrupt, again):
            yield
    finally:
        unwound.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_flight(stop: KeyboardInterrupt) -> bool:
    """Whether the main thread unwinds for this one, or handles it."""
    current: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    error = current[1] if isinstance(current, tuple) else current  # until Python 3.11
    while error is not None and error is not stop:
        error = error.__context__
    return error is stop


@contextmanager
def none_dropped(kind: type[Stop], again: Callable[[Stop], None]) -> Iterator[None]:
    """Calls `again` with each exception of this kind that Python drops: one raised in a finalizer, or in a callback of
    a weak reference or of the garbage collector (JAX has one), ends nothing, and a signal would be lost.
    """
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, kind):
            again(dropped.exc_value)
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def send_again(number: int) -> None:
    """Sends a signal to this process again, a moment later."""
    threading.Timer(_AGAIN_SECONDS, os.kill, [os.getpid(), number]).start()


def leave(code: int) -> NoReturn:
    """Ends the process of a command: at once after an interruption, because computations may still be running and crash
    when Python tears down JAX beneath them; and if storage is gone, because requests to it never end.
    """
    if code in (INTERRUPTED, TERMINATED, STORAGE_GONE):
        exit_now(code)
    sys.exit(code)


def exit_now(code: int) -> NoReturn:
    """Ends the process from any thread, without waiting for the others: what was logged is on disk."""
    scratch.remove_all()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell(text: str) -> None:
    """Prints requested output without secrets, even to a reader that stops reading (`| head`)."""
    try:
        print(redact(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error: BaseException) -> str:
    """What went wrong, for a one-line record; the log has the rest."""
    return (str(error) or repr(error)).splitlines()[0]


def last_words(printed: str) -> str | None:
    """Why a command of ours ended, judging by its output: its last refusal, else its last line; None: there is none."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return last_refusal(printed) or (lines[-1] if lines else None)


def last_refusal(printed: str) -> str | None:
    """The last refusal in a command's output, if there is one."""
    told = [line.strip().removeprefix("error: ") for line in printed.splitlines() if line.strip().startswith("error: ")]
    return told[-1] if told else None
