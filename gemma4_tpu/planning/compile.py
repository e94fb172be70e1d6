"""Compiles the step that training runs, for devices that may not be there, from shapes alone.

`shapes` is to planning what `build_job` is to training: the same step, the same places, no weights.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig, TrainerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import quantize, sharding
from gemma4_tpu.models.layout import Leaf
from gemma4_tpu.planning import counts, hlo
from gemma4_tpu.step.train_step import Step, TrainState, compiled_functions
from gemma4_tpu.training.job import make_step, state_places, weight_dtype

log = logging.getLogger(__name__)
Stage = Callable[[str], None]
"""Told what begins now: `lowering`, `compiling`, `counting`."""


class OutOfMemory(Exception):
    """The program does not fit into a chip's HBM."""

    def __init__(self, message: str):
        super().__init__(message)
        needed, limit = _SIZES.search(message), _LIMIT.search(message)
        self.needed_bytes = _bytes(needed) if needed else None
        """What the compiler says that it would need; None: it does not say."""
        self.limit_bytes = _bytes(limit) if limit else None


_NUMBER = r"(\d+(?:\.\d+)?)([KMGT]?)i?B?"
_SIZES = re.compile(rf"(?:memory required for .*?\(|Used ){_NUMBER}")
_LIMIT = re.compile(rf"(?:available HBM \(| of ){_NUMBER}")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(found: re.Match[str]) -> int:
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class Shapes:
    """A training step and everything that it takes, as shapes with shardings."""

    step: Step
    state: TrainState
    base: Any
    batch: dict[str, jax.ShapeDtypeStruct]

    def bytes_per_chip(self) -> dict[str, int]:
        """What lies on each chip between updates, by kind: base, lora (or trained weights), optimizer."""
        trained = "weights" if self.step.full else "lora"
        return {
            "base": _on_one_chip(self.base),
            trained: _on_one_chip(self.state.trained),
            "optimizer": _on_one_chip(self.state.optimizer),
            "batch": _on_one_chip(self.batch),
        }


@dataclass(frozen=True)
class Compiled:
    """The compiler's figures for one chip; plain values, so that they can cross to another process."""

    memory: dict[str, int]
    """Bytes: arguments, temporaries, outputs that reuse no argument, program."""
    held: dict[str, int]
    """`Shapes.bytes_per_chip`."""
    counts: dict[str, Any]
    """`counts.Counts.plain`."""
    raw: dict[str, float]
    """XLA's `cost_analysis`: `flops` and `bytes_accessed`, loops counted once, kernels not at all."""
    once: dict[str, float]
    """Our own count of the same two with loops counted once."""
    lowering_seconds: float
    compile_seconds: float


def shapes(
    arch: Architecture,
    lora: LoraConfig,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    mesh: Mesh,
    *,
    rows: int,
    length: int,
    updates: int,
    options: Mapping[str, Any] | None = None,
) -> Shapes:
    """The step of a run and the shapes of what it takes.

    Args:
      arch: the model.
      lora: what is trained.
      optimizer: its state has the places of what it is for.
      trainer: microbatches, remat, attention, dtypes.
      mesh: of devices that are there or not.
      rows: rows of one microbatch, over all chips.
      length: T.
      updates: of the whole run (a constant of the learning rate's schedule).
      options: `hardware.compiler_options`.
    """
    step = make_step(arch, lora, optimizer, trainer, mesh, updates, options)
    layout, dtype = step.model.layout, weight_dtype(step)

    def base_leaf(leaf: Leaf) -> Any:
        place = sharding.named(mesh, leaf.tunix_names[0], leaf.shape, stacked=leaf.stacked)
        weight = jax.ShapeDtypeStruct(leaf.array_shape, dtype, sharding=place)
        if not quantize.is_quantized(leaf, lora):
            return weight
        quantized = quantize.quantizer(leaf, lora.quantize, mesh).lower(weight).out_info
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), quantized)

    weights = layout.tree(base_leaf)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if step.full:
        trained, base = weights, {}
    else:
        initial = jax.eval_shape(partial(adapters.init, layout, lora), key)
        trained, base = _placed(initial, adapters.shardings(layout, lora, mesh)), weights
    places = state_places(step, trained, key, mesh)
    state = _placed(jax.eval_shape(step.init, trained, key), places)
    return Shapes(step, state, base, _batch(trainer.microbatches, rows, length, mesh))


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _batch(microbatches: int, rows: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    place = sharding.batch(mesh)
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"target_mask": jnp.bool_}
    return {
        name: jax.ShapeDtypeStruct((microbatches, rows, length), dtype, sharding=place)
        for name, dtype in dtypes.items()
    }


