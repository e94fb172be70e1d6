"""gs:// for real: an emulator of Google Cloud Storage on loopback that gcsfs and TensorStore talk to over HTTP.

The fixture `bucket` gives the address of an empty bucket, such as `gs://bucket-3`. It reaches processes that are
started while it is in use too. A file of tests that wants it says `from tests.gcs import bucket, gcs_emulator`.
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[str]:
    """Address of an emulator in a process of its own, `http://127.0.0.1:PORT`; it keeps its objects in memory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gcp_storage_emulator", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture
def bucket(gcs_emulator: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an empty bucket, `gs://…`, without credentials."""
    import fsspec

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)  # for gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", gcs_emulator)
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")  # for child processes;
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # this one has read its environment already
    name = f"bucket-{next(_numbers)}"
    fs = fsspec.filesystem("gs")
    fs.mkdir(name)
    yield f"gs://{name}"
    fs.clear_instance_cache()  # holds the emulator's address
