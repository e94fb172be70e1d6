"""Features of pictures on disk, so that a frozen vision tower encodes each picture once for all later runs.

`<data.image_cache>/<key of the tower>/<sha256 of the picture's file>` is the features [n, I] before the projector, in
the tower's dtype, and nothing else; a file is complete or absent. `tower.json` next to them describes the tower.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.pictures import Picture
from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import filesystem, is_remote, join, list_folder, open_bytes

logger = logging.getLogger(__name__)

DESCRIPTION = "tower.json"
BATCH = 8  # pictures encoded at a time: 150 MB of patches at 1120 soft tokens each
READERS = 16  # files read at a time, since those in a bucket wait for the network
PROGRESS_SECONDS = 10.0


class Encoder(Protocol):
    """A frozen vision tower."""

    dtype: Any
    dim: int

    @property
    def key(self) -> str:
        """Key of everything that determines features besides the picture."""

    def encode(self, images: Sequence[Any]) -> list[np.ndarray]:
        """Features [n, I] of each PIL image."""


class FeatureCache:
    """The features of one tower.

    Args:
      place: `data.image_cache`, a local or remote folder.
      tower: makes missing features.
      share: (index, count) of this process among those of the run, which divide the work by the pictures' keys.

    Raises:
      UserError: the folder can't be written to.
    """

    def __init__(self, place: str, tower: Encoder, share: tuple[int, int] = (0, 1)):
        self.folder = join(place, tower.key[:32])
        self.dim, self.dtype = tower.dim, np.dtype(tower.dtype)
        self._tower, self._share = tower, share
        try:
            _write(join(self.folder, DESCRIPTION), _described(tower))
        except OSError as error:
            raise UserError(
                f"{place}: features of pictures can't be written there ({error}); give another folder as"
                " data.image_cache, or in an evaluation as eval.image_cache"
            ) from None
        self._there = set(list_folder(self.folder))
        self._found: set[str] = set()
        self._made = 0
        self._seconds, self._report_at = 0.0, time.monotonic() + PROGRESS_SECONDS

    def ensure(self, pictures: Sequence[Picture]) -> None:
        """Makes this process's share of the missing features of pictures."""
        self._found |= {picture.key for picture in pictures if picture.key in self._there}
        new = {picture.key: picture for picture in pictures if picture.key not in self._there}
        index, count = self._share
        own = [picture for picture in new.values() if int(picture.key[:8], 16) % count == index]
        for start in range(0, len(own), BATCH):
            batch, started = own[start : start + BATCH], time.monotonic()
            for picture, features in zip(batch, self._tower.encode(list(map(_image, batch))), strict=True):
                if features.shape != (picture.tokens, self.dim):
                    raise UserError(
                        f"picture {picture.key[:12]}: the vision tower makes {len(features)} tokens from it, the"
                        f" processor {picture.tokens}; install a version of transformers that fits the checkpoint"
                    )
                _write(join(self.folder, picture.key), features.astype(self.dtype).tobytes())
            self._there |= {picture.key for picture in batch}
            self._made += len(batch)
            self._seconds += time.monotonic() - started
            if time.monotonic() > self._report_at:
                logger.info("%s", self.told())
                self._report_at = time.monotonic() + PROGRESS_SECONDS

    def told(self) -> str:
        """States how many features were made and how many were found."""
        rate = f" ({self._made / self._seconds:.2f} a second)" if self._seconds else ""
        return f"features of pictures: {self._made} made{rate}, {len(self._found)} found in {self.folder}"

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The keys without features, whichever process was to make them."""
        there = set(list_folder(self.folder))
        return [key for key in dict.fromkeys(keys) if key not in there]

    def read(self, keys: Sequence[str]) -> list[np.ndarray]:
        """Features [n, I] of each picture.

        Raises:
          UserError: some are missing or incomplete.
        """
        if len(keys) < 2 or not is_remote(self.folder):
            return [self._read(key) for key in keys]
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(self._read, keys))

    def _read(self, key: str) -> np.ndarray:
        try:
            file = open_bytes(join(self.folder, key))
            data = bytes(file.read(0, file.size_bytes))
        except FileNotFoundError:
            raise UserError(
                f"{join(self.folder, key)}: the features of a picture are gone; the same command makes them again"
            ) from None
        row_bytes = self.dim * self.dtype.itemsize
        if not data or len(data) % row_bytes:
            raise UserError(f"{join(self.folder, key)}: incomplete ({len(data)} bytes); delete it and start again")
        return np.frombuffer(data, self.dtype).reshape(-1, self.dim)


class Features(Protocol):
    """A source of features: the cache, or a few in memory."""

    @property
    def dim(self) -> int:
        """Width I."""

    @property
    def dtype(self) -> Any:
        """The NumPy dtype."""

    def read(self, keys: Sequence[str]) -> list[np.ndarray]:
        """Features [n, I] of each picture."""


@dataclass(frozen=True)
class Shown:
    """The features of pictures, and their places in rows."""

    features: Features
    image_token: int
    """The id of a soft token."""

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Zeros [*shape, I]."""
        return np.zeros((*shape, self.features.dim), self.features.dtype)

    def of_rows(self, tokens: np.ndarray, keys: Sequence[Sequence[str]]) -> np.ndarray:
        """Features [B, P, I] of the pictures (keys of each row) in tokens [B, P]."""
        features = self.empty(tokens.shape)
        for row, own in enumerate(keys):
            self.lay(tokens[row], own, features[row])
        return features

    def lay(self, ids: np.ndarray, keys: Sequence[str], view: np.ndarray) -> None:
        """Writes the features of pictures into view [n, I] at the positions of their soft tokens in ids [n], in order.

        Keys in excess of the pictures in `ids` belong to later tokens.

        Raises:
          UserError: the numbers of soft tokens and features differ.
        """
        soft = ids == self.image_token
        if not soft.any():
            return
        places = np.flatnonzero(soft)
        keys = keys[: int(np.count_nonzero(np.diff(places) > 1)) + 1]  # delimiters separate two pictures
        found = np.concatenate([self.empty((0,)), *self.features.read(keys)])
        if len(found) != len(places):
            raise UserError(
                f"{len(places)} soft tokens but {len(found)} features of {len(keys)} pictures: data.image_cache does"
                " not match these rows; delete it and start again"
            )
        view[places] = found


def _image(picture: Picture) -> Any:
    try:
        return picture.image()
    except RowDropped as problem:  # it was readable a moment ago
        raise UserError(f"a picture can no longer be read ({problem.detail}); restore it and start again") from None


def _described(tower: Encoder) -> bytes:
    told = {"key": tower.key, "dim": tower.dim, "dtype": np.dtype(tower.dtype).name}
    return (json.dumps(told, indent=2) + "\n").encode()


def _write(path: str, data: bytes) -> None:
    """Writes a file atomically, and creates its folder."""
    if is_remote(path):
        store, inside = filesystem(path)
        store.makedirs(inside.rpartition("/")[0], exist_ok=True)
        store.pipe_file(inside, data)
        return
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)  # not synced, which takes as long as the tower; incomplete files are refused on reading
    os.replace(temporary, final)