def compile_step(given: Shapes, stage: Stage = lambda name: None) -> Compiled:
    """Compiles the training step and reads the result.

    Args:
      given: step and shapes.
      stage: is told what begins.

    Raises:
      OutOfMemory: the program does not fit.
      UserError: a compiler option that does not exist.
    """
    stage("lowering")
    started = time.perf_counter()
    lowered = lower_step(given)
    lowered_at = time.perf_counter()
    stage("compiling")
    compiled = compile_lowered(lowered)
    compiled_at = time.perf_counter()
    stage("counting")
    raw = compiled.cost_analysis()
    module = hlo.parse(compiled.as_text())
    total, once = counts.count(module), counts.count(module, loops_once=True)
    return Compiled(
        memory=memory_bytes(compiled),
        held=given.bytes_per_chip(),
        counts=total.plain(),
        raw={"flops": raw["flops"], "bytes_accessed": raw["bytes accessed"]},
        once={"flops": once.flops, "bytes_accessed": once.traffic.accessed},
        lowering_seconds=lowered_at - started,
        compile_seconds=compiled_at - lowered_at,
    )


def lower_step(given: Shapes) -> Any:
    """The training step, traced and lowered."""
    return compiled_functions(given.step, given.state)[0].lower(given.state, given.base, given.batch)


def memory_bytes(compiled: Any) -> dict[str, int]:
    """Bytes of one chip: arguments, temporaries, outputs that reuse no argument, program."""
    told = compiled.memory_analysis()
    return {
        "arguments": told.argument_size_in_bytes,
        "temporaries": told.temp_size_in_bytes,
        "outputs": told.output_size_in_bytes - told.alias_size_in_bytes,
        "program": told.generated_code_size_in_bytes,
    }


def compile_lowered(lowered: Any) -> Any:
    """`lowered.compile` with the compiler's refusals as our own.

    Raises:
      OutOfMemory: see `compile_step`.
      UserError: see `compile_step`.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message:
            raise OutOfMemory(message) from error
        if unknown := re.search(r"No such compile option: '([^']*)'", message):
            raise UserError(
                f"hardware.compiler_options: the compiler has no option {unknown[1]!r}; check its spelling"
            ) from None
        raise


def hbm_limit_bytes(device: Any) -> int:
    """HBM of one chip that a program may use, as the compiler tells when a program asks for too much."""
    place = jax.sharding.SingleDeviceSharding(device)
    absurd = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=place)
    try:
        jax.jit(lambda x: jnp.sin(x) @ x).lower(absurd).compile()
    except jax.errors.JaxRuntimeError as error:
        limit = OutOfMemory(str(error)).limit_bytes
        if limit is not None:
            return limit
    raise RuntimeError(f"{device.device_kind}: the compiler does not tell its HBM")


def _on_one_chip(tree: Any) -> int:
    """Bytes of one chip's share of every array."""

    def size(x: jax.ShapeDtypeStruct) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        elements = 1
        for n in shape:
            elements *= n
        return elements * _bits(x.dtype) // 8

    return sum(size(x) for x in jax.tree.leaves(tree))


def _bits(dtype: Any) -> int:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 64
    name = jnp.dtype(dtype).name
    found = re.search(r"int(\d+)$", name)
    return int(found[1]) if found else jnp.dtype(dtype).itemsize * 8
