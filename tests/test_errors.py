"""How every entry point ends."""

import gc
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from textwrap import indent

import pytest

from gemma4_tpu.errors import INTERRUPTED, REFUSED, TERMINATED, TERMINATING, UserError, exit_code, first_line


def raising(error: BaseException):
    def run() -> int:
        raise error

    return run


def test_refusals_and_interruptions_are_one_message_and_other_errors_stay(capsys):
    assert exit_code(lambda: 7) == 7
    assert exit_code(raising(UserError("lora.rank=0: at least 1"))) == REFUSED
    assert capsys.readouterr() == ("", "error: lora.rank=0: at least 1\n")
    assert exit_code(raising(KeyboardInterrupt()), interrupted="interrupted; the same command goes on") == INTERRUPTED
    assert capsys.readouterr() == ("", "\ninterrupted; the same command goes on\n")
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        exit_code(lambda: 1 // 0)


def test_a_path_that_cannot_be_used_is_one_message(tmp_path, capsys):
    place = tmp_path / ("a" * 300)
    assert exit_code(place.is_dir) == REFUSED  # Python itself raises
    assert capsys.readouterr().err == f"error: {place}: File name too long; give another path, or allow access to it\n"
    with pytest.raises(FileNotFoundError):  # may be a defect of ours
        exit_code((tmp_path / "absent").read_text)


def test_the_traceback_of_a_defect_shows_no_secret():
    """Before there is a log, too, whose own hook blanks them."""
    raising = "raise ValueError('no answer from https://me:' + 'planted0123' + '@host/x')"
    code = f"from gemma4_tpu.errors import exit_code\ndef run():\n  {raising}\nexit_code(run)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert "ValueError: no answer from https://***@host/x" in done.stderr and "me:planted0123" not in done.stderr


def test_a_record_has_one_line_of_an_error():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError()"


@pytest.mark.parametrize("number", TERMINATING)
def test_signals_that_ask_for_an_end_unwind_as_ctrl_c_does(number, capsys):
    unwound = []

    def run() -> int:
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(number)
        return 0

    before = signal.getsignal(number)
    assert exit_code(run, interrupted="stopped; the same command goes on") == TERMINATED
    assert unwound == [number] and capsys.readouterr().err == "\nstopped; the same command goes on\n"
    assert signal.getsignal(number) == before


FORK = "os.fork() or exit_now(0); os.wait(); print(kept.is_dir())"


@pytest.mark.parametrize("end", ["exit_now(42)", "sys.exit(1)", FORK])
def test_temporary_folders_are_gone_however_a_process_ends(end):
    code = f"""
import os, sys
from gemma4_tpu.errors import exit_now
from gemma4_tpu.scratch import make_folder
kept = make_folder()
(kept / "file").touch()
print(kept, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    place, *others = done.stdout.split()
    assert not Path(place).exists() and others in ([], ["True"])  # and a fork's end removes nothing of its parent's


def test_what_a_signal_cut_short_may_raise_something_else(capsys):
    def run() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            try:
                [][0]  # half done
            except IndexError as error:
                raise UserError("wrapped") from error
        return 0

    assert exit_code(run, interrupted="stopped") == TERMINATED
    assert capsys.readouterr().err == "\nstopped\n"


def test_no_computation_under_way_crashes_an_interrupted_command():
    code = """
import os, signal, threading
from gemma4_tpu.errors import exit_code, leave
def work():
    import jax, jax.numpy as jnp
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda i, y: y @ y / 600.0, x))
    x = step(jnp.ones((600, 600)))
    threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()
    while True:
        x = step(x)
leave(exit_code(work))
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
        assert (done.returncode, done.stderr) == (INTERRUPTED, "\ninterrupted\n")


def test_a_signal_that_somebody_swallows_ends_the_process_all_the_same():
    code = """
import signal, time
from gemma4_tpu import errors
errors.SECONDS_TO_UNWIND = 0.5
def work():
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:  # as an import of an optional package
        time.sleep(600)
errors.leave(errors.exit_code(work))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (TERMINATED, "\nended without unwinding\n")


@pytest.mark.parametrize(
    ("work", "told"),
    [
        # An import of an optional package swallows it: the work goes on, so it is sent again.
        ("try:\n  strike()\nexcept BaseException: pass\ntime.sleep(600)", "\ninterrupted\n"),
        # Unwinding takes long, and is left alone.
        ("try: strike()\nfinally:\n  time.sleep(1.5)\n  print('unwound', file=sys.stderr)", "unwound\n\ninterrupted\n"),
        ("try: strike()\nexcept KeyboardInterrupt as stop: code = errors.stopped_code(stop)\n"
         "time.sleep(1.5)\nprint('closed', file=sys.stderr)", "closed\n"),
    ],
)  # fmt: skip
def test_ctrl_c_is_sent_again_only_where_it_was_swallowed(work, told):
    code = f"""
import signal, sys, time
from gemma4_tpu import errors
errors.SECONDS_TO_BE_SEEN = 0.3
strike = lambda: signal.raise_signal(signal.SIGINT)
def work():
    code = 0
{indent(work, "    ")}
    return code
errors.leave(errors.exit_code(work))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (INTERRUPTED, told)


class Key:
    """For weak references."""


def collected(strike) -> None:
    gc.callbacks.append(callback := lambda phase, info: strike() if phase == "start" else None)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)


def unreferenced(strike) -> None:
    key = Key()
    kept = weakref.ref(key, lambda _: strike())  # as a WeakKeyDictionary
    del key
    assert kept() is None


def finalized(strike) -> None:
    type("Resource", (), {"__del__": lambda _: strike()})()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", [collected, unreferenced, finalized])
def test_a_signal_where_python_drops_exceptions_is_not_lost(place, number):
    def strike() -> None:
        if not sent:
            sent.append(number)
            signal.raise_signal(number)

    def run() -> int:
        place(strike)
        time.sleep(600)
        return 0

    sent: list[int] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever a test before this one left
    hook = sys.unraisablehook
    try:
        assert exit_code(run) == (INTERRUPTED if number == signal.SIGINT else TERMINATED)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sys.unraisablehook is hook
