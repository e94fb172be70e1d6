"""What precedes an on-policy update: prompts are read, answers decoded, and both scored.

Each phase is compiled for the planned slice as the run would compile it: the same functions, shapes and shardings.
Memory is what the compiler assigns; time is a roofline, because a decoding step moves all weights for one token per
slot, and nothing hides that.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.evals.generate import TPU_PROMPT_MULTIPLE
from gemma4_tpu.models.sharding import activation_spec
from gemma4_tpu.planning import counts, hlo, kept_programs
from gemma4_tpu.planning.compile import Shapes, on_one_chip
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.program import OutOfMemory, Program, until_assigned
from gemma4_tpu.rollouts import slots
from gemma4_tpu.rollouts.sampler import SEGMENT_TOKENS

READ, DECODE, SCORE = "read", "decode", "score"


def compiled(
    given: Shapes, rollouts: RolloutsConfig, mesh: Mesh, grid: Grid, dump: Path, limit_bytes: int, kept_as: list[Any]
) -> dict[str, Any]:
    """Figures of each phase, as plain values.

    Args:
      given: the step and its shapes.
      rollouts: slots, prompts and lengths.
      mesh: of described devices.
      grid: their positions.
      dump: folder in which to create folders for the compiler's files.
      limit_bytes: HBM of a chip.
      kept_as: versions and places, for `kept_programs.key`.

    Returns:
      Phase → `peak_bytes` of one chip, including everything held between updates, or `needed_bytes` if the compiler
      refuses; `counts` (`Counts.plain`) of one run; and `kv_cache_bytes` and `tokens`: the slots' cache, and the tokens
      that each row decodes per run.
    """
    lowered, cache = _lowered(given, rollouts, mesh)
    held = given.bytes_per_chip()
    found: dict[str, Any] = {"kv_cache_bytes": on_one_chip(cache), "tokens": SEGMENT_TOKENS}
    for name, one in lowered.items():
        print(f"compiling what it {name}s", flush=True)
        told = _told(one, dump / name, limit_bytes, grid, kept_as)
        if "argument_bytes" in told:
            # Optimizer, teacher and so on are not arguments of these programs, but occupy memory.
            used = held["base"] + held.get("lora", 0) + held.get("weights", 0)
            told["peak_bytes"] += sum(held.values()) - held["batch"] - used
        found[name] = told
    return found


def _lowered(given: Shapes, rollouts: RolloutsConfig, mesh: Mesh) -> tuple[dict[str, Any], Any]:
    """The programs by phase, and the shapes of the slots' cache."""
    step, trained, base = given.step, given.state.trained, given.base

    def shape(dims: str, sizes: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, activation_spec(dims, sizes, mesh))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    width = -(-rollouts.prompt_tokens // TPU_PROMPT_MULTIPLE) * TPU_PROMPT_MULTIPLE
    asked = shape("BT", (rollouts.prompts, width), jnp.int32), shape("B", (rollouts.prompts,), jnp.int32)
    read = jax.jit(partial(slots.read, step))
    prompts = jax.eval_shape(read, trained, base, *asked)
    empty = partial(slots.empty, slots=rollouts.slots, new_tokens=rollouts.new_tokens, model=step.model)
    state = jax.eval_shape(empty, prompts)

    def placed(dims: str, part: Any) -> Any:
        return jax.tree.map(lambda x: shape(dims, x.shape, x.dtype), part)

    state = slots.Slots(
        placed(slots.KV_DIMS, state.cache), placed(slots.SCORE_DIMS, state.scores),
        *(placed("B", part) for part in (state.places, state.drawn, state.keys)),
    )  # fmt: skip
    decode = jax.jit(partial(slots.advance, step, tokens=SEGMENT_TOKENS), donate_argnums=2)
    rows = {
        name: shape("BT", array.shape[1:], array.dtype) for name, array in given.batch.items()
    }  # [M, B, T] → one microbatch
    return {
        READ: read.lower(trained, base, *asked),
        DECODE: decode.lower(trained, base, state),
        SCORE: jax.jit(step.token_nll).lower(trained, base, rows),
    }, state.cache


def _told(lowered: Any, dump: Path, limit_bytes: int, grid: Grid, kept_as: list[Any]) -> dict[str, Any]:
    versions, places = kept_as
    key = f"{kept_programs.key(lowered.as_text(), versions, {}, places)}_{kept_programs.readers()}"
    if (known := kept_programs.get(key)) is not None:
        return dict(known)
    try:
        told = _figures(until_assigned(lowered, dump, limit_bytes), grid)
    except OutOfMemory as error:
        told = {"needed_bytes": error.needed_bytes, "message": str(error).partition("\n")[0]}
    kept_programs.put(key, told)
    return told


def _figures(program: Program, grid: Grid) -> dict[str, Any]:
    return {
        "argument_bytes": program.argument_bytes, "peak_bytes": program.peak_bytes,
        "counts": counts.count(hlo.parse(program.text), grid).plain(),
    }  # fmt: skip
