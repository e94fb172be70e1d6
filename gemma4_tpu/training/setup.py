"""Assembles what a training loop needs on the devices: mesh, base weights, trained values, the step's definition."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_tpu.accelerators import only_cpus_here
from gemma4_tpu.architectures import Architecture
from gemma4_tpu.compiler_flags import compiler_options
from gemma4_tpu.config.machines import HardwareConfig, MeshConfig
from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.config.schema import LoraConfig, TrainerConfig
from gemma4_tpu.hardware import LOCAL
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import quantize, sharding, token_rows
from gemma4_tpu.models.adapted import takes_part
from gemma4_tpu.models.base import Base
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import Layout, Leaf, build_tree, get, without
from gemma4_tpu.models.lora_parts import Parts
from gemma4_tpu.models.params import load_params, random_params
from gemma4_tpu.models.splash import make_attention
from gemma4_tpu.models.weights import BY_NAME, EMBEDDING
from gemma4_tpu.step.objective import REFERENCE
from gemma4_tpu.step.objectives import make_objective
from gemma4_tpu.step.optimizer import make_optimizer
from gemma4_tpu.step.optimizer_state import Part, parts
from gemma4_tpu.step.train_step import Step, TrainState
from gemma4_tpu.training.capacity import check_disk, check_memory
from gemma4_tpu.training.hardware_checks import check_devices
from gemma4_tpu.training.meshes import resolve_mesh
from gemma4_tpu.training.recipe import Recipe
from gemma4_tpu.training.saved import SavedState
from gemma4_tpu.training.start import Start
from gemma4_tpu.training.state_on_disk import saved_bytes, state_bytes

log = logging.getLogger(__name__)

_TABLE = BY_NAME[EMBEDDING].path


@dataclass(frozen=True)
class Setup:
    """A model on a mesh, ready to train."""

    step: Step
    mesh: Mesh
    base: Any
    """The frozen weights (none in full fine-tuning). If the objective needs them, `REFERENCE` holds the initial trained
    values, and `TEACHER` the teacher's weights.
    """
    state: TrainState
    """Before the first update."""
    trained_leaves: tuple[Leaf, ...]
    adapted_modules: int
    adapter_parameters: int
    in_full_parameters: int
    """Parameters of the weights that are trained themselves."""


def start_mesh(hardware: HardwareConfig, mesh: MeshConfig, arch: Architecture) -> Mesh:
    """Starts JAX, checks that it found what `hardware` names, and lays the mesh over all devices.

    Raises:
      UserError: the machine differs from the requested one, or the devices or heads do not allow the mesh.
    """
    if hardware.name == LOCAL and not jax.config.values["jax_platforms"] and only_cpus_here():
        jax.config.update("jax_platforms", "cpu")
    device = jax.devices()[0]
    slices = len({getattr(one, "slice_index", 0) for one in jax.devices()})
    check_devices(hardware, device.platform, device.device_kind, jax.device_count(), slices)
    sizes = resolve_mesh(mesh, arch, jax.device_count())
    log.info("%d × %s, mesh %s", jax.device_count(), device.device_kind, sizes)
    return sharding.make_mesh(sizes.fsdp, sizes.tp, dp=sizes.dp, cp=sizes.cp)


def compute_dtype(trainer: TrainerConfig, platform: str) -> Any:
    """The dtype of `trainer.compute_dtype` on this platform (`auto`: float32 on CPUs, else bfloat16)."""
    if trainer.compute_dtype == "auto":
        return jnp.float32 if platform == "cpu" else jnp.bfloat16
    return jnp.dtype(trainer.compute_dtype)


def make_model(
    arch: Architecture, lora: LoraConfig, trainer: TrainerConfig, mesh: Mesh, new_tokens: Sequence[int] = ()
) -> Model:
    """The model's settings for this mesh.

    Raises:
      UserError: `trainer.attention` names a kernel that cannot run here.
    """
    layout, platform = Layout.of(arch, lora), mesh.devices.flat[0].platform
    return Model(
        layout=layout,
        compute_dtype=compute_dtype(trainer, platform),
        lora_dropout=lora.dropout if lora.enabled else 0.0,
        remat=trainer.remat,
        attention=make_attention(trainer.attention, mesh),
        mesh=mesh,
        expert_kernel=platform == "tpu",
        token_rows=token_rows.trained_alone(layout, new_tokens),
    )


def make_step(recipe: Recipe, mesh: Mesh) -> Step:
    """The step's definition; planning compiles it without any weights."""
    model = make_model(recipe.arch, recipe.lora, recipe.trainer, mesh, recipe.new_tokens)
    leaves = adapters.trained_leaves(model.layout, len(recipe.new_tokens))
    optimizer = make_optimizer(recipe.optimizer, recipe.updates, leaves)
    trainer, options = recipe.trainer, compiler_options(recipe.hardware)
    teacher = None
    if recipe.teacher is not None:
        teacher = make_model(recipe.teacher.arch, recipe.teacher.lora, replace(trainer, remat="none"), mesh)
    return Step(
        model, optimizer, trainer.loss_chunk_tokens, options, trainer.ema_decay, make_objective(recipe.objective),
        teacher,
    )  # fmt: skip


