"""Pictures in rows: their places among the parts of a conversation, and the files, addresses or bytes they come from.

A part in normal form is `{"type": "image", "image": Picture}`. Pictures are identified by the contents of their files,
so one picture under ten names counts once. Pillow opens only a fixed list of formats, since some others start programs.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, unquote_to_bytes, urlparse

from gemma4_tpu.data.calls import Tell, Turn
from gemma4_tpu.data.checks import HUGGING_FACE
from gemma4_tpu.data.drops import Origin, RowDropped
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.data.turns import IMAGE_PART
from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import is_remote, join, open_bytes

COLUMNS = ("images", "image")
"""Columns with a row's pictures, in the order of their places in its turns."""
PLACE = "<image>"
"""Placeholder in a text for a picture of the column, as in LLaVA's rows."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are opened, if this Pillow supports them; of animations, the first frame."""
ENCODED = ("base64", "data")
"""Keys of an object that contain a picture as base64."""
_SAYS_BASE64 = re.compile(r";\s*base64\s*$", re.IGNORECASE)
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**26
"""67 megapixels, 200 MB once decoded; a model sees less than one megapixel."""


@dataclass(frozen=True)
class Picture:
    """A readable picture."""

    key: str
    """sha256 of its file, in hexadecimal."""
    tokens: int
    """Number of its soft tokens."""
    source: str | bytes = field(repr=False, compare=False)
    """Its file, as an address or as bytes."""

    def __str__(self) -> str:
        return self.key

    def image(self) -> Any:
        """The picture as a PIL image in RGB, rotated as its file says.

        Raises:
          RowDropped: the file is gone or has changed.
        """
        return _opened(self._file())

    def data_url(self) -> str:
        """The picture for a server, with the pixels of `image` whatever decoder the server uses.

        Raises:
          RowDropped: as for `image`.
        """
        content = self._file()
        kind = _plain_kind(content)
        if kind is None:
            out = io.BytesIO()
            _opened(content).save(out, "PNG", transparency=None)
            kind, content = "png", out.getvalue()
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

    def _file(self) -> bytes:
        content = _content(self.source) if isinstance(self.source, str) else self.source
        if _key(content) != self.key:
            raise RowDropped("unreadable_picture", f"{self.source!r}: changed while rows were read")
        return content


class TokenCounter(Protocol):
    """Counts the soft tokens of a picture."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the count."""

    def tokens(self, width: int, height: int) -> int:
        """Soft tokens of a picture of this size in pixels. Raises: ValueError: the size is not supported."""


class PictureReader:
    """Finds the pictures of rows and checks them."""

    def __init__(self, processor: TokenCounter):
        self._processor = processor
        self.fingerprint = json.dumps(processor.settings, sort_keys=True)
        """The settings that determine the pictures' token counts."""

    def within(self, conversation: Conversation, given: Any, origin: Origin, tell: Tell) -> Conversation:
        """Loads the pictures of a conversation; returns it with them.

        Args:
          conversation: in normal form; its picture parts contain what the row says about each, or nothing.
          given: the row's column of pictures, for the empty parts, in order.
          origin: the row's origin; paths are relative to its file.
          tell: records what was done.

        Raises:
          RowDropped: a picture is missing, unreadable or too large, or has no place.
        """
        turns, rest = conversation.messages, _listed(given)
        parts = list(picture_parts(turns))
        if rest and not parts:
            turns = _placed(turns, len(rest), tell)
        elif rest and all(part["image"] is not None for part in parts):
            tell("column of pictures unused: the turns have their own")
            rest = []
        if any(PLACE in text for turn in turns if turn["role"] == "user" for text in _texts(turn)):
            tell("<image> in texts left as text: no picture of a column belongs there")
        waiting = sum(part["image"] is None for part in picture_parts(turns))
        if waiting != len(rest):
            raise RowDropped("missing_picture", f"{len(rest)} in the column for {waiting} places in the turns")
        column = iter(rest)

        def read(part: Turn) -> Turn:
            if part["type"] != IMAGE_PART:
                return part
            what = next(column) if part["image"] is None else part["image"]
            return {"type": IMAGE_PART, "image": self.read(what, origin)}

        made = [
            {**turn, "content": [read(part) for part in turn["content"]]} if _in_parts(turn) else turn for turn in turns
        ]
        return Conversation(made, conversation.tools, conversation.text)

    def read(self, what: Any, origin: Origin) -> Picture:
        """Reads the picture that a row gives as a path, an address, a data: URL, bytes, or a struct of these.

        Raises:
          RowDropped: it is missing, unreadable or too large, or would have to be fetched from the web.
        """
        source = _source(what, origin)
        content = _content(source) if isinstance(source, str) else source
        if len(content) > MAX_BYTES:
            raise RowDropped("picture_too_large", f"{len(content)} bytes, more than {MAX_BYTES}")
        try:
            image = _opened(content)
            tokens = self._processor.tokens(*image.size)
        except RowDropped as problem:
            raise RowDropped(problem.reason, f"{_name(source)}{problem.detail}") from None
        except ValueError as error:
            raise RowDropped("unreadable_picture", f"{_name(source)}{error}"[:160]) from None
        return Picture(_key(content), tokens, source)


