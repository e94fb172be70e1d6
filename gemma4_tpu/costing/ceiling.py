"""Physical ceilings: how fast a slice could train or serve a model if only its peaks limited it. Imports no JAX.

A cleverer engine must not be able to beat a ceiling, so every choice here errs towards speed:

- Compute: `models/flops.py`'s counts over the published dense peak; 8-bit weights get twice the bf16 peak.
- Bandwidth: each decode step reads the weights once (every replica its own) and each sequence's KV cache once. Sliding
  layers read at most their window, KV-shared layers nothing of their own, and where `k_eq_v` makes values a function of
  keys, only the keys are read (engines keep both, see `models/kv_cache.py`).
- A mixture of experts reads the experts that a batch chooses: `experts · (1 − (1 − k/experts)^tokens)` of them when
  tokens choose independently; identical sequences choose the same k.
- Compute and reads overlap perfectly; kernel launches, communication and scheduling take no time.
- With n speculated tokens, all of them are accepted: n + 1 tokens per read of weights and cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.hardware import Slice
from gemma4_tpu.models.flops import attention_flops, matmul_parameters, train_flops_per_token
from gemma4_tpu.models.kv_cache import DTYPE_BYTES, parameter_count

COMPUTE, HBM = "compute", "HBM bandwidth"
EIGHT_BIT_SPEED = 2
"""Ratio of 8-bit to bf16 peak, as published for every chip in `hardware.py` (int8 or fp8)."""
ON_CHIP_BYTES = 128 * 2**20
"""Per chip; no chip in `hardware.py` has more memory outside HBM. A model that fits there need not be read from HBM."""


MANY = 1e9
"""Number of sequences if neither a limit nor their cache size is known: reads of weights then cost nothing."""


class DoesNotFit(ValueError):
    """The model does not fit on the slice; the message gives the bytes."""


@dataclass(frozen=True, kw_only=True)
class ModelDemand:
    """What a model's mathematics needs, by its architecture, or by a number of parameters if nothing else is known."""

    name: str
    arch: Architecture | None = None
    parameters: float
    """All of them, including experts that are not chosen."""

    @classmethod
    def of(cls, arch: Architecture) -> ModelDemand:
        """The model of a known architecture."""
        return cls(name=arch.name, arch=arch, parameters=parameter_count(arch))

    @property
    def multiplied(self) -> float:
        """Parameters that each generated token is multiplied with: active experts and the output table."""
        return matmul_parameters(self.arch) if self.arch else self.parameters

    @property
    def output_table(self) -> float:
        """Of these, the output table's, which only the last prompt token needs; 0: unknown."""
        return self.arch.vocab_size * self.arch.embed_dim if self.arch else 0

    def read(self, tokens: float, alike: bool = False) -> float:
        """Parameters that a step with `tokens` tokens must read."""
        if self.arch is None:
            return self.parameters
        arch = self.arch
        looked_up = arch.vocab_size_per_layer_input * arch.num_layers * arch.per_layer_input_dim  # one row per token
        if not arch.num_experts:
            return self.parameters - looked_up
        one = arch.num_layers * 3 * arch.embed_dim * arch.expert_dim
        chosen = arch.experts_per_token / arch.num_experts
        share = chosen if alike else 1 - (1 - chosen) ** tokens
        return self.parameters - looked_up - one * arch.num_experts * (1 - share)

    def prompt_flops(self, length: float) -> float:
        """FLOPs of a whole prompt: causal attention, and logits for its last token only."""
        attention = attention_flops(self.arch, length) if self.arch else 0.0
        return length * (2 * (self.multiplied - self.output_table) + attention) + 2 * self.output_table

    def token_flops(self, context: float) -> float:
        """FLOPs of one generated token that attends to `context` tokens."""
        return 2 * self.multiplied + sum(4 * width * seen for width, seen in self._queries(context))

    def kv_bytes(self, tokens: float, dtype_bytes: float) -> float:
        """Minimal bytes to read from the cache of a sequence of `tokens` tokens."""
        if self.arch is None:
            return 0.0
        arch, total = self.arch, 0.0
        for layer in range(arch.num_unshared_layers):
            seen = tokens if arch.is_global(layer) else min(tokens, arch.sliding_window)
            arrays = 1 if arch.is_global(layer) and arch.k_eq_v else 2
            total += arrays * arch.layer_kv_heads(layer) * arch.layer_head_dim(layer) * seen
        return total * dtype_bytes

    def _queries(self, context: float) -> list[tuple[int, float]]:
        """(width of all query heads, tokens seen) for each layer."""
        arch = self.arch
        if arch is None:
            return []
        return [
            (
                arch.num_heads * arch.layer_head_dim(i),
                context if arch.is_global(i) else min(context, arch.sliding_window),
            )
            for i in range(arch.num_layers)
        ]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A model on a slice, as far as a ceiling depends on it."""

    model: ModelDemand
    slice: Slice
    weights_dtype: str = "bfloat16"
    """Key of `DTYPE_BYTES`."""
    kv_dtype: str = "bfloat16"
    replicas: int = 1
    """Data parallel: each replica reads its own weights."""
    speculated: int = 0
    """Tokens speculated per step, all accepted."""
    alike: bool = False
    """All sequences are identical, so that their tokens choose the same experts."""

    @property
    def weight_bytes(self) -> float:
        """Of one replica, all experts included."""
        return self.model.parameters * DTYPE_BYTES[self.weights_dtype]

    @property
    def peak_flops(self) -> float:
        """Per second, of all chips."""
        return self.slice.peak_flops_per_second * (EIGHT_BIT_SPEED if DTYPE_BYTES[self.weights_dtype] == 1 else 1)

    @property
    def bandwidth(self) -> float:
        """Bytes per second from HBM, of all chips."""
        return self.slice.chips * self.slice.chip.hbm_bytes_per_second

    @property
    def fits(self) -> bool:
        """Whether the weights fit in HBM."""
        return self.replicas * self.weight_bytes <= self.slice.hbm_bytes

    def kv_bytes(self, context: float) -> float:
        """Cache of one sequence of `context` tokens, in bytes; 0 if unknown."""
        return self.model.kv_bytes(context, DTYPE_BYTES[self.kv_dtype])

    def room(self, context: float) -> int | None:
        """Number of sequences whose caches fit next to the weights; None: the cache size is unknown."""
        one = self.kv_bytes(context)
        return None if not one else int((self.slice.hbm_bytes - self.replicas * self.weight_bytes) // one)


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The least time for a piece of work, and what limits it."""

    seconds: float
    tokens: float
    """Tokens done in that time."""
    bound_by: str
    """`COMPUTE` or `HBM`."""
    arithmetic: str
    """The derivation of the seconds, with figures."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def prefill(serving: Serving, length: float, *, one_request: bool = False) -> Ceiling:
    """A prompt of `length` tokens, none of them cached.

    Args:
      serving: the model on its slice.
      length: tokens of the prompt.
      one_request: there is nothing else to do: only the chips of one replica work on it, and the weights are read for
        it alone. Otherwise other prompts fill the slice and share the reads.
    """
    peak = serving.peak_flops / (serving.replicas if one_request else 1)
    flops = serving.model.prompt_flops(length)
    compute = flops / peak
    told = f"{_si(flops)}FLOP of a prompt of {length:,g} tokens ÷ {_si(peak)}FLOP/s"
    if not one_request:
        return Ceiling(seconds=compute, tokens=length, bound_by=COMPUTE, arithmetic=f"{told} = {_time(compute)}")
    read = _read_bytes(serving, length)
    reading = read / (serving.bandwidth / serving.replicas)
    return _larger(
        compute, f"{told} = {_time(compute)}",
        reading, f"{_si(read)}B of weights ÷ {_si(serving.bandwidth / serving.replicas)}B/s = {_time(reading)}", length,
    )  # fmt: skip


def decode(serving: Serving, context: float, sequences: float | None) -> Ceiling:
    """One decode step of `sequences` sequences, each attending to `context` tokens.

    If the caches do not fit, some sequences wait: the step is that of those that fit. None: as many as fit.

    Raises:
      DoesNotFit: the weights alone do not fit, or not even one sequence with them.
    """
    running = _running(serving, context, sequences)
    tokens = running * (serving.speculated + 1)
    flops = tokens * serving.model.token_flops(context)
    compute = flops / serving.peak_flops
    weights = serving.replicas * _read_bytes(serving, tokens / serving.replicas)
    cache = running * serving.kv_bytes(context)
    reading = (weights + cache) / serving.bandwidth
    return _larger(
        compute, f"{_si(flops)}FLOP for {tokens:,g} tokens ÷ {_si(serving.peak_flops)}FLOP/s = {_time(compute)}",
        reading, f"({_si(weights)}B of weights + {running:,g} × {_si(serving.kv_bytes(context))}B of cache) ÷ "
        f"{_si(serving.bandwidth)}B/s = {_time(reading)}", tokens,
    )  # fmt: skip


def served(serving: Serving, prompt: float, output: float, sequences: float | None) -> Ceiling:
    """Whole requests, with prompts processed on the same slice; tokens are those generated.

    Compute and reads of one request's share, overlapped perfectly. Raises like `decode`.
    """
    running = _running(serving, prompt, sequences)
    flops = serving.model.prompt_flops(prompt) + (output - 1) * serving.model.token_flops(prompt)
    compute = flops / serving.peak_flops
    step_tokens = running * (serving.speculated + 1)
    weights = serving.replicas * _read_bytes(serving, step_tokens / serving.replicas)
    read = (output - 1) / (serving.speculated + 1) * (weights / running + serving.kv_bytes(prompt))
    reading = read / serving.bandwidth
    return _larger(
        compute, f"{_si(flops)}FLOP of a request of {prompt:,g} + {output:,g} tokens ÷ {_si(serving.peak_flops)}FLOP/s"
        f" = {_time(compute)}",
        reading, f"{_si(read)}B that a request reads among {running:,g} ÷ {_si(serving.bandwidth)}B/s = "
        f"{_time(reading)}", output,
    )  # fmt: skip


def train(model: ModelDemand, slice_: Slice, lora: LoraConfig, mean_length: float) -> Ceiling:
    """One real token trained, in segments of `mean_length` tokens, without rematerialisation.

    Raises:
      ValueError: a model without an architecture, whose FLOPs per token are unknown.
    """
    if model.arch is None:
        raise ValueError(f"{model.name}: FLOPs of training need the architecture")
    flops = train_flops_per_token(model.arch, lora, mean_length)
    seconds = flops / slice_.peak_flops_per_second
    told = f"{_si(flops)}FLOP per real token ÷ {_si(slice_.peak_flops_per_second)}FLOP/s = {_time(seconds)}"
    return Ceiling(seconds=seconds, tokens=1, bound_by=COMPUTE, arithmetic=told)


def _running(serving: Serving, context: float, sequences: float | None) -> float:
    """Sequences that one step can hold."""
    room = serving.room(context)
    # Unknown limits count as none: a ceiling can be too high, never too low.
    running = min(MANY if sequences is None else sequences, MANY if room is None else room)
    if not serving.fits or running < 1:
        needed = serving.replicas * serving.weight_bytes + serving.kv_bytes(context)
        raise DoesNotFit(
            f"{_si(needed)}B of weights and one sequence's cache, {_si(serving.slice.hbm_bytes)}B of HBM on"
            f" {serving.slice.name}"
        )
    return running


def _read_bytes(serving: Serving, tokens: float) -> float:
    """Bytes of weights that one replica reads from HBM for a step with `tokens` tokens; 0 if they can stay on the
    chips.
    """
    if serving.weight_bytes <= ON_CHIP_BYTES * serving.slice.chips / serving.replicas:
        return 0.0
    return serving.model.read(tokens, serving.alike) * DTYPE_BYTES[serving.weights_dtype]


def _larger(compute: float, compute_told: str, reading: float, reading_told: str, tokens: float) -> Ceiling:
    if compute >= reading:
        return Ceiling(seconds=compute, tokens=tokens, bound_by=COMPUTE, arithmetic=compute_told)
    return Ceiling(seconds=reading, tokens=tokens, bound_by=HBM, arithmetic=reading_told)


def _si(amount: float) -> str:
    """`61.4 G`: three digits and a prefix of a thousand, ready for a unit."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= 0.9995 * size:
            return f"{amount / size:.3g} {prefix}" if amount < 999.5 * size else f"{amount / size:.0f} {prefix}"
    return f"{amount:.3g} "


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
