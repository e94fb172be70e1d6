"""Whether processes that a test has seen have ended.

What SIGKILL has reached ends a moment later, and only its own parent can wait for that: ask `wait_for`, not `is_alive`,
about a process that this one did not start.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")


def is_alive(pid: int) -> bool:
    """Whether it still runs; one that has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(reached: Callable[[], T], seconds: float = 60) -> T:
    """Asks again until the answer is true, and returns it; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < until, f"not reached in {seconds:g} s"
        time.sleep(0.02)
    return found


def ends(pid: int, seconds: float = 60) -> bool:
    """Waits for its end, and returns whether it came."""
    until = time.monotonic() + seconds
    while is_alive(pid):
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True
