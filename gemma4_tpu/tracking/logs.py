"""Logging of a run: short lines on the console, everything in `log.txt`."""

from __future__ import annotations

import logging
import os
import sys
import threading
from functools import cache
from pathlib import Path
from traceback import format_exception

from rich.console import Console
from rich.logging import RichHandler

from gemma4_tpu.errors import first_line
from gemma4_tpu.redact import redact

_OURS = ("gemma4_tpu", "__main__", "launch")
_CLOCK = "%H:%M:%S"
_handlers: list[logging.Handler] = []  # those that setup_logging added to the root logger


@cache
def console() -> Console:
    """The console shared by log lines and progress bars (stderr, so that a bar stays below the lines).

    Rich omits colour if NO_COLOR is set or stderr is not a terminal.
    """
    return Console(stderr=True, highlight=False)


def setup_logging(log_path: Path | None = None, *, process: int = 0) -> None:
    """Sends log records to the console and, if given, to the run folder's `log.txt`.

    Our own records are logged from INFO on, those of libraries from WARNING on. Python's warnings and tracebacks of
    uncaught exceptions go to the file. A second call (once the run folder is known) replaces the handlers of the first.

    Args:
      log_path: `RunFolder.log_path`; None: console only.
      process: index of this process; all except the first are silent on the console below WARNING.
    """
    root = logging.getLogger()
    while _handlers:
        root.removeHandler(handler := _handlers.pop())
        handler.close()
    _handlers.extend([_console_handler(process)] + ([_file_handler(log_path)] if log_path else []))
    for handler in _handlers:
        handler.addFilter(_is_wanted)
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_in_thread
    sys.unraisablehook = _log_unraisable


def _is_wanted(record: logging.LogRecord) -> bool:
    """Ours, warnings, and what somebody asked for by setting a logger to DEBUG (`hydra.verbose=<name>`)."""
    asked_for = logging.getLogger(record.name).getEffectiveLevel() <= logging.DEBUG
    return asked_for or record.levelno >= logging.WARNING or record.name.split(".")[0] in _OURS


def _console_handler(process: int) -> logging.Handler:
    handler: logging.Handler
    if console().is_terminal:
        handler = RichHandler(console=console(), show_path=False, log_time_format=_CLOCK, omit_repeated_times=False)
        handler.setFormatter(_Short("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_WarningsNamed("%(asctime)s %(message)s", _CLOCK))
    if process > 0:
        handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: record.name not in ("py.warnings", "gemma4_tpu.uncaught"))
    handler.addFilter(lambda record: not _is_told_by_others(record))
    return handler


def _is_told_by_others(record: logging.LogRecord) -> bool:
    """Errors of Orbax's threads: the save or the wait that follows raises them again, and then they have a message."""
    of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return record.levelno >= logging.ERROR and (of_orbax or "never retrieved" in str(record.msg))


def _file_handler(log_path: Path) -> logging.Handler:
    handler = _File(log_path, encoding="utf-8")
    handler.setFormatter(_Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


class _File(logging.FileHandler):
    """Reports once that it cannot write, instead of a traceback per record, and continues without."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        logging.getLogger().removeHandler(self)
        print(f"{self.baseFilename}: can't be written any more ({error.strerror})", file=sys.stderr)


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Short(_Redacted):
    """Of an exception the console gets a line; the traceback is in `log.txt`."""

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info and (error := record.exc_info[1]) is not None:
            told = f"{record.getMessage()} ({type(error).__name__}: {first_line(error)})"
            record = logging.makeLogRecord(
                {**record.__dict__, "msg": told, "args": (), "exc_info": None, "exc_text": None}
            )
        return super().format(record)


class _WarningsNamed(_Short):
    """Names the level from WARNING on, where it matters, and leaves the width to the message elsewhere."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname}: {record.message}"
        return super().formatMessage(record)


def log_refusal(error: Exception) -> None:
    """Writes the message of an error that ends a run to its `log.txt`; the entry point prints it."""
    logging.getLogger("gemma4_tpu.uncaught").error("%s: %s", type(error).__name__, error)


def _log_uncaught(kind, error, traceback) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("gemma4_tpu.uncaught").critical("uncaught", exc_info=(kind, error, traceback))
    sys.stderr.write(redact("".join(format_exception(kind, error, traceback))))


def _log_in_thread(thread: threading.ExceptHookArgs) -> None:
    if (error := thread.exc_value) is None or isinstance(error, SystemExit):
        return
    logging.getLogger("gemma4_tpu.uncaught").critical("uncaught in a thread", exc_info=error)
    print(redact(f"a thread ended: {type(error).__name__}: {first_line(error)}"), file=sys.stderr)


def _log_unraisable(found: sys.UnraisableHookArgs) -> None:
    """What nobody can catch: raised by a destructor, or in a thread of a library's C++."""
    said = f"{found.err_msg or 'Exception ignored in'}: {found.object!r}"
    logging.getLogger("gemma4_tpu.uncaught").error("%s", said, exc_info=found.exc_value)