def check_capacity(recipe: Recipe, checkpoint: CheckpointConfig, mesh: Mesh, checkpoints: str) -> None:
    """Refuses (`UserError`) a run that exceeds this machine's disk or memory."""
    platform = mesh.devices.flat[0].platform
    layout = Layout.of(recipe.arch, recipe.lora)
    frozen = [leaf for leaf in layout.leaves() if leaf.weight.name not in layout.in_full]
    if recipe.teacher is not None:
        frozen += Layout.of(*recipe.teacher).leaves()
    leaves = adapters.trained_leaves(layout, len(recipe.new_tokens))
    values = build_tree((leaf.path, jax.ShapeDtypeStruct(leaf.array_shape, jnp.float32)) for leaf in leaves)
    state = jax.eval_shape(make_step(recipe, mesh).init, values, jax.eval_shape(lambda: jax.random.key(0)))
    check_disk(checkpoints, checkpoint, saved_bytes(state, leaves))
    value_bytes = jnp.dtype(compute_dtype(recipe.trainer, platform)).itemsize
    check_memory(platform, frozen, state_bytes(state), value_bytes)


def set_up(
    base: Base, recipe: Recipe, mesh: Mesh, start: Start | None = None, initial: SavedState | None = None,
    reference: SavedState | None = None,
) -> Setup:  # fmt: skip
    """Loads the base weights and creates the initial state, every array sharded on the mesh.

    Trained values and optimizer state are float32; the frozen weights have the compute dtype, or are quantised (QLoRA).

    Args:
      base: the checkpoint.
      recipe: the step.
      mesh: of the run.
      start: adapters to start from, if `lora.start` names any.
      initial: for a resumed run whose adapters started as a part of their weights: the initial adapters.
      reference: for a resumed run that keeps one (`Recipe.keeps_reference`): its initial values.
    """
    step, lora = make_step(recipe, mesh), recipe.lora
    layout = step.model.layout
    init_key, dropout_key = jax.random.split(jax.random.key(recipe.trainer.seed))
    saved = initial.read if initial else None
    parts = Parts(lora.init, mesh, init_key, saved) if takes_part(lora) else None
    then = holding(lora, mesh, parts)
    weights = load_weights(base, layout, mesh, step.model.compute_dtype, then, layout.in_full)
    weights = _with_new_rows(weights, base.token_places.taken)
    own = {leaf.path: get(weights, leaf.path) for leaf in layout.trained_in_full()}
    frozen = without(weights, own)
    fresh = jax.jit(partial(adapters.init, layout), out_shardings=adapters.shardings(layout, mesh))
    begun = fresh(init_key, weights, parts and parts.factors)
    own |= {leaf.path: get(begun, leaf.path) for leaf in adapters.leaves(layout)}
    if ids := step.model.token_rows:
        place = sharding.named(mesh, token_rows.leaf(layout, len(ids)))
        own[token_rows.PATH] = jax.jit(partial(token_rows.take, ids=ids), out_shardings=place)(get(weights, _TABLE))
    trained = build_tree(iter(own.items()))
    if start is not None:
        trained = start.place(trained, layout, mesh, weights)
    leaves = tuple(adapters.trained_leaves(layout, len(recipe.new_tokens)))
    if recipe.keeps_reference:  # a separate copy: the state's arrays are donated
        kept = jax.tree.map(jnp.copy, trained) if reference is None else _read(reference, leaves, trained)
        frozen = {**frozen, REFERENCE: kept}
    _log_replicated({leaf.path: leaf for leaf in (*layout.leaves(), *leaves)}.values(), mesh)
    state = init_state(step, trained, dropout_key, mesh)
    counts, values = adapters.module_counts(layout), adapters.parameter_count(layout)
    own_values = sum(math.prod(leaf.array_shape) for leaf in leaves) - values
    setup = Setup(step, mesh, frozen, state, leaves, sum(counts.values()), values, own_values)
    _log_trained(setup, counts)
    return setup


def _log_trained(setup: Setup, counts: dict[str, int]) -> None:
    if not counts:
        log.info("full fine-tuning: %s parameters", f"{setup.in_full_parameters:,}")
        return
    modules = ", ".join(f"{kind} {n}" for kind, n in counts.items())
    log.info("LoRA: %s parameters on %d modules (%s)", f"{setup.adapter_parameters:,}", setup.adapted_modules, modules)
    if of_experts := [one for one in adapters.adapters(setup.step.model.layout) if one.base.weight.each]:
        size, how = sum(math.prod(leaf.array_shape) for one in of_experts for leaf in one.leaves), of_experts[0].how
        log.info(
            "of these, %s for experts: rank %d, scale %g, for each of the %d in every layer",
            f"{size:,}", how.rank, how.scale, setup.step.model.arch.num_experts,
        )  # fmt: skip
    if setup.in_full_parameters:
        whole = sorted({leaf.weight.name for leaf in setup.step.model.layout.trained_in_full()})
        rows = [f"{len(setup.step.model.token_rows)} rows of the embedding"] if setup.step.model.token_rows else []
        log.info("also trained in full: %s parameters (%s)", f"{setup.in_full_parameters:,}",
                 ", ".join([*whole, *rows]))  # fmt: skip


