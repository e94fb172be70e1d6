"""Files of pictures as people have them: what is opened, what a server is sent of them, and what is dropped."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemma4_tpu.data.drops import Origin, RowDropped
from gemma4_tpu.data.picture_pixels import FORMATS
from gemma4_tpu.data.pictures import PictureReader


class Counter:
    """A token for each pixel of width."""

    @property
    def settings(self):
        return {}

    def tokens(self, width, height):
        return width


@pytest.fixture
def read(tmp_path):
    """Writes a picture and reads it as of a row beside it."""

    def run(image, name, **options):
        image.save(tmp_path / name, **options)
        return PictureReader(Counter()).read(name, Origin(str(tmp_path / "rows.jsonl"), 1))

    return run


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))


def sent(picture):
    """The pixels that a server gets, whatever it thinks of modes and turns."""
    head, _, data = picture.data_url().partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{image.format.lower()};base64" and image.mode in ("RGB", "L")
    return np.asarray(image.convert("RGB"))


def test_each_format_is_opened(read):
    Image.init()
    there = [name for name in FORMATS if name in Image.SAVE]
    assert len(there) >= 7
    for name in there:
        picture = read(NOISE, f"picture.{name.lower()}", format=name)
        assert picture.tokens == 12 and np.array_equal(sent(picture), picture.image()), name


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes_and_turns_reach_a_server_as_they_are_seen_here(read, mode):
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    picture = read(NOISE.convert(mode), "picture.tiff" if mode == "CMYK" else "picture.png", exif=exif)
    image = picture.image()
    assert (image.mode, image.size) == ("RGB", (8, 12))
    assert np.array_equal(sent(picture), image)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_colour_does_not_reach_a_server(read, mode):
    image = NOISE.convert(mode)
    picture = read(image, "picture.png", transparency=image.getpixel((3, 3)))
    data = base64.b64decode(picture.data_url().partition(",")[2])
    assert b"tRNS" in (picture.source if isinstance(picture.source, bytes) else Path(picture.source).read_bytes())
    assert b"tRNS" not in data and np.array_equal(sent(picture), picture.image())


def test_the_first_frame_of_a_moving_picture(read):
    for name in ("a.gif", "a.webp"):
        options = {"save_all": True, "append_images": [Image.new("RGB", NOISE.size)], "lossless": True}
        picture = read(Image.new("RGB", NOISE.size, (255, 0, 0)), name, **options)
        assert np.asarray(picture.image())[0, 0, 0] > 200 and np.array_equal(sent(picture), picture.image())


@pytest.mark.parametrize(("kind", "mode"), [(np.uint16, "I;16"), (np.float32, "F")])
def test_more_than_eight_bits_are_dropped_not_cut_off(read, kind, mode):
    deep = Image.fromarray(np.full((8, 12), 40_000, kind))
    with pytest.raises(RowDropped, match=rf"deep\.tiff: mode {mode}, over 8 bits per channel"):
        read(deep, "deep.tiff")
