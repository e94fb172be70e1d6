"""Bytes of the pictures of rows: from paths, addresses, data: URLs, base64, or structs of these."""

from __future__ import annotations

import base64
import binascii
import errno
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlparse

from gemma4_tpu.data.checks import HUGGING_FACE
from gemma4_tpu.data.drops import Origin, RowDropped
from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import is_remote, join, open_bytes

ENCODED = ("base64", "data")
"""Keys of an object that contain a picture as base64."""
_SAYS_BASE64 = re.compile(r";\s*base64\s*$", re.IGNORECASE)
MAX_BYTES = 64 * 2**20


def source_of(what: Any, origin: Origin) -> str | bytes:
    """The bytes of a picture, or the address of its file, whichever a row gives.

    Raises:
      RowDropped: it gives neither, or the file is on the web or can't be found from here.
    """
    if isinstance(what, dict):  # as `datasets` stores pictures, and as parts of OpenAI's and Anthropic's nest them
        key = next((key for key in ("bytes", "url", "path", *ENCODED) if what.get(key)), None)
        what = what.get(key)
        if key in ("bytes", *ENCODED) and isinstance(what, str):  # JSON has no bytes
            return _unpacked(what)
    if isinstance(what, bytes | bytearray | memoryview):
        return bytes(what)
    if not isinstance(what, str) or not what:
        raise RowDropped("missing_picture", f"{type(what).__name__} instead of a path, an address or bytes")
    if _is_data(what):
        return _of_data(what)
    scheme = what.partition("://")[0].lower() if is_remote(what) else ""
    if scheme in ("http", "https", "ftp"):
        raise RowDropped("picture_on_the_web", what[:80])
    if origin.file.startswith(HUGGING_FACE) and not is_remote(origin.file):
        raise RowDropped(
            "missing_picture", f"a path ({what[:60]}) in a data set of the Hub, whose pictures must be bytes"
        )
    if what[:6].lower() == "file:/":
        address = urlparse(what)
        if address.netloc not in ("", "localhost"):
            raise RowDropped("missing_picture", f"{what[:80]}: names a host; write file:///<path>, or the path alone")
        what = unquote(address.path)
    elif scheme:
        return what
    if is_remote(origin.file):
        if what.startswith("/"):
            raise RowDropped("missing_picture", f"{what[:80]}: a path on this machine, in rows that are elsewhere")
        return join(origin.file.rpartition("/")[0], what)
    return str(Path(origin.file).parent / os.path.expanduser(what))


def _is_data(address: str) -> bool:
    return address[:5].lower() == "data:"


def _of_data(address: str) -> bytes:
    """The bytes of a `data:` address (RFC 2397); its media type is ignored."""
    head, _, body = address.partition(",")
    if _SAYS_BASE64.search(head):
        return _unpacked(unquote(body))
    if "%" not in body:  # no picture is plain text
        raise RowDropped("unreadable_picture", "a data: address that does not say ;base64")
    return unquote_to_bytes(body)


def _unpacked(text: str) -> bytes:
    """The bytes of base64, which can be broken into lines; or of a `data:` address in its place."""
    if _is_data(text):
        return _of_data(text)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowDropped("unreadable_picture", f"not base64 ({error})") from None


def content_of(address: str) -> bytes:
    """The bytes of the file at an address, local or remote.

    Raises:
      RowDropped: it is missing, unreadable or too large.
    """
    try:
        file = open_bytes(address)
        if file.size_bytes > MAX_BYTES:
            raise RowDropped("picture_too_large", f"{address}: {file.size_bytes} bytes, more than {MAX_BYTES}")
        return bytes(file.read(0, file.size_bytes))
    except (OSError, UserError, ValueError) as error:  # ValueError: an invalid address, such as one with a null
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = reason.removeprefix(f"{address}: ")
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            reason += " (base64 is read under the key `base64`, and in data: addresses)"
        raise RowDropped("missing_picture", f"{_shortened(address)}: {reason[:100]}") from None


def _shortened(address: str) -> str:
    """An address for details, which can be megabytes of base64."""
    return address if len(address) <= 100 else f"{address[:30]}…{address[-69:]}"
