"""Ports for servers that are given theirs, and bind it only later.

What the kernel picks for `bind(0)` it may hand to anyone in between. These are below its own range, each worker of a
run has its own, and none is handed out twice before all have been.
"""

import itertools
import os
import re
import socket

_LEAST, _MOST, _WORKERS = 20_000, 32_000, 16
_own = int((re.findall(r"\d+$", os.environ.get("PYTEST_XDIST_WORKER", "")) or ["0"])[0]) % _WORKERS
_ports = itertools.cycle(range(_LEAST + _own, _MOST, _WORKERS))
for _ in range(os.getpid() % ((_MOST - _LEAST) // _WORKERS)):  # another run on this machine begins elsewhere
    next(_ports)


def free_port() -> int:
    """One that nobody listens on."""
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError
