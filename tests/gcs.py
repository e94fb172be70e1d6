"""gs:// for real: an emulator of Google Cloud Storage on loopback that gcsfs and TensorStore talk to over HTTP.

Two things are mended in it (gcp-storage-emulator 2026.7.19): it does not say which generation an object has, and it
reads an upload as if it were a mail, which loses a carriage return at its end: one random file in 256 was damaged.
tests/test_gcs.py notices when either is no longer needed.

The fixture `bucket`, which every test can ask for, gives the address of an empty bucket, such as `gs://bucket-3`. It
holds for processes that are started while it is in use too.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_numbers = itertools.count(1)


class _Listener(HTTPServer):
    request_queue_size = 1024  # hundreds of small reads arrive at once; they are served one after the other


def serve() -> None:
    """Runs the emulator, its objects in memory, and says on standard output where it listens."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True)
    server._read_data = partial(_read_data, server._read_data, server._read_raw_data)

    class Handler(server.RequestHandler):
        """Says which generation an object has, as Google does and the emulator does not: TensorStore wants to know."""

        def end_headers(self) -> None:
            if generation := _generation(storage, self.path):
                self.send_header("x-goog-generation", generation)
            super().end_headers()

    listener = _Listener(("127.0.0.1", 0), partial(Handler, storage))
    print(f"http://127.0.0.1:{listener.server_port}", flush=True)
    listener.serve_forever()


def _read_data(otherwise: Any, read_raw: Any, handler: Any, query: Any) -> Any:
    """The body of a request; of an upload with its metadata (`multipart/related`), both parts to the byte."""
    content_type = handler.headers.get("Content-Type") or ""
    if not content_type.startswith("multipart/related"):
        return otherwise(handler, query)
    between = b"--" + re.search(r'boundary="?([^";]+)', content_type)[1].encode()
    raw = read_raw(handler)
    end = b"\r\n" if raw.startswith(between + b"\r\n") else b"\n"  # gcsfs ends its lines with the latter
    _, about, content = (end + raw).split(end + between)[:3]
    about, (header, content) = about.split(2 * end, 1)[1], content.split(2 * end, 1)
    kind = re.search(rb"(?i)content-type:\s*(\S+)", header)
    return {"meta": json.loads(about), "content": content, "content-type": kind[1].decode() if kind else None}


def _generation(storage: Any, path: str) -> str | None:
    """Of the object that a request is about, if there is one."""
    url = urlsplit(path)
    found = re.search(r"/b/([^/]+)/o(?:/([^/]+))?$", url.path)
    names = [found[2]] if found and found[2] else parse_qs(url.query).get("name", [])
    if not found or not names:
        return None
    try:
        return storage.get_file_obj(found[1], unquote(names[0]))["generation"]
    except Exception:  # no such object: the emulator has its own kind for each way to say so
        return None


@contextmanager
def emulator() -> Iterator[tuple[subprocess.Popen, str]]:
    """An emulator in a process of its own, and its address."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[str]:
    """Address of an emulator that all tests share."""
    with emulator() as (_, address):
        yield address


@pytest.fixture
def bucket(gcs_emulator: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an empty bucket, `gs://…`, without credentials."""
    import fsspec

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)  # for gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", gcs_emulator)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "fake")  # for TensorStore, which would look for credentials
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")  # for child processes;
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # this one has read its environment already
    name = f"bucket-{next(_numbers)}"
    fs = fsspec.filesystem("gs")
    fs.mkdir(name)
    yield f"gs://{name}"
    fs.clear_instance_cache()  # holds the emulator's address


if __name__ == "__main__":
    serve()
