"""How quantised weights are stored, in the forms of compressed-tensors: integers or fp8, with a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_PER_WORD = 4  # weights in an int32 of `pack-quantized`
_OFFSET = np.uint8(128)  # they are stored as value + 128 there


@dataclass(frozen=True)
class Scheme:
    """How the weights are stored, and whether servers quantise the activations too."""

    dtype: np.dtype[Any]
    largest: float
    """A row's largest weight is stored as this."""
    half_step: tuple[float, float]
    """Largest rounding error of a stored value: relative to it, and at least."""
    kind: str
    """Of numbers, in words of compressed-tensors."""
    layout: str
    """Its format there."""
    weight_only: bool = False
    """Servers multiply the weights, once scaled, by activations as they are."""

    @property
    def packed(self) -> bool:
        """Four weights share an int32, and a tensor of its own tells the shape."""
        return self.layout == "pack-quantized"

    def stored(self, rows: int, width: int) -> tuple[str, np.dtype[Any], tuple[int, int]]:
        """What a matrix's tensor on disk adds to its name, its dtype and its shape."""
        if self.packed:
            return "_packed", np.dtype(np.int32), (rows, -(-width // _PER_WORD))
        return "", self.dtype, (rows, width)

    def quantised(self, values: np.ndarray, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a matrix as numbers of the scheme, and their scales `[rows, 1]` in `dtype`, that of the weights.

        Args:
          values: `[rows, width]` in float32.
          dtype: of the scales; readers compute weights in it.
        """
        tops = np.abs(values).max(axis=1, keepdims=True) / self.largest
        scales = np.maximum(tops, float(ml_dtypes.finfo(dtype).smallest_normal)).astype(dtype)  # rows of zeros too
        numbers = np.clip(values / scales.astype(np.float32), -self.largest, self.largest)
        return (np.rint(numbers) if self.kind == "int" else numbers).astype(self.dtype), scales

    def pack(self, numbers: np.ndarray) -> np.ndarray:
        """Those numbers `[rows, width]` as they are on disk."""
        if not self.packed:
            return numbers
        shifted = numbers.view(np.uint8) + _OFFSET  # modulo 256: -128 becomes 0
        return np.pad(shifted, ((0, 0), (0, -shifted.shape[1] % _PER_WORD))).view("<i4")

    def unpack(self, stored: np.ndarray, width: int) -> np.ndarray:
        """What `pack` was given."""
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
"""By the name of the export. The layouts are those that compressed-tensors itself takes for such weights."""