def _name(source: str | bytes) -> str:
    """Name of a picture's file, for messages."""
    return f"{source.rpartition('/')[2][-60:]}: " if isinstance(source, str) else ""


def _key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def picture_parts(turns: Sequence[Turn]) -> Iterator[Turn]:
    """The parts of turns that are pictures, in order."""
    return (part for turn in turns if _in_parts(turn) for part in turn["content"] if part.get("type") == IMAGE_PART)


def pictures_of(turns: Sequence[Turn]) -> list[Picture]:
    """The pictures of turns in normal form, in order."""
    return [part["image"] for part in picture_parts(turns)]


def _in_parts(turn: Turn) -> bool:
    return isinstance(turn.get("content"), list)


def _listed(given: Any) -> list[Any]:
    """A column of pictures as a list, without null entries for absent ones."""
    return [one for one in (given if isinstance(given, list) else [given]) if one is not None]


def _placed(turns: list[Turn], count: int, tell: Tell) -> list[Turn]:
    """Turns with places for `count` pictures: at each `<image>` in users' texts, else before the first of these."""
    users = [turn for turn in turns if turn["role"] == "user"]
    found = sum(text.count(PLACE) for turn in users for text in _texts(turn))
    if found:
        tell("<image> in texts read as the places of the column's pictures")
        return [{**turn, "content": _cut(turn)} if turn["role"] == "user" else turn for turn in turns]
    if not users:
        return turns
    tell("pictures of the column placed before the first question")
    places = [{"type": IMAGE_PART, "image": None}] * count
    first = next(position for position, turn in enumerate(turns) if turn["role"] == "user")
    return [
        {**turn, "content": [*places, *_parts(turn)]} if position == first else turn
        for position, turn in enumerate(turns)
    ]


def _parts(turn: Turn) -> list[Turn]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(turn: Turn) -> list[str]:
    return [part["text"] for part in _parts(turn) if part["type"] == "text"]


def _cut(turn: Turn) -> list[Turn]:
    """The parts of a turn, with its texts split at each `<image>`."""
    made: list[Turn] = []
    for part in _parts(turn):
        if part["type"] != "text":
            made.append(part)
            continue
        for number, text in enumerate(part["text"].split(PLACE)):
            made += [{"type": IMAGE_PART, "image": None}] if number else []
            made += [{"type": "text", "text": own}] if (own := text.strip()) else []
    return made


def _source(what: Any, origin: Origin) -> str | bytes:
    """The bytes of a picture, or the address of its file."""
    if isinstance(what, Picture):  # it is read already
        return what.source
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


def _content(address: str) -> bytes:
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


def _opened(content: bytes) -> Any:
    """A decoded PIL image in RGB; its size is checked before any pixel is decoded."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise UserError(f"pictures need the extra: pip install 'gemma4-tpu[pictures]' ({error})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; real problems raise
            image = Image.open(io.BytesIO(content), formats=_formats())
            if image.width * image.height > MAX_PIXELS:
                told = f"{image.width} × {image.height} pixels, more than {MAX_PIXELS} in all"
                raise RowDropped("picture_too_large", told)
            if image.mode.startswith(("I", "F")):  # its values would be clipped at 255, here and in servers
                raise RowDropped("unreadable_picture", f"mode {image.mode}, over 8 bits per channel: save it with 8")
            return ImageOps.exif_transpose(image).convert("RGB")
    except RowDropped:
        raise
    except Image.DecompressionBombError as error:
        raise RowDropped("picture_too_large", str(error)[:100]) from None
    except UnidentifiedImageError:
        raise RowDropped("unreadable_picture", f"not one of {', '.join(_formats())}") from None
    except Exception as error:  # whatever a decoder raises for damaged bytes
        raise RowDropped("unreadable_picture", f"{type(error).__name__}: {error}"[:100]) from None


def _formats() -> list[str]:
    """The formats that this Pillow supports: given an unknown one, it ignores all those listed after it."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _plain_kind(content: bytes) -> str | None:
    """`png`, `jpeg` or `webp` for a file that every decoder turns into the same pixels; None for any other.

    Decoders differ in their handling of transparency, palettes, inks, EXIF rotation and animations.
    """
    from PIL import ExifTags, Image

    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        moves = getattr(image, "is_animated", False)
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        kind = (image.format or "").lower()
        opaque = image.mode in ("RGB", "L") and "transparency" not in image.info  # PNG: of a single colour
        plain = kind in ("png", "jpeg", "webp") and opaque and upright and not moves
        return kind if plain else None