def _read(saved: SavedState, leaves: Iterable[Leaf], like: Any) -> Any:
    """Saved values of all leaves, sharded like `like`."""

    def array(leaf: Leaf) -> jax.Array:
        parts = [saved.read(name) for name in leaf.tunix_names]
        value, place = np.stack(parts) if leaf.stacked else parts[0], get(like, leaf.path).sharding
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])

    return build_tree((leaf.path, array(leaf)) for leaf in leaves)


def _with_new_rows(weights: Any, ids: Sequence[int]) -> Any:
    """The weights with the mean of the embedding in the rows of new tokens, which were in reserve.

    transformers initialises tokens in the same way when it enlarges a table: an untrained row is far from all others.
    """
    if not ids:
        return weights
    table = get(weights, _TABLE)

    def fill(table: jax.Array) -> jax.Array:
        mean = table.mean(axis=0, dtype=jnp.float32)
        return token_rows.put(table, ids, jnp.broadcast_to(mean, (len(ids), len(mean))))

    get(weights, _TABLE[:-1])[_TABLE[-1]] = jax.jit(fill, out_shardings=table.sharding)(table)
    return weights


def load_weights(
    base: Base, layout: Layout, mesh: Mesh, dtype: Any, then: Callable[[Leaf, jax.Array], Any],
    float32: Collection[str] = (),
) -> Any:  # fmt: skip
    """Loads the base parameters on the mesh, array by array, applying `then` to each.

    `float32` names rows of `weights.py` whose arrays have that dtype instead.
    """
    places = sharding.places(layout, mesh)
    if base.folder is None:
        assert base.seed is not None
        log.info("random base weights (seed %d)", base.seed)
        return random_params(base.arch, layout, places, dtype, base.seed, then, float32)
    return load_params(base.checkpoint, base.arch, layout, places, dtype, then, float32)


def init_state(step: Step, trained: Any, key: jax.Array, mesh: Mesh) -> TrainState:
    """State before the first update, each array in its place."""
    return jax.jit(step.init, out_shardings=state_places(step, trained, key, mesh))(trained, key)


def state_places(step: Step, trained: Any, key: Any, mesh: Mesh) -> TrainState:
    """Sharding of every array of the state: arrays shaped like a trained value are sharded like it; all others
    (counters, Adafactor's rows and columns) are replicated.

    `trained` and `key` are arrays, or shapes (`trained` with shardings).
    """
    everywhere = NamedSharding(mesh, P())
    state = jax.eval_shape(step.init, trained, key)
    like = jax.tree.map(lambda x: x.sharding, trained)

    def place(part: Part, x: jax.ShapeDtypeStruct) -> NamedSharding:
        own = None if part.path is None else get(trained, part.path)
        return own.sharding if own is not None and own.shape == x.shape else everywhere

    kept, tree = jax.tree.flatten(state.optimizer)
    optimizer = jax.tree.unflatten(tree, map(place, parts(state.optimizer, trained), kept))
    places = jax.tree.map(lambda _: everywhere, state)
    return places._replace(trained=like, optimizer=optimizer, average=None if state.average is None else like)


def holding(lora: LoraConfig, mesh: Mesh, parts: Parts | None = None) -> Any:
    """What to do with a base weight once it is loaded: subtract the adapters' part, and quantise the rest if
    configured.
    """

    def then(leaf: Leaf, array: jax.Array) -> Any:
        if parts is not None:
            array = parts.take(leaf, array)
        if not quantize.is_quantized(leaf, lora):
            return array
        return quantize.quantizer(leaf, lora.quantize, mesh)(array)

    return then


def _log_replicated(leaves: Iterable[Leaf], mesh: Mesh) -> None:
    """Logs the arrays that the mesh would split but cannot."""
    lines = [line for leaf in leaves for line in sharding.replicated(mesh, leaf)]
    for line in lines:
        log.debug("replicated: %s", line)
    if lines:
        log.info("%d arrays are replicated over an axis that does not divide them (log.txt lists them)", len(lines))


def rows_here(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(start, stop) of the rows of each microbatch that this process owns, by its places on dp and fsdp."""
    places = mesh.devices.reshape(sharding.row_places(mesh), -1)
    own = [i for i, line in enumerate(places) if any(d.process_index == jax.process_index() for d in line)]
    per_place = rows // len(places)
    return own[0] * per_place, (own[-1] + 1) * per_place


def to_mesh(arrays: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Global [M, B, T] arrays from this process's rows, of which it has all tokens."""
    place, places = sharding.batch(mesh), sharding.row_places(mesh)
    start, stop = rows_here(mesh, places)

    def put(array: Any) -> jax.Array:
        m, rows, *rest = array.shape
        return jax.make_array_from_process_local_data(place, array, (m, rows * places // (stop - start), *rest))

    return {name: put(array) for name, array in arrays.items()}
