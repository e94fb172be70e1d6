"""The streaming merge: shard by shard, block of rows by block of rows, deltas in float32, the base's dtype out.

Only blocks are in memory. Everything else of a shard is copied as bytes, its header included, so that layout and index
stay those of the base.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

from gemma4_tpu.errors import UserError
from gemma4_tpu.export.place import Place, copy_range
from gemma4_tpu.export.trained import Change, Trained
from gemma4_tpu.models.names import Tensor
from gemma4_tpu.models.tensorfile import INDEX_NAME, TensorFile
from gemma4_tpu.storage import join, list_folder, open_bytes

log = logging.getLogger(__name__)

BLOCK_VALUES = 4 << 20  # of a weight that are worked on at a time: 16 MiB in float32
WORKERS = min(8, 2 * (os.cpu_count() or 1))  # twice the cores: some of them wait for the disk
_TOKENIZER = ("tokenizer", "chat_template", "special_tokens_map", "added_tokens", "vocab", "merges")
_OTHER_WEIGHTS = (
    ".bin",
    ".pth",
    ".pt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".safetensors",
    ".safetensors.index.json",
)


@dataclass(frozen=True)
class Delta:
    """What was added to one weight. Norms are Frobenius norms."""

    name: str
    """On disk, with prefix."""
    tunix_name: str
    norm: float
    base_norm: float
    values: int
    changed_values: int
    """How many values the rounding to the base's dtype let change."""

    @property
    def relative(self) -> float:
        return self.norm / self.base_norm if self.base_norm else math.inf


@dataclass
class Factors:
    """The adapter of one weight on disk."""

    a: np.ndarray
    """[r, in]."""
    b: np.ndarray
    """[out, r], scaled."""

    @property
    def squared_norm(self) -> float:
        """Of b @ a, by way of [r, r] matrices."""
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        return float(np.sum((b.T @ b) * (a @ a.T)))


