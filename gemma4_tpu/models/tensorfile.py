"""Reads tensors, or slices of them, from safetensors files: one file or a sharded checkpoint, local or gs://.

A local read is a view into a memory map of just the bytes it needs: nothing is copied, and the pages are released with
the view. A remote read fetches just those bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from gemma4_tpu.checkpoint_folder import INDEX_NAME, SINGLE_NAME, no_checkpoint
from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import join, list_folder, open_bytes, read_json

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64), "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16), "I16": np.dtype(np.int16), "U32": np.dtype(np.uint32), "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64), "I64": np.dtype(np.int64), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SAMPLE_BYTES = 512  # of each tensor, used for the fingerprint

Index = Sequence[slice]


@dataclass(frozen=True)
class TensorInfo:
    """A header's entry for one tensor; `start` and `stop` are byte offsets in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """One safetensors file, with its header read and checked.

    Raises:
      UserError: the file is truncated or damaged; names the file and, if a single tensor is at fault, the tensor.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            self._file = open_bytes(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        self.size_bytes = self._file.size_bytes
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._parse(self._header())

    def _header(self) -> dict[str, Any]:
        if self.size_bytes < 8:
            raise UserError(f"{self.path}: {self.size_bytes} bytes are not a safetensors file; copy it again")
        (length,) = struct.unpack("<Q", self._file.read(0, 8))
        if length > min(self.size_bytes - 8, _MAX_HEADER_BYTES):
            raise UserError(
                f"{self.path}: claims a header of {length} bytes, but the file has {self.size_bytes}: truncated, or not"
                " a safetensors file; copy it again"
            )
        self.data_start = 8 + length
        try:
            header = json.loads(bytes(self._file.read(8, self.data_start)))
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise UserError(f"{self.path}: its header is not valid JSON: damaged; copy it again")
        return header

    def _parse(self, header: dict[str, Any]) -> None:
        self.metadata = header.pop("__metadata__", None) or {}
        for name, entry in header.items():
            self.tensors[name] = self._info(name, entry)
        stop = self.data_start
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if info.start != stop:
                raise UserError(f"{self.path}: tensor {name} starts at byte {info.start}, not {stop}: damaged header")
            stop = info.stop
            if stop > self.size_bytes:
                raise UserError(
                    f"{self.path}: truncated: tensor {name} ends at byte {stop}, the file at {self.size_bytes};"
                    " copy it again"
                )
        if stop != self.size_bytes:
            raise UserError(
                f"{self.path}: {self.size_bytes - stop} bytes after the last tensor: damaged; copy it again"
            )

    def _info(self, name: str, entry: Any) -> TensorInfo:
        try:
            code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            good = all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop))
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise UserError(f"{self.path}: tensor {name} has the damaged header entry {entry!r}; copy the file again")
        if code not in DTYPES:
            raise UserError(
                f"{self.path}: tensor {name} has the unknown dtype {code!r} (known: {', '.join(DTYPES)}); if the"
                " checkpoint is quantised, use the original one"
            )
        size_bytes = math.prod(shape) * DTYPES[code].itemsize
        if stop - start != size_bytes:
            raise UserError(
                f"{self.path}: tensor {name} {code}{list(shape)} needs {size_bytes} bytes, its offsets"
                f" [{start}, {stop}] hold {stop - start}: damaged header"
            )
        return TensorInfo(DTYPES[code], shape, self.data_start + start, self.data_start + stop)

    def read(self, name: str, index: Index | None = None, shape: Sequence[int] | None = None) -> np.ndarray:
        """A tensor or a slice of it, read-only and in the file's dtype.

        Args:
          name: of the tensor.
          index: one slice (step 1) per dim; None: all of it.
          shape: dims to view the tensor with (same number of elements), to which `index` applies. None: its own.

        Returns:
          A strided view into the bytes that the slice spans; only those are mapped or fetched.
        """
        info = self.tensors[name]
        shape = info.shape if shape is None else tuple(shape)
        if math.prod(shape) != math.prod(info.shape):
            raise ValueError(f"{name}: {info.shape} cannot be seen as {shape}")
        bounds = [s.indices(n) for s, n in zip(index or [slice(None)] * len(shape), shape, strict=True)]
        extent = tuple(max(0, stop - start) for start, stop, _ in bounds)
        if math.prod(extent) == 0:
            return np.ndarray(extent, info.dtype, buffer=b"")
        item = info.dtype.itemsize
        strides = [item * math.prod(shape[i + 1 :]) for i in range(len(shape))]
        first = info.start + sum(start * stride for (start, _, _), stride in zip(bounds, strides, strict=True))
        length = item + sum((n - 1) * stride for n, stride in zip(extent, strides, strict=True))
        data = self._file.read(first, first + length).toreadonly()
        return np.ndarray(extent, info.dtype, buffer=data, strides=strides)

    def read_bytes(self, start: int, stop: int) -> np.ndarray:
        """Bytes `[start, stop)` of the file, copied into an array of uint8."""
        data = np.empty(stop - start, np.uint8)
        self._file.read_into(start, data.data)
        return data

    def samples(self, names: Iterable[str]) -> list[bytes]:
        """A few bytes from the middle of each tensor."""
        ranges = []
        for name in names:
            info = self.tensors[name]
            start = max(info.start, (info.start + info.stop - _SAMPLE_BYTES) // 2)
            ranges.append((start, min(start + _SAMPLE_BYTES, info.stop)))
        return [bytes(data) for data in self._file.read_many(ranges)]


class Checkpoint:
    """The tensors of a checkpoint folder: `model.safetensors`, or the shards listed in `model.safetensors.index.json`.

    Raises:
      UserError: the folder does not exist, holds another kind of checkpoint, or a shard is missing or damaged; names
        the file and the tensor.
    """

    def __init__(self, folder: str):
        self.folder = folder.rstrip("/")
        present = list_folder(self.folder)
        if SINGLE_NAME in present:
            self.files = {SINGLE_NAME: TensorFile(join(self.folder, SINGLE_NAME))}
            self._home = dict.fromkeys(self.files[SINGLE_NAME].tensors, SINGLE_NAME)
        elif INDEX_NAME in present:
            self._home = self._read_index()
            self.files = self._open_shards(present)
        else:
            raise UserError(no_checkpoint(self.folder, present))

    def _read_index(self) -> dict[str, str]:
        path = join(self.folder, INDEX_NAME)
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{path}: has no weight_map; copy the file again")
        if odd := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
            raise UserError(f"{path}: places {odd[0]} in {weight_map[odd[0]]!r}, not a file name; copy the file again")
        return weight_map

    def _open_shards(self, present: list[str]) -> dict[str, TensorFile]:
        files: dict[str, TensorFile] = {}
        for name, shard in sorted(self._home.items()):
            if shard not in files:
                if shard not in present:
                    count = sum(other == shard for other in self._home.values())
                    raise UserError(
                        f"{join(self.folder, shard)}: missing; {INDEX_NAME} places {count} tensors there, {name} among"
                        " them; copy that shard too"
                    )
                files[shard] = TensorFile(join(self.folder, shard))
            if name not in files[shard].tensors:
                raise UserError(
                    f"{join(self.folder, shard)}: has no tensor {name}, though {INDEX_NAME} places it there"
                )
        for shard, file in files.items():
            if twice := [name for name in file.tensors if self._home.get(name, shard) != shard]:
                raise UserError(
                    f"{join(self.folder, shard)}: holds {twice[0]}, which {INDEX_NAME} places in"
                    f" {self._home[twice[0]]}: which of the two counts depends on the reader; copy the checkpoint again"
                )
        return files

    def names(self) -> list[str]:
        """Every tensor, sorted."""
        return sorted(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def file_of(self, name: str) -> TensorFile:
        """The file that holds a tensor."""
        return self.files[self._home[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as stored."""
        return self.file_of(name).tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Dtype of a tensor, as stored."""
        return self.file_of(name).tensors[name].dtype

    def read(self, name: str, index: Index | None = None, shape: Sequence[int] | None = None) -> np.ndarray:
        """As `TensorFile.read`."""
        return self.file_of(name).read(name, index, shape)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 that distinguishes checkpoints without reading them whole.

        It covers every tensor's name, dtype and shape and 512 bytes from its middle, in order of names, so it does not
        depend on how the tensors are distributed over shards. It identifies a checkpoint; it does not detect every
        flipped bit.
        """
        samples: dict[str, bytes] = {}
        for file_name, file in self.files.items():
            own = [name for name, home in self._home.items() if home == file_name]
            samples |= dict(zip(own, file.samples(own), strict=True))
        digest = hashlib.sha256()
        for name in self.names():
            digest.update(f"{name} {self.dtype(name)} {self.shape(name)}\n".encode() + samples[name])
        return digest.hexdigest()
