"""Measures how far a quantised checkpoint is from the merged one: by weights, and by log-probabilities of prompts.

Weights are read back from disk; activations are not quantised here, unlike in some servers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.export.logits import forward, log_softmax
from gemma4_tpu.export.quantise import Matrix, parts_of
from gemma4_tpu.export.schemes import Scheme
from gemma4_tpu.models import sharding
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.tensorfile import Checkpoint, Index

SAMPLE_VALUES = 1 << 20  # values of each tensor that are read back


class Dequantised(Checkpoint):
    """A quantised checkpoint that presents the names, shapes and dtypes of the one it was made from."""

    def __init__(self, folder: str, merged: Checkpoint, parts: Mapping[str, Sequence[Matrix]], scheme: Scheme):
        super().__init__(folder)
        self._merged, self._parts, self._scheme = merged, parts, scheme

    def names(self) -> list[str]:
        """The merged checkpoint's names."""
        return self._merged.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Before it was quantised."""
        return self._merged.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Before it was quantised."""
        return self._merged.dtype(name)

    def read(self, name: str, index: Index | None = None, shape: Sequence[int] | None = None) -> np.ndarray:
        """As `Checkpoint.read`, in float32 where a tensor is quantised, which is read whole."""
        if name not in self._parts:
            return super().read(name, index, shape)
        whole = np.concatenate([self.rows(part, 0, part.rows) for part in self._parts[name]])
        return whole.reshape(self.shape(name) if shape is None else tuple(shape))[tuple(index or ())]

    def rows(self, part: Matrix, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of a matrix, in float32."""
        stored, scales = self.stored(part, start, stop)
        return stored * scales

    def stored(self, part: Matrix, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """What is stored for these rows, and their scales, in float32."""
        where = [slice(start, stop), slice(None)]
        added, _, _ = self._scheme.stored(part.rows, part.width)
        stored, scales = (super(Dequantised, self).read(name, where) for name in (part.name + added, part.scale_name))
        return self._scheme.unpack(stored, part.width).astype(np.float32), scales.astype(np.float32)


@dataclass(frozen=True)
class QuantisedLogits:
    """Quantised model compared with the merged one at every position of the prompts, both in float32."""

    tokens: int
    prompts: str
    """Their origin."""
    max_logprob_difference: float
    """Largest |Δ log p| of a prompt's own next token, in nats."""
    mean_logprob_difference: float
    top1_agreement: float
    """Share of positions at which both prefer the same token."""


@dataclass(frozen=True)
class QuantisedParity:
    """Contents of `quantised.json`."""

    scheme: str
    tensors: int
    mean_error: float
    """Rms of the rounding, relative to the rms of the weights; mean over the tensors."""
    worst_error: float
    worst_tensor: str
    passed: bool | None
    """Whether the values read back are within half a step of the merged weights; None: not read (verify=false)."""
    logits: QuantisedLogits | None
    """None: not compared (verify=stream or false, or too little memory)."""

    @property
    def told(self) -> str:
        """The result in words."""
        text = f"{self.tensors} tensors off by {self.mean_error:.2%} (rms; at most {self.worst_error:.2%})"
        if self.logits is None:
            return text
        return (
            f"{text}; log-probabilities of {self.logits.tokens} tokens off by at most"
            f" {self.logits.max_logprob_difference:.2g} (mean {self.logits.mean_logprob_difference:.2g}), same most"
            f" likely token at {self.logits.top1_agreement:.1%} of positions"
        )


def about_errors(scheme: str, errors: Mapping[str, float]) -> QuantisedParity:
    """The result of the writing itself."""
    worst = max(errors, key=errors.__getitem__)
    return QuantisedParity(scheme, len(errors), statistics.fmean(errors.values()), errors[worst], worst, None, None)


def within_half_a_step(
    written: Dequantised, merged: Checkpoint, parts: Mapping[str, Sequence[Matrix]], scheme: Scheme
) -> str | None:
    """The first tensor that is further from the merged one than rounding explains; None if there is none.

    Reads back some rows of one matrix of each tensor.
    """
    rng = np.random.default_rng(0)
    relative, least = scheme.half_step
    for name, matrices in parts.items():
        part = matrices[int(rng.integers(len(matrices)))]
        rows = min(part.rows, max(1, SAMPLE_VALUES // part.width))
        start = int(rng.integers(part.rows - rows + 1))
        stored, scales = written.stored(part, start, start + rows)
        exact = part.read(merged, start, start + rows) / scales
        allowed = 1.001 * np.maximum(relative * np.abs(exact), least) + 2.0**-20 * scheme.largest
        if not (np.abs(stored - exact) <= allowed).all():
            return name
    return None


def compare_quantised(
    written: Dequantised, merged: Checkpoint, arch: Architecture, tokens: np.ndarray, mask: np.ndarray, prompts: str
) -> QuantisedLogits:
    """Runs one model after the other on `tokens` [B, T] (`mask` [B, T]: 1 for real tokens), prompt by prompt."""
    layout, mesh = Layout.of(arch), sharding.make_mesh(1, 1, jax.devices()[:1])
    model = Model(layout=layout, compute_dtype=jnp.float32, mesh=mesh)

    def answers(checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of the next tokens, and the most likely tokens, at real positions of all prompts."""
        params = load_params(checkpoint, arch, layout, sharding.places(layout, mesh), np.float32)
        own, best = [], []
        for row, real in zip(tokens, mask, strict=True):
            scores = log_softmax(np.asarray(forward(model, params, None, row[None], real[None]))[0])  # [T, V]
            length = int(real.sum())
            own.append(scores[np.arange(length - 1), row[1:length]])
            best.append(scores[:length].argmax(-1))
        return np.concatenate(own), np.concatenate(best)

    (first, first_best), (second, second_best) = answers(merged), answers(written)
    off = np.abs(first - second)
    return QuantisedLogits(
        int(mask.sum()), prompts, float(off.max()), float(off.mean()), float((first_best == second_best).mean())
    )


def dequantised(folder: str, merged: Checkpoint, arch: Architecture, prefix: str, scheme: Scheme) -> Dequantised:
    """The quantised checkpoint in `folder`, paired with the one it was made from."""
    return Dequantised(folder, merged, parts_of(arch, prefix), scheme)