class Merger:
    """Merges one run's trained values into its base."""

    def __init__(self, trained: Trained):
        self.trained = trained
        self._factors = lru_cache(maxsize=4)(self._read_factors)

    def run(self, place: Place) -> list[Delta]:
        """Writes every file of the merged checkpoint but `config.json` to the staging folder; returns all deltas.

        Raises:
          UserError: NaN or infinity, a change that found no tensor, or no change at all.
        """
        deltas: list[Delta] = []
        for number, (shard, file) in enumerate(sorted(self.trained.checkpoint.files.items()), 1):
            noted = place.done(shard)
            if noted is None:
                deltas += self._shard(shard, file, place)
            else:
                deltas += [Delta(**entry) for entry in noted["deltas"]]
            log.info(
                "shard %d/%d: %s%s",
                number,
                len(self.trained.checkpoint.files),
                shard,
                " (done before)" if noted else "",
            )
        _check_applied(self.trained, deltas)
        found, left = companions(self.trained)
        if left:
            log.info("not copied from %s: %s", self.trained.base.folder, ", ".join(left))
        for name, path in found.items():
            if name != "config.json" and place.done(name) is None:
                copy_file(path, place, name)
        place.wait()
        return deltas

    def _shard(self, name: str, file: TensorFile, place: Place) -> list[Delta]:
        """Writes one shard, in the order of its bytes."""
        out = place.create(name)
        deltas: list[Delta] = []
        written = 0
        with ThreadPoolExecutor(WORKERS) as workers:
            for tensor_name, info in sorted(file.tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
                change = self.trained.changes.get(tensor_name)
                if change is None:
                    continue
                copy_range(file.path, written, info.start, out, place.remote)
                deltas.append(self._weight(tensor_name, change, file, out, workers))
                written = info.stop
            copy_range(file.path, written, file.size_bytes, out, place.remote)
        if out.tell() != file.size_bytes:
            raise RuntimeError(f"{name}: {out.tell()} bytes written instead of {file.size_bytes}")
        place.finish(name, out, deltas=[asdict(delta) for delta in deltas])
        return deltas

    def _weight(self, name: str, change: Change, file: TensorFile, out: BinaryIO, workers: ThreadPoolExecutor) -> Delta:
        """Appends one changed weight, block by block, several blocks at work."""
        merge = (
            self._lora_block(name, change, file) if self.trained.lora.enabled else self._full_block(name, change, file)
        )
        sums = np.zeros(4)  # delta², base², changed values, merged²
        for block, of_block in _in_order(workers, merge, _blocks(change.tensor, self._rows_at_once(change.tensor))):
            out.write(block)
            sums += of_block
        delta_squared, base_squared, changed, merged_squared = sums.tolist()
        if not math.isfinite(merged_squared):
            raise UserError(f"{name}: NaN or infinity after the merge: the training diverged, or the base is damaged")
        if self.trained.lora.enabled:
            delta_squared = self._factors(change.tensor.name)[change.tensor.hf_names[change.source]].squared_norm
        values = math.prod(change.tensor.hf_shape)
        return Delta(
            name, change.tensor.name, math.sqrt(max(delta_squared, 0)), math.sqrt(base_squared), values, int(changed)
        )

    def _rows_at_once(self, tensor: Tensor) -> int:
        """Of the first split dim on disk: what a block holds, in whole chunks of the checkpoint."""
        per_row = math.prod(tensor.hf_shape) // tensor.split[0]
        rows = max(1, BLOCK_VALUES // per_row)
        if self.trained.lora.enabled:
            return rows
        chunk = self.trained.state.chunk_shape(tensor.name)[tensor.order.index(0) + (1 if tensor.several else 0)]
        return min(tensor.split[0], max(1, rows // chunk) * chunk)

    def _read_factors(self, tunix_name: str) -> dict[str, Factors]:
        tensor, state = self.trained.tensors[tunix_name], self.trained.state
        lora_a, lora_b = (state.read(name) for name in tensor.lora_names)
        for name, array in zip(tensor.lora_names, (lora_a, lora_b), strict=True):
            if not np.isfinite(array).all():
                raise UserError(
                    f"{state.folder}: {name} holds NaN or infinity: the training diverged; give another checkpoint"
                )
        found = tensor.lora_factors(lora_a, lora_b)
        return {
            name: Factors(np.ascontiguousarray(a), np.ascontiguousarray(b) * np.float32(self.trained.scale))
            for name, (a, b) in found.items()
        }

    def _lora_block(self, name: str, change: Change, file: TensorFile) -> Callable[[int, int], Any]:
        """Base + b @ a, for rows [start, stop) of the first split dim."""
        tensor = change.tensor
        factors = self._factors(tensor.name)[tensor.hf_names[change.source]]
        height = tensor.hf_shape[0] // tensor.split[0]

        def block(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            rows = slice(start * height, stop * height)
            base = file.read(name, (rows, slice(None)))
            merged = base.astype(np.float32)
            base_squared = _squared(merged)
            merged += factors.b[rows] @ factors.a
            return _rounded(merged, base, base_squared, 0.0)

        return block

    def _full_block(self, name: str, change: Change, file: TensorFile) -> Callable[[int, int], Any]:
        """The trained values themselves, for rows [start, stop) of the first split dim."""
        tensor, state = change.tensor, self.trained.state
        height = tensor.hf_shape[0] // tensor.split[0]

        def block(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            rest = [slice(None)] * (len(tensor.hf_shape) - 1)
            base = file.read(name, (slice(start * height, stop * height), *rest))
            index = tensor.rows_in_memory(start, stop, change.source)
            merged = np.ascontiguousarray(tensor.rows_to_hf(state.read(tensor.name, index)), np.float32)
            before = base.astype(np.float32)
            return _rounded(merged, base, _squared(before), _squared(merged - before))

        return block


def _rounded(
    merged: np.ndarray, base: np.ndarray, base_squared: float, delta_squared: float
) -> tuple[np.ndarray, np.ndarray]:
    """(bytes in the base's dtype, [delta², base², changed values, merged²])."""
    rounded = np.ascontiguousarray(merged.astype(base.dtype))
    merged_squared = _squared(merged)
    if base.dtype == np.float16 and not np.isfinite(rounded).all():
        merged_squared = math.inf
    bits = np.dtype(f"u{base.dtype.itemsize}")
    changed = np.count_nonzero(rounded.view(bits) != base.view(bits))
    return rounded.reshape(-1).view(np.uint8), np.array([delta_squared, base_squared, changed, merged_squared])


def _squared(values: np.ndarray) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _blocks(tensor: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    total = tensor.split[0]
    return ((start, min(start + rows, total)) for start in range(0, total, rows))


def _in_order(workers: ThreadPoolExecutor, work: Callable[..., Any], items: Iterator[tuple[int, int]]) -> Iterator[Any]:
    """Results in order, with only so many blocks under way that memory stays bounded."""
    under_way: deque[Future[Any]] = deque()
    for item in items:
        under_way.append(workers.submit(work, *item))
        if len(under_way) > WORKERS:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _check_applied(trained: Trained, deltas: list[Delta]) -> None:
    """Every change was made exactly once, and together they change something."""
    names = [delta.name for delta in deltas]
    if len(set(names)) != len(names) or set(names) != set(trained.changes):
        wrong = sorted(set(trained.changes) ^ set(names)) or sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"{trained.base.folder}: {', '.join(wrong[:5])}: not changed exactly once")
    if not any(delta.norm for delta in deltas):
        raise UserError(
            f"{trained.state.folder}: every delta is zero: nothing was trained; the merged model would be the base"
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
        "%d weights changed; rounding to the base's dtype left %.1f%% of their values as they were",
        len(deltas),
        100 * lost,
    )


def companions(trained: Trained) -> tuple[dict[str, str], list[str]]:
    """Name → path of the files that belong to the checkpoint besides its weights, and what else lies beside them.

    The base's, but tokenizer and chat template from the folder that the run took them from.
    """
    assert trained.base.folder is not None
    folder, tokenizer = trained.base.folder, trained.base.tokenizer_folder
    found, left = {}, []
    for name in list_folder(folder):
        if name.startswith(".") or name in trained.checkpoint.files:
            continue
        if (name.endswith(_OTHER_WEIGHTS) and name != INDEX_NAME) or not _is_file(join(folder, name)):
            left.append(name)
        elif tokenizer == folder or not name.startswith(_TOKENIZER):
            found[name] = join(folder, name)
    if tokenizer != folder:
        found |= {name: join(tokenizer, name) for name in list_folder(tokenizer) if name.startswith(_TOKENIZER)}
    return found, left


def copy_file(path: str, place: Place, name: str) -> None:
    """A file, byte for byte."""
    out = place.create(name)
    copy_range(path, 0, open_bytes(path).size_bytes, out, place.remote)
    place.finish(name, out)


def _is_file(path: str) -> bool:
    from gemma4_tpu.storage import filesystem

    fs, place = filesystem(path)
    return bool(fs.isfile(place))
