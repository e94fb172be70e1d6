"""The streaming merge: shard by shard, block of rows by block of rows, with deltas in float32 and output in the base's
dtype.

Only blocks are in memory. Everything else in a shard is copied byte for byte, including its header, so layout and index
stay the base's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from gemma4_tpu.errors import UserError
from gemma4_tpu.export.companions import companions, copy_file
from gemma4_tpu.export.pieces import WORKERS, Piece, as_bytes, copies, in_order, rows_of
from gemma4_tpu.export.place import Place
from gemma4_tpu.export.trained import Change, Trained
from gemma4_tpu.models import token_rows
from gemma4_tpu.models.names import Tensor
from gemma4_tpu.models.tensorfile import TensorFile

log = logging.getLogger(__name__)

BLOCK_VALUES = 4 << 20  # values of a weight processed at a time: 16 MiB in float32
LORA_BYTES, FULL_BYTES = 12, 6  # per value of a block: base, result, and float32 copies (of the whole block for LoRA)
DORA_BYTES = LORA_BYTES + 8  # plus the difference from the base
PART_BYTES = 20  # per value of the part of a block that is read from a checkpoint at a time: its float32 copies


@dataclass(frozen=True)
class Delta:
    """What was added to one weight. Norms are Frobenius norms."""

    name: str
    """Name on disk, with prefix."""
    tunix_name: str
    norm: float
    base_norm: float
    values: int
    changed_values: int
    """Number of values that still differ from the base after rounding to its dtype."""

    @property
    def relative(self) -> float:
        return self.norm / self.base_norm if self.base_norm else math.inf


@dataclass
class Factors:
    """The adapter of one weight on disk; with a leading dim for experts."""

    a: np.ndarray
    """[r, in]."""
    b: np.ndarray
    """[out, r], scaled."""
    magnitude: np.ndarray | None
    """[out], with DoRA."""

    @property
    def squared_norm(self) -> float:
        """Squared norm of b @ a, from [r, r] matrices."""
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        return float(np.sum((b.swapaxes(-1, -2) @ b) * (a @ a.swapaxes(-1, -2))))


class Merger:
    """Merges one run's trained values into its base."""

    def __init__(self, trained: Trained):
        self.trained = trained
        self._factors = lru_cache(maxsize=4)(self._read_factors)

    def run(self, place: Place) -> list[Delta]:
        """Writes every file of the merged checkpoint except `config.json` to the staging folder; returns all deltas.

        Raises:
          UserError: values are NaN or infinite, a change has no matching tensor, or nothing changes.
        """
        deltas: list[Delta] = []
        shards = sorted(self.trained.checkpoint.files.items())
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="merge") as workers:
            for number, (shard, file) in enumerate(shards, 1):
                noted = place.done(shard)
                if noted is None:
                    deltas += self._shard(shard, file, place, workers)
                else:
                    deltas += [Delta(**entry) for entry in noted["deltas"]]
                log.info("shard %d/%d: %s%s", number, len(shards), shard, " (done before)" if noted else "")
        _check_applied(self.trained, deltas)
        found, left = companions(self.trained)
        if left:
            log.info("not copied from %s: %s", self.trained.base.folder, ", ".join(left))
        for name, path in found.items():
            if name != "config.json" and place.done(name) is None:
                copy_file(path, place, name, self.trained.base.token_places.renamed)
        return deltas

    def _shard(self, shard: str, file: TensorFile, place: Place, workers: ThreadPoolExecutor) -> list[Delta]:
        """Writes one shard, in the order of its bytes."""
        sums: dict[str, np.ndarray] = {}
        with place.create(shard) as out:
            for name, (data, of_block) in in_order(workers, self._pieces(file)):
                out.write(data)
                if name is not None:
                    sums[name] = sums.get(name, 0) + of_block
            if out.size_bytes != file.size_bytes:
                raise RuntimeError(f"{shard}: {out.size_bytes} bytes written instead of {file.size_bytes}")
            deltas = [self._delta(name, *of_weight.tolist()) for name, of_weight in sums.items()]
            place.finish(shard, out, deltas=[asdict(delta) for delta in deltas])
        return deltas

    def _pieces(self, file: TensorFile) -> Iterator[Piece]:
        """A shard as consecutive pieces: blocks of changed weights, and the bytes between them, copied."""
        copied_to = 0
        for name, info in sorted(file.tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            change = self.trained.changes.get(name)
            if change is None:
                continue
            yield from copies(file, copied_to, info.start)
            full = self.trained.is_in_full(change.tensor)
            merged = self._block(name, change, file)
            rows = self._rows_at_once(change.tensor)
            block_values = rows * math.prod(change.tensor.hf_shape) // change.tensor.split[0]
            lora_bytes = DORA_BYTES if self.trained.lora.dora else LORA_BYTES
            memory_bytes = block_values * (FULL_BYTES if full else lora_bytes)
            if full:
                memory_bytes += PART_BYTES * min(block_values, BLOCK_VALUES)
            for start, stop in _blocks(change.tensor, rows):
                yield Piece(name, memory_bytes, partial(merged, start, stop))
            copied_to = info.stop
        yield from copies(file, copied_to, file.size_bytes)

    def _block(self, name: str, change: Change, file: TensorFile) -> Callable[[int, int], Any]:
        """Returns a function that makes the rows [start, stop) of a changed weight's first split dim."""
        if self.trained.is_in_full(change.tensor):
            return self._full_block(name, change, file)
        if self.trained.rows_of(change.tensor):
            return self._rows_block(name, change, file)
        return self._lora_block(name, change, file)

    def _delta(
        self, name: str, delta_squared: float, base_squared: float, changed: float, merged_squared: float
    ) -> Delta:
        """The delta, from the sums over a weight's blocks."""
        if not math.isfinite(merged_squared):
            raise UserError(
                f"{name}: NaN or infinity after the merge: the training run diverged, or the base is damaged; give"
                " another checkpoint"
            )
        change = self.trained.changes[name]
        tensor = change.tensor
        if tensor.name in self.trained.layout.adapted and not self.trained.lora.dora:
            delta_squared = self._factors(tensor.name)[tensor.hf_names[change.source]].squared_norm
        norm, base_norm = math.sqrt(max(delta_squared, 0)), math.sqrt(base_squared)
        return Delta(name, tensor.name, norm, base_norm, math.prod(tensor.hf_shape), int(changed))

    def _rows_at_once(self, tensor: Tensor) -> int:
        """Rows per block, along the first split dim on disk, in whole chunks of the checkpoint."""
        per_row = math.prod(tensor.hf_shape) // tensor.split[0]
        rows = max(1, BLOCK_VALUES // per_row)
        if not self.trained.is_in_full(tensor):
            return rows
        chunk = self._chunk(tensor, 0)
        return min(tensor.split[0], max(1, rows // chunk) * chunk)

    def _chunk(self, tensor: Tensor, dim: int) -> int:
        """Size of the checkpoint's chunks along a split dim on disk."""
        return self.trained.state.chunk_shape(tensor.name)[tensor.order.index(dim) + tensor.several]

    def _read_factors(self, tunix_name: str) -> dict[str, Factors]:
        tensor, state = self.trained.tensors[tunix_name], self.trained.state
        arrays = {name: state.read(name) for name in self.trained.factor_names(tensor)}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise UserError(
                    f"{state.folder}: {name} holds NaN or infinity: the training run diverged; give another checkpoint"
                )
        lora_a, lora_b, *magnitude = arrays.values()
        lengths = tensor.magnitudes(*magnitude) if magnitude else {}
        scale = np.float32(self.trained.layout.adapted[tunix_name].scale)
        return {
            name: Factors(np.ascontiguousarray(a), np.ascontiguousarray(b) * scale, lengths.get(name))
            for name, (a, b) in tensor.lora_factors(lora_a, lora_b).items()
        }

    def _lora_block(self, name: str, change: Change, file: TensorFile) -> Callable[[int, int], Any]:
        """Base + b @ a, with DoRA's row magnitudes, for rows [start, stop) of the first split dim."""
        tensor = change.tensor
        factors = self._factors(tensor.name)[tensor.hf_names[change.source]]
        height = tensor.hf_shape[0] // tensor.split[0]

        def block(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            rows = slice(start * height, stop * height)
            base = rows_of(file, name, rows)
            merged = base.astype(np.float32)
            base_squared = _squared(merged)
            merged += factors.b[rows] @ (factors.a[rows] if change.tensor.weight.each else factors.a)
            delta_squared = 0.0
            if factors.magnitude is not None:
                merged *= (factors.magnitude[rows] / np.linalg.norm(merged, axis=1))[:, None]
                delta_squared = _squared(merged - base.astype(np.float32))
            rounded, sums = _rounded(merged, base, base_squared, delta_squared)
            return as_bytes(rounded), sums

        return block

    def _full_block(self, name: str, change: Change, file: TensorFile) -> Callable[[int, int], Any]:
        """The trained values themselves, for rows [start, stop) of the first split dim.

        A chunk of the checkpoint contains parts of many rows, so a block is assembled from parts along its longest dim.
        """
        tensor, state = change.tensor, self.trained.state
        height = tensor.hf_shape[0] // tensor.split[0]
        dim = max(range(1, len(tensor.split)), key=lambda i: tensor.split[i], default=0)
        size = tensor.split[dim]

        def block(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            base = rows_of(file, name, slice(start * height, stop * height)).reshape(stop - start, *tensor.split[1:])
            out, sums = np.empty_like(base), np.zeros(4)
            chunk = self._chunk(tensor, dim) if dim else size
            step = max(1, BLOCK_VALUES * size // base.size // chunk) * chunk
            for at in range(0, size if dim else 1, step):
                where = [slice(start, stop), *[slice(None)] * (base.ndim - 1)]
                if dim:
                    where[dim] = slice(at, min(at + step, size))
                part = (slice(None), *where[1:])
                trained = tensor.split_on_disk(state.read(tensor.name, tensor.in_memory(where, change.source)))
                merged, of_base = np.ascontiguousarray(trained, np.float32), np.ascontiguousarray(base[part])
                difference = of_base.astype(np.float32)
                base_squared = _squared(difference)
                np.subtract(merged, difference, out=difference)
                out[part], of_part = _rounded(merged, of_base, base_squared, _squared(difference))
                sums += of_part
            return as_bytes(out), sums

        return block

    def _rows_block(self, name: str, change: Change, file: TensorFile) -> Callable[[int, int], Any]:
        """The base with the individually trained rows replaced, for rows [start, stop)."""
        rows = dict(zip(self.trained.rows_of(change.tensor), self.trained.state.read(token_rows.NAME), strict=True))

        def block(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            base = rows_of(file, name, slice(start, stop))
            merged = base.astype(np.float32)
            base_squared, delta_squared = _squared(merged), 0.0
            for row in rows.keys() & set(range(start, stop)):
                delta_squared += _squared(rows[row] - merged[row - start])
                merged[row - start] = rows[row]
            rounded, sums = _rounded(merged, base, base_squared, delta_squared)
            return as_bytes(rounded), sums

        return block


def _rounded(
    merged: np.ndarray, base: np.ndarray, base_squared: float, delta_squared: float
) -> tuple[np.ndarray, np.ndarray]:
    """(values in the base's dtype, [delta², base², changed values, merged²])."""
    rounded = np.ascontiguousarray(merged.astype(base.dtype))
    merged_squared = _squared(merged)
    if base.dtype == np.float16 and not np.isfinite(rounded).all():
        merged_squared = math.inf
    bits = np.dtype(f"u{base.dtype.itemsize}")
    changed = np.count_nonzero(rounded.view(bits) != base.view(bits))
    return rounded, np.array([delta_squared, base_squared, changed, merged_squared])


def _squared(values: np.ndarray) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _blocks(tensor: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    total = tensor.split[0]
    return ((start, min(start + rows, total)) for start in range(0, total, rows))


def _check_applied(trained: Trained, deltas: list[Delta]) -> None:
    """Checks that every change was made exactly once, and that they change something."""
    names = [delta.name for delta in deltas]
    if len(set(names)) != len(names) or set(names) != set(trained.changes):
        wrong = sorted(set(trained.changes) ^ set(names)) or sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"{trained.base.folder}: {', '.join(wrong[:5])}: not changed exactly once")
    if not any(delta.norm for delta in deltas):
        raise UserError(
            f"{trained.state.folder}: every delta is zero: nothing was trained, and the merged model would be the base;"
            " give another checkpoint"
        )
    if not any(delta.changed_values for delta in deltas):
        raise UserError(
            f"{trained.state.folder}: the deltas are so small that rounding to the base's dtype removes them all;"
            " export the PEFT adapter instead (export=peft)"
        )
    if still := [delta.name for delta in deltas if not delta.norm]:
        log.warning("%d of %d weights have a zero delta: %s …", len(still), len(deltas), ", ".join(still[:3]))
    lost = 1 - sum(d.changed_values for d in deltas) / sum(d.values for d in deltas)
    log.info(
        "%d weights changed; rounding to the base's dtype left %.1f%% of their values unchanged",
        len(deltas),
        100 * lost,
    )
