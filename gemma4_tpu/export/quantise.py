"""Writes a merged checkpoint with its products in int8 or fp8, in the compressed-tensors format that vLLM and others
load.

Every matrix of attention, MLP and experts is rounded to nearest, with a scale per row (output channel): weight ≈ scale
· stored. Embedding, norms, router and other modalities are copied. Servers quantise activations per token at run time,
or not at all (`weight_only`), so no calibration is needed. Experts are stored as separate matrices
(`experts.7.gate_proj.weight`), as llm-compressor does.

Streamed like the merge: block of rows by block of rows, journalled, shard by shard.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.checkpoint_folder import INDEX_NAME
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.companions import copy_file
from gemma4_tpu.export.pieces import WORKERS, Piece, as_bytes, copies, in_order
from gemma4_tpu.export.place import JOURNAL, Place
from gemma4_tpu.export.schemes import Scheme
from gemma4_tpu.models.expert_files import modules
from gemma4_tpu.models.names import name_map
from gemma4_tpu.models.tensorfile import DTYPES, Checkpoint, TensorFile, TensorInfo
from gemma4_tpu.storage import join, list_folder, read_json

log = logging.getLogger(__name__)

BLOCK_VALUES = 4 << 20  # values of a matrix quantised at a time
VALUE_BYTES = 16  # memory per value meanwhile: as stored, in float32, scaled, its error, quantised
_SHAPE = np.dtype(np.int64)
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Matrix:
    """A matrix `[rows, width]` that is stored quantised."""

    name: str
    """Name of its weights, with prefix; also on disk, unless they are packed."""
    source: str
    """The tensor of the merged checkpoint that contains it."""
    start: int
    """Its first row there."""
    rows: int
    width: int

    @property
    def scale_name(self) -> str:
        """Name of its scales `[rows, 1]`."""
        return f"{self.name}_scale"

    @property
    def shape_name(self) -> str:
        """Name of the tensor with its rows and width, if it is packed."""
        return f"{self.name}_shape"

    def read(self, file: TensorFile | Checkpoint, start: int, stop: int) -> np.ndarray:
        """Its rows `[start, stop)` in float32, from the merged checkpoint or a file of it."""
        shape = file.tensors[self.source].shape if isinstance(file, TensorFile) else file.shape(self.source)
        where = [slice(self.start + start, self.start + stop), slice(None)]
        return file.read(self.source, where, (math.prod(shape[:-1]), self.width)).astype(np.float32)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of its rows, block by block."""
        step = max(1, BLOCK_VALUES // self.width)
        return ((at, min(at + step, self.rows)) for at in range(0, self.rows, step))


def parts_of(arch: Architecture, prefix: str) -> dict[str, list[Matrix]]:
    """Tensor of the merged checkpoint → the matrices that it is stored as; unchanged tensors have none."""
    found: dict[str, list[Matrix]] = {}
    for tensor in name_map(arch).values():
        if tensor.weight.role is None:
            continue
        *each, rows, width = tensor.hf_shape
        for name in tensor.hf_names:
            names = [[f"{own}.weight" for own in row] for row in modules(name, *each)] if each else [[name]]
            own = rows // len(names[0])
            found[prefix + name] = [
                Matrix(prefix + matrix, prefix + name, number * own, own, width)
                for number, matrix in enumerate(matrix for row in names for matrix in row)
            ]
    return found


@dataclass(frozen=True)
class Shard:
    """Contents of one file of the quantised checkpoint, in order: shapes, copies, matrices, their scales, and copies of
    numbers smaller than the matrices'.

    Element sizes decrease from one to the next, except for the scales after the matrices, whose sizes are even, so all
    stay aligned.
    """

    file: TensorFile
    """File of the merged checkpoint."""
    parts: tuple[Matrix, ...]
    scheme: Scheme

    @classmethod
    def of(cls, file: TensorFile, parts: Mapping[str, Sequence[Matrix]], scheme: Scheme) -> Shard:
        """The shard made from a file of the merged checkpoint."""
        names = sorted(file.tensors.keys() & parts.keys(), key=lambda name: file.tensors[name].start)
        return cls(file, tuple(part for name in names for part in parts[name]), scheme)

    def _copied(self) -> tuple[list[tuple[str, TensorInfo]], list[tuple[str, TensorInfo]]]:
        """Unchanged tensors, largest element size first: those before the matrices, and those after."""
        sources = {part.source for part in self.parts}
        kept = [item for item in self.file.tensors.items() if item[0] not in sources]
        kept.sort(key=lambda item: (-item[1].dtype.itemsize, item[1].start))
        _, dtype, _ = self.scheme.stored(1, 1)
        before = sum(info.dtype.itemsize >= dtype.itemsize for _, info in kept)
        return kept[:before], kept[before:]

    def scale_dtype(self, part: Matrix) -> np.dtype[Any]:
        """The dtype of the merged weights."""
        return self.file.tensors[part.source].dtype

    def entries(self) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
        """Name, dtype and shape of every tensor, in order."""
        if self.scheme.packed:
            yield from ((part.shape_name, _SHAPE, (2,)) for part in self.parts)
        larger, smaller = self._copied()
        yield from ((name, info.dtype, info.shape) for name, info in larger)
        for part in self.parts:
            added, dtype, shape = self.scheme.stored(part.rows, part.width)
            yield part.name + added, dtype, shape
        yield from ((part.scale_name, self.scale_dtype(part), (part.rows, 1)) for part in self.parts)
        yield from ((name, info.dtype, info.shape) for name, info in smaller)

    def header(self) -> bytes:
        """The safetensors header."""
        found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        stop = 0
        for name, dtype, shape in self.entries():
            start, stop = stop, stop + dtype.itemsize * math.prod(shape)
            found[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, stop]}
        text = json.dumps(found, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def tensor_bytes(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self.entries())

    def before_scales(self) -> Iterator[Piece]:
        """The bytes up to the scales; each piece of a matrix comes with its scales and errors."""
        if self.scheme.packed:
            shapes = np.array([(part.rows, part.width) for part in self.parts], _SHAPE)
            yield Piece(None, shapes.nbytes, lambda: (as_bytes(shapes), None))
        for _, info in self._copied()[0]:
            yield from copies(self.file, info.start, info.stop)
        for part in self.parts:
            for start, stop in part.blocks():
                yield Piece(
                    part.name, VALUE_BYTES * (stop - start) * part.width, partial(self._made, part, start, stop)
                )

    def behind_scales(self) -> Iterator[Piece]:
        """The bytes from there to the end."""
        for _, info in self._copied()[1]:
            yield from copies(self.file, info.start, info.stop)

    def _made(self, part: Matrix, start: int, stop: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        values = part.read(self.file, start, stop)
        numbers, scales = self.scheme.quantised(values, self.scale_dtype(part))
        error = numbers.astype(np.float32) * scales.astype(np.float32) - values
        sums = np.array([np.vdot(error, error), np.vdot(values, values)], np.float64)
        return as_bytes(self.scheme.pack(numbers)), (scales, sums)


class Quantiser:
    """Writes a merged checkpoint with its products quantised."""

    def __init__(self, merged: Checkpoint, arch: Architecture, prefix: str, scheme: Scheme):
        self._merged, self._scheme = merged, scheme
        self._parts = parts_of(arch, prefix)
        self._shards = {name: Shard.of(file, self._parts, scheme) for name, file in sorted(merged.files.items())}

    @property
    def needed_bytes(self) -> int:
        """Bytes that the weights take on disk."""
        return sum(shard.tensor_bytes + len(shard.header()) for shard in self._shards.values())

    def run(self, place: Place) -> dict[str, float]:
        """Writes every file except `config.json` to the staging folder; returns the relative rms error of each tensor.

        Raises:
          UserError: NaN or infinity among the weights.
        """
        errors: dict[str, float] = {}
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="quantise") as workers:
            for number, (name, shard) in enumerate(self._shards.items(), 1):
                noted = place.done(name)
                errors |= self._write(name, shard, place, workers) if noted is None else noted["errors"]
                log.info("shard %d/%d: %s%s", number, len(self._shards), name, " (done before)" if noted else "")
        if INDEX_NAME in list_folder(self._merged.folder) and place.done(INDEX_NAME) is None:
            with place.create(INDEX_NAME) as out:
                out.write(json.dumps(self._index(), indent=2).encode() + b"\n")
                place.finish(INDEX_NAME, out)
        for name in self._companions():
            if place.done(name) is None:
                copy_file(join(self._merged.folder, name), place, name, {})
        return errors

    def write_config(self, place: Place) -> None:
        """Writes `config.json`, without which nothing loads."""
        config = read_json(join(self._merged.folder, "config.json")) | {"quantization_config": self._config()}
        with place.create("config.json") as out:
            out.write(json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
            place.finish("config.json", out)

    def _write(self, name: str, shard: Shard, place: Place, workers: ThreadPoolExecutor) -> dict[str, float]:
        scales: dict[str, list[np.ndarray]] = {part.name: [] for part in shard.parts}
        sums = {part.source: np.zeros(2) for part in shard.parts}
        sources = {part.name: part.source for part in shard.parts}
        with place.create(name) as out:
            out.write(shard.header())
            for own, (data, about) in in_order(workers, shard.before_scales()):
                out.write(data)
                if own is not None:
                    scales[own].append(about[0])
                    sums[sources[own]] += about[1]
            for part in shard.parts:
                out.write(as_bytes(np.concatenate(scales[part.name])))
            for _, (data, _) in in_order(workers, shard.behind_scales()):
                out.write(data)
            if bad := [source for source, both in sums.items() if not np.isfinite(both).all()]:
                raise UserError(f"{self._merged.folder}: {bad[0]} holds NaN or infinity; nothing was published")
            errors = {source: math.sqrt(error / whole) if whole else 0.0 for source, (error, whole) in sums.items()}
            place.finish(name, out, errors=errors)
        return errors

    def _index(self) -> dict[str, Any]:
        homes = {entry: name for name, shard in self._shards.items() for entry, _, _ in shard.entries()}
        total = sum(shard.tensor_bytes for shard in self._shards.values())
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}

    def _companions(self) -> list[str]:
        """Tokenizer, template, probe: everything in the merged folder besides weights and `config.json`."""
        own = {INDEX_NAME, JOURNAL, "config.json", *self._merged.files}
        return [name for name in list_folder(self._merged.folder) if name not in own]

    def _config(self) -> dict[str, Any]:
        """The configuration with compressed-tensors' `quantization_config`, which names every unquantised module, since
        the target `Linear` matches all of them.
        """
        numbers = {"num_bits": 8, "type": self._scheme.kind, "symmetric": True}
        activations = None if self._scheme.weight_only else numbers | {"strategy": "token", "dynamic": True}
        kept = {name for name in self._merged.names() if name.endswith(".weight") and name not in self._parts}
        linear = {name.removesuffix(".weight") for name in kept if len(self._merged.shape(name)) > 1}
        return {
            "quant_method": "compressed-tensors",
            "format": self._scheme.layout,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": numbers | {"strategy": "channel", "dynamic": False},
                    "input_activations": activations,
                }
            },
            "ignore": sorted(linear | {"lm_head"}),
        }
