"""Pixels of pictures, decoded by Pillow, which opens only a fixed list of formats, since some others start programs."""

from __future__ import annotations

import io
import warnings
from typing import Any

from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are opened, if this Pillow supports them; of animations, the first frame."""
MAX_PIXELS = 2**26
"""67 megapixels, 200 MB once decoded; a model sees less than one megapixel."""


def decoded(content: bytes) -> Any:
    """A PIL image in RGB, rotated as its file says; its size is checked before any pixel is decoded.

    Raises:
      RowDropped: it is too large, damaged, or in a format or mode that is not opened.
    """
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


def plain_kind(content: bytes) -> str | None:
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
