"""Compiles the step that training runs, for devices that need not exist, from shapes alone.

`shapes` is to planning what `set_up` is to training: the same step, the same shardings, no weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.data.pipeline import FEATURES
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import quantize, sharding, token_rows
from gemma4_tpu.models.layout import Layout, Leaf, build_tree, get, without
from gemma4_tpu.planning import counts, hlo, origins, schedule
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.program import OutOfMemory, Program, compile_lowered
from gemma4_tpu.step.objective import REFERENCE, TEACHER
from gemma4_tpu.step.train_step import Step, TrainState, compiled_functions
from gemma4_tpu.training.recipe import Recipe, TeacherModel
from gemma4_tpu.training.setup import make_step, state_places

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shapes:
    """A training step and all its arguments, as shapes with shardings."""

    step: Step
    state: TrainState
    base: Any
    batch: dict[str, jax.ShapeDtypeStruct]

    def bytes_per_chip(self) -> dict[str, int]:
        """Bytes that each chip holds between updates, by kind: base, lora, weights trained in full, optimizer, average,
        reference, teacher.
        """
        own = {leaf.path for leaf in self.step.model.layout.trained_in_full()}
        adapters_alone = on_one_chip(without(self.state.trained, own | {token_rows.PATH}))
        trained = {"lora": adapters_alone, "weights": on_one_chip(self.state.trained) - adapters_alone}
        average = {} if self.state.average is None else {"average": on_one_chip(self.state.average)}
        beside = {name: on_one_chip(self.base[name]) for name in (REFERENCE, TEACHER) if name in self.base}
        base = {name: arrays for name, arrays in self.base.items() if name not in beside}
        return {
            "base": on_one_chip(base),
            **{kind: size_bytes for kind, size_bytes in trained.items() if size_bytes},
            "optimizer": on_one_chip(self.state.optimizer),
            **average,
            **beside,
            "batch": on_one_chip(self.batch),
        }


@dataclass(frozen=True)
class Compiled:
    """The compiler's figures for one chip, as plain values that can cross to another process."""

    argument_bytes: int
    """`Program.argument_bytes`."""
    peak_bytes: int
    """`Program.peak_bytes`."""
    held: dict[str, int]
    """`Shapes.bytes_per_chip`."""
    counts: dict[str, Any]
    """`counts.Counts.plain`."""
    schedule: list[dict[str, Any]]
    """`schedule.plain`; empty until code is generated."""
    cost_analysis: dict[str, float]
    """`Program.cost_analysis`."""


def shapes(recipe: Recipe, mesh: Mesh) -> Shapes:
    """The step of a run and the shapes of its arguments, on a mesh of real or described devices."""
    step, lora = make_step(recipe, mesh), recipe.lora
    layout = step.model.layout

    weights = _weights(layout, lora, step.model.compute_dtype, mesh, layout.in_full)
    key = jax.eval_shape(lambda: jax.random.key(0))
    changed = {leaf.path: get(weights, leaf.path) for leaf in layout.trained_in_full()}
    base = without(weights, changed)
    initial = jax.eval_shape(partial(adapters.init, layout), key, weights)
    initial = _placed(initial, adapters.shardings(layout, mesh))
    changed |= {leaf.path: get(initial, leaf.path) for leaf in adapters.leaves(layout)}
    if rows := len(step.model.token_rows):
        leaf = token_rows.leaf(layout, rows)
        changed[leaf.path] = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding.named(mesh, leaf))
    trained = build_tree(iter(changed.items()))
    places = state_places(step, trained, key, mesh)
    state = _placed(jax.eval_shape(step.init, trained, key), places)
    if recipe.keeps_reference:
        base = {**base, REFERENCE: trained}
    if recipe.teacher is not None:
        base = {**base, TEACHER: _teacher(recipe.teacher, step.model.compute_dtype, mesh)}
    return Shapes(step, state, base, _batch(recipe, step, mesh))


def _weights(layout: Layout, lora: LoraConfig, dtype: Any, mesh: Mesh, float32: Collection[str] = ()) -> Any:
    """A model's weights as sharded on the mesh; `float32` names rows of `weights.py` with that dtype."""

    def shape(leaf: Leaf) -> Any:
        place = sharding.named(mesh, leaf)
        own = jnp.float32 if leaf.weight.name in float32 else dtype
        weight = jax.ShapeDtypeStruct(leaf.array_shape, own, sharding=place)
        if not quantize.is_quantized(leaf, lora):
            return weight
        quantized = quantize.quantizer(leaf, lora.quantize, mesh).lower(weight).out_info
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), quantized)

    return layout.tree(shape)


def _teacher(teacher: TeacherModel, dtype: Any, mesh: Mesh) -> dict[str, Any]:
    """Same structure as `rollouts.teacher.Teacher.weights`."""
    layout = Layout.of(*teacher)
    params = _weights(layout, teacher.lora, dtype, mesh)
    own = jax.eval_shape(partial(adapters.init, layout), jax.eval_shape(lambda: jax.random.key(0)), params)
    own = _placed(own, adapters.shardings(layout, mesh))
    return {"params": params} | ({"lora": own} if jax.tree.leaves(own) else {})


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _batch(recipe: Recipe, step: Step, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    place, shape = sharding.batch(mesh), (recipe.trainer.microbatches, recipe.rows, recipe.length)  # [M, B, T]
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"target_mask": jnp.bool_}
    found = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}
    if step.objective is not None:
        own = (*shape, *step.objective.values)
        found |= {n: jax.ShapeDtypeStruct(own, dtype, sharding=place) for n, dtype in step.objective.fields.items()}
    if vision := recipe.arch.vision:
        found[FEATURES] = jax.ShapeDtypeStruct((*shape, vision.dim), jnp.bfloat16, sharding=place)
    return found


def read(program: Program, given: Shapes, grid: Grid) -> Compiled:
    """What a plan reads from a compiled step, including the schedule if code is generated.

    Args:
      program: compiled from `given`.
      given: step and shapes.
      grid: positions of the mesh's devices.
    """
    module = hlo.parse(program.text)
    ops = schedule.read(module, origins.read(program.text), grid) if program.cost_analysis else ()
    return Compiled(
        argument_bytes=program.argument_bytes,
        peak_bytes=program.peak_bytes,
        held=given.bytes_per_chip(),
        counts=counts.count(module, grid).plain(),
        schedule=schedule.plain(ops),
        cost_analysis=program.cost_analysis,
    )


def lower_step(given: Shapes) -> Any:
    """The training step, traced and lowered."""
    return compiled_functions(given.step, given.state)[0].lower(given.state, given.base, given.batch)


def hbm_limit_bytes(device: Any) -> int:
    """HBM of one chip that a program can use, as reported by the compiler when a program asks for too much."""
    place = jax.sharding.SingleDeviceSharding(device)
    absurd = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=place)
    try:
        compile_lowered(jax.jit(lambda x: jnp.sin(x) @ x).lower(absurd))
    except OutOfMemory as error:
        if error.limit_bytes is not None:
            return error.limit_bytes
    raise RuntimeError(f"{device.device_kind}: the compiler does not report its HBM")


def on_one_chip(tree: Any) -> int:
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
