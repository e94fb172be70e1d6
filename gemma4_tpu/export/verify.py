"""Verifies that the merged model is the one that was trained: weight by weight, and by logits if the model fits into
memory.

Both comparisons are independent of the merge: weights in the in-memory layout, through the name map and with the
adapter as a tensor product; logits from exactly the forward pass that training ran.
"""

from __future__ import annotations

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gemma4_tpu.errors import UserError
from gemma4_tpu.export.trained import Trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import token_rows
from gemma4_tpu.models.names import Tensor, full_name
from gemma4_tpu.models.tensorfile import Checkpoint

log = logging.getLogger(__name__)

SAMPLE_VALUES = 1 << 20  # values of each weight that are compared; smaller weights are compared whole
THREADS = min(4, os.cpu_count() or 1)  # each takes some 40 MB for its block
ROOM = 1.4  # memory for the logits, as a multiple of the parameters' float32 bytes
_FLOAT32_ROUNDING = 2.0**-24


class ParityError(UserError):
    """The merged model is not the trained one; nothing is published."""


@dataclass(frozen=True)
class WeightParity:
    """Comparison of the merged weights with base + scale·A·B (or with the trained weights)."""

    weights: int
    values: int
    worst: float
    """Largest difference, in units of what rounding to the base's dtype explains: at most 1."""
    worst_weight: str
    passed: bool


def compare_weights(trained: Trained, merged: Checkpoint) -> WeightParity:
    """Compares a block of every changed weight, read in the in-memory layout."""
    rng = np.random.default_rng(0)
    blocks = [(tensor, index) for tensor in trained.tensors.values() for index in _blocks(trained, tensor, rng)]

    def off(tensor: Tensor, index: tuple[slice, ...]) -> tuple[float, int]:
        expected, slack = _expected(trained, tensor, index)
        found = _read(tensor, merged, trained.prefix, index)
        allowed = _half_spacing(found.dtype) * np.abs(expected) + slack
        ratio = np.abs(found.astype(np.float64) - expected) / allowed
        return float(np.max(np.where(np.isfinite(ratio), ratio, np.inf))), ratio.size

    with ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as threads:
        ratios, values = zip(*threads.map(off, *zip(*blocks, strict=True)), strict=True)
    worst = max(ratios)
    worst_weight = blocks[ratios.index(worst)][0].name
    return WeightParity(len(trained.tensors), sum(values), worst, worst_weight if worst else "", worst <= 1.0)


def _blocks(trained: Trained, tensor: Tensor, rng: np.random.Generator) -> list[tuple[slice, ...]]:
    """The parts of a weight that are compared: a sample, and every individually trained row."""
    rows = [(slice(row, row + 1), slice(0, tensor.shape[1])) for row in trained.rows_of(tensor)]
    return [_some_block(tensor, rng), *rows]


def _some_block(tensor: Tensor, rng: np.random.Generator) -> tuple[slice, ...]:
    """A random range along the dim in memory that is contiguous on disk, of about `SAMPLE_VALUES` values."""
    dim = tensor.order.index(0) + (1 if tensor.several else 0)
    size = tensor.shape[dim]
    length = min(size, max(1, SAMPLE_VALUES * size // math.prod(tensor.shape)))
    start = int(rng.integers(0, size - length + 1))
    index = [slice(0, n) for n in tensor.shape]
    index[dim] = slice(start, start + length)
    return tuple(index)


def _read(tensor: Tensor, checkpoint: Checkpoint, prefix: str, index: tuple[slice, ...]) -> np.ndarray:
    return tensor.from_hf(lambda name, where, shape: checkpoint.read(full_name(prefix, name), where, shape), index)


def _expected(trained: Trained, tensor: Tensor, index: tuple[slice, ...]) -> tuple[np.ndarray, float]:
    """(float64 values in the in-memory layout, largest error of float32 arithmetic)."""
    if trained.is_in_full(tensor):
        return trained.state.read(tensor.name, index).astype(np.float64), 0.0
    if rows := trained.rows_of(tensor):
        expected = _read(tensor, trained.checkpoint, trained.prefix, index).astype(np.float64)
        start, stop, _ = index[0].indices(tensor.shape[0])
        for row, values in zip(rows, trained.state.read(token_rows.NAME), strict=True):
            if start <= row < stop:
                expected[row - start] = values[index[1]]
        return expected, 0.0
    where = dict(zip(tensor.weight.dims, index, strict=True)) | {"r": slice(None)}
    weight, how = tensor.weight, trained.layout.adapted[tensor.name]
    factors = [
        trained.state.read(name)[tuple(where[dim] for dim in dims)].astype(np.float64)
        for name, dims in zip(trained.factor_names(tensor), (*weight.adapter_dims, weight.outputs), strict=False)
    ]
    base = _read(tensor, trained.checkpoint, trained.prefix, index).astype(np.float64)
    largest = how.scale * how.rank * float(np.abs(factors[0]).max() * np.abs(factors[1]).max())
    merged = adapters.merged(weight, how, base, factors)
    growth = max(1.0, float(np.abs(merged).max() / np.abs(base).max())) if how.dora else 1.0
    return merged, growth * (how.rank + 4) * _FLOAT32_ROUNDING * (largest + float(np.abs(base).max()))


def _half_spacing(dtype: np.dtype) -> float:
    """Largest relative error of rounding to a dtype, plus 1/1000 for values at the bound; covers subnormals too."""
    import ml_dtypes

    return 1.001 * 0.5 * float(ml_dtypes.finfo(dtype).eps)


def fits_in_memory(trained: Trained) -> bool:
    """Whether base, adapters and logits fit into memory in float32."""
    import psutil

    values = sum(math.prod(trained.checkpoint.shape(name)) for name in trained.checkpoint.names())
    return 4 * ROOM * values < psutil.virtual_memory().available


def verify(trained: Trained, merged: Checkpoint, mode: str) -> dict[str, Any]:
    """Compares a merged checkpoint with the run; returns the contents of `parity.json`, including `passed`.

    Args:
      trained: the run.
      merged: the staged checkpoint.
      mode: `true` also compares the logits if the model fits into memory; `stream` compares only the weights.
    """
    weights = compare_weights(trained, merged)
    report: dict[str, Any] = {"passed": weights.passed, "weights": asdict(weights), "logits": None}
    if trained.lora.enabled and trained.lora.quantize:
        report["note"] = f"trained on {trained.lora.quantize} weights; compared with the adapters on unquantised ones"
    if mode == "true" and weights.passed and fits_in_memory(trained):
        from gemma4_tpu.export.logits import compare_logits

        logits = compare_logits(trained, merged)
        report["logits"] = asdict(logits)
        report["passed"] = weights.passed and logits.passed
    elif mode == "true" and weights.passed:
        log.info("the model does not fit into memory: weights are compared, logits are not")
    return report


def refusal(report: dict[str, Any], where: str) -> ParityError:
    """The error that says why a merged model is not published."""
    weights, logits = report["weights"], report["logits"]
    if not weights["passed"]:
        reason = f"{weights['worst_weight']} is off by {weights['worst']:.3g} times what rounding explains"
    elif not logits["differs_from_base"]:
        reason = "its logits are the base model's"
    else:
        reason = (
            f"its logits are off by {logits['merged_to_rounded']:.3g} (relative rms) from those of the LoRA model in"
            f" {logits['dtype']}; up to {logits['bound']:.3g} is explained by rounding"
        )
    return ParityError(f"the merged model is not the trained one: {reason}; nothing was published (see {where})")
