"""The process that ends its parent when a piece of third-party work takes too long, or too much memory.

`hard_limit.py` starts it by its path, and both map one file: `SLOTS` counters, then one record for each. A counter is
odd while its piece of work is in progress. Only the standard library is imported, so that it starts in milliseconds.
"""

import json
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import time
from contextlib import suppress

SLOTS = 32
COUNTERS = struct.Struct(f"={SLOTS}Q")
RECORD = struct.Struct("=dQH")
"""Seconds, bytes and the length of the text that follows: who does the work, what would help, kind and path of a
`result.json` (or neither), folders to remove.
"""
RECORD_BYTES = 4096
FILE_BYTES = COUNTERS.size + SLOTS * RECORD_BYTES
_POLL_SECONDS = 0.1
_COUNTED_SECONDS = 0.5  # at most, per poll: time in which both processes were stopped (Ctrl-Z) does not count
_SECONDS_TO_END = 2.0  # of a process that got the signal
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def record_start(slot: int) -> int:
    """Where a slot's record starts, in bytes."""
    return COUNTERS.size + slot * RECORD_BYTES


def bytes_of_its_own(process: int) -> int:
    """Resident memory without files that are mapped, such as weights that another thread reads."""
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            _, resident, shared = map(int, file.read().split()[:3])
            return (resident - shared) * mmap.PAGESIZE
    except (OSError, ValueError):  # it has ended, or this is not Linux
        return 0


def _oversee(shared: mmap.mmap, parent: int, signal_number: int) -> None:
    """Ends with the parent, however that ends."""
    since: dict[int, tuple[int, float, int]] = {}  # slot → its count, the time counted, memory at the start
    before = time.monotonic()
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        passed, before = min(now - before, _COUNTED_SECONDS), now
        for slot, count in enumerate(COUNTERS.unpack_from(shared)):
            if not count % 2:
                since.pop(slot, None)
                continue
            resident = bytes_of_its_own(parent)
            seen, seconds, started_with = since.get(slot, (0, 0.0, 0))
            if seen != count:
                since[slot] = (count, 0.0, resident)
                continue
            since[slot] = (count, seconds + passed, started_with)
            most_seconds, most_bytes, length = RECORD.unpack_from(shared, record_start(slot))
            problem = (
                f"more than {most_seconds:g} s, and cannot be interrupted" if seconds + passed > most_seconds
                else f"more than {most_bytes / 2**30:.1f} GiB of memory" if resident - started_with > most_bytes
                else ""
            )  # fmt: skip
            start = record_start(slot) + RECORD.size
            text = bytes(shared[start : start + length])
            if problem and COUNTERS.unpack_from(shared)[slot] == count:
                _end(text, problem, parent, signal_number)
                return


def _end(text: bytes, problem: str, parent: int, signal_number: int) -> None:
    if os.getppid() != parent:  # it has ended otherwise
        return
    who, advice, kind, result, *folders = text.split(b"\0")
    told = b"%s takes %s; %s" % (who, problem.encode(), advice)
    with suppress(OSError):  # nobody reads it
        os.write(2, b"error: %s\n" % told)
    if result:
        with suppress(OSError):
            leave_result(os.fsdecode(result), kind.decode(), told.decode(errors="replace"))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    if os.getppid() == parent:
        with suppress(OSError):
            os.kill(parent, signal_number)
    until = time.monotonic() + _SECONDS_TO_END
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.01)
    if os.getppid() == parent:
        kill(parent, is_first=parent == 1)


def leave_result(path: str, kind: str, error: str) -> None:
    """What a run's other failures leave in its `result.json`; that of a finished run stays."""
    with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        if json.load(file).get("status") == "finished":
            return
    with open(f"{path}.ended", "w", encoding="utf-8") as file:
        json.dump({"kind": kind, "version": 1, "status": "failed", "error": error}, file, indent=2)
        file.write("\n")
    os.replace(f"{path}.ended", path)


def kill(process: int, *, is_first: bool) -> None:
    """`is_first`: it is process 1 of a container, which only the kernel can kill: as it has used its time."""
    if is_first and hasattr(resource, "prlimit"):
        with suppress(OSError):
            resource.prlimit(process, resource.RLIMIT_CPU, (1, 1))
    else:
        os.kill(process, signal.SIGKILL)


def _main() -> None:
    for number in _IGNORED:  # they are meant for the parent, with which this process ends
        signal.signal(number, signal.SIG_IGN)
    file, signal_number, parent = map(int, sys.argv[1:])
    _oversee(mmap.mmap(file, FILE_BYTES), parent, signal_number)


if __name__ == "__main__":
    _main()
