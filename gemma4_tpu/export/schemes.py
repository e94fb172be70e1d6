"""How quantised weights are stored, in compressed-tensors' formats: integers or fp8, with a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_PER_WORD = 4  # weights in an int32 of `pack-quantized`
_OFFSET = np.uint8(128)  # they are stored as value + 128


@dataclass(frozen=True)
class Scheme:
    """How the weights are stored, and whether servers quantise the activations too."""

    dtype: np.dtype[Any]
    largest: float
    """A row's largest weight is stored as this."""
    half_step: tuple[float, float]
    """Largest rounding error of a stored value: relative, and its absolute minimum."""
    kind: str
    """Kind of the numbers, by compressed-tensors' name."""
    layout: str
    """Format name in compressed-tensors."""
    weight_only: bool = False
    """Servers multiply the rescaled weights by unquantised activations."""

    @property
    def packed(self) -> bool:
        """Whether four weights share an int32, with a separate tensor for the shape."""
        return self.layout == "pack-quantized"

    def stored(self, rows: int, width: int) -> tuple[str, np.dtype[Any], tuple[int, int]]:
        """Of a matrix's tensor on disk: the suffix of its name, its dtype and its shape."""
        if self.packed:
            return "_packed", np.dtype(np.int32), (rows, -(-width // _PER_WORD))
        return "", self.dtype, (rows, width)

    def quantised(self, values: np.ndarray, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Quantises rows of a matrix; returns the numbers and their scales `[rows, 1]` in `dtype`, the weights' dtype.

        Args:
          values: `[rows, width]` in float32.
          dtype: dtype of the scales, in which readers compute the weights.
        """
        tops = np.abs(values).max(axis=1, keepdims=True) / self.largest
        scales = np.maximum(tops, float(ml_dtypes.finfo(dtype).smallest_normal)).astype(dtype)  # also for rows of zeros
        numbers = np.clip(values / scales.astype(np.float32), -self.largest, self.largest)
        return (np.rint(numbers) if self.kind == "int" else numbers).astype(self.dtype), scales

    def pack(self, numbers: np.ndarray) -> np.ndarray:
        """Quantised numbers `[rows, width]` in their format on disk."""
        if not self.packed:
            return numbers
        shifted = numbers.view(np.uint8) + _OFFSET  # modulo 256: -128 becomes 0
        return np.pad(shifted, ((0, 0), (0, -shifted.shape[1] % _PER_WORD))).view("<i4")

    def unpack(self, stored: np.ndarray, width: int) -> np.ndarray:
        """The inverse of `pack`."""
        if not self.packed:
            return stored
        return (np.ascontiguousarray(stored).view(np.uint8)[:, :width] + _OFFSET).view(np.int8)


_INT8 = (np.dtype(np.int8), 127.0, (0.0, 0.5), "int")
_FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), 448.0, (2.0**-4, 2.0**-10), "float")
SCHEMES = {
    "int8": Scheme(*_INT8, "int-quantized"),
    "fp8": Scheme(*_FP8, "float-quantized"),
    "int8_weight_only": Scheme(*_INT8, "pack-quantized", weight_only=True),
    "fp8_weight_only": Scheme(*_FP8, "naive-quantized", weight_only=True),
}
"""Name of the export → scheme. The layouts are those that compressed-tensors itself uses for such weights."""
