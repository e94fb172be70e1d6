"""What precedes an on-policy update: prompts are read, answers decoded, and both scored.

Each phase is compiled for the planned slice as the run would compile it: the same functions, shapes and shardings.
Memory is what the compiler assigns; time comes from the compiler's schedule, as for the update.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.evals.generate import TPU_PROMPT_MULTIPLE
from gemma4_tpu.models.sharding import activation_spec
from gemma4_tpu.planning import counts, hlo, kept_programs, origins, schedule
from gemma4_tpu.planning.compile import Shapes, on_one_chip
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.program import OutOfMemory, Program, UnderWay
from gemma4_tpu.rollouts import slots
from gemma4_tpu.rollouts.sampler import SEGMENT_TOKENS

READ, DECODE, SCORE = "read", "decode", "score"


class Phases:
    """The phases of one configuration, being compiled. End the process to stop it."""

    def __init__(
        self, given: Shapes, rollouts: RolloutsConfig, mesh: Mesh, grid: Grid, dump: Path, limit_bytes: int,
        kept_as: list[Any],
    ):  # fmt: skip
        """Lowers them.

        Args:
          given: the step and its shapes.
          rollouts: slots, prompts and lengths.
          mesh: of described devices.
          grid: their positions.
          dump: folder in which to create folders for the compiler's files.
          limit_bytes: HBM of a chip.
          kept_as: versions and places, for `kept_programs.key`.
        """
        lowered, cache = _lowered(given, rollouts, mesh)
        versions, places = kept_as
        self._phases = {
            name: _Phase(
                one, dump / name, limit_bytes, grid,
                f"{kept_programs.key(one.as_text(), versions, {}, places)}_{kept_programs.readers()}",
            )
            for name, one in lowered.items()
        }  # fmt: skip
        self._about = {"kv_cache_bytes": on_one_chip(cache), "tokens": SEGMENT_TOKENS}
        held = given.bytes_per_chip()
        # Optimizer, teacher and so on are not arguments of these programs, but occupy memory.
        self._beside = sum(held.values()) - held["batch"] - held["base"] - held.get("lora", 0) - held.get("weights", 0)

    def assigned(self) -> dict[str, Any]:
        """Figures once memory is assigned, as plain values.

        Returns:
          Phase → `peak_bytes` of one chip, including everything held between updates, or `needed_bytes` if the compiler
          refuses; `counts` (`Counts.plain`) of one run and, if it was compiled to the end before, its `schedule`
          (`schedule.plain`); and `kv_cache_bytes` and `tokens`: the slots' cache, and the tokens that each row decodes
          per run.
        """
        return self._all("compiling what it {}s", _Phase.assigned)

    def finished(self) -> dict[str, Any]:
        """The same with every `schedule`, once code is generated."""
        return self._all("compiling what it {}s to the end", _Phase.finished)

    def _all(self, title: str, figures: Callable[[_Phase], dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = dict(self._about)
        for name, phase in self._phases.items():
            print(title.format(name), flush=True)
            told = figures(phase)
            more = {"peak_bytes": told["peak_bytes"] + self._beside} if "peak_bytes" in told else {}
            found[name] = told | more
        return found


class _Phase:
    """One program, unless it is cached."""

    def __init__(self, lowered: Any, dump: Path, limit_bytes: int, grid: Grid, key: str):
        self._lowered, self._dump, self._limit_bytes, self._grid, self._key = lowered, dump, limit_bytes, grid, key
        self._under_way: UnderWay | None = None

    def assigned(self) -> dict[str, Any]:
        return self._kept() or self._figures(lambda: self._compiling().until_assigned(self._limit_bytes))

    def finished(self) -> dict[str, Any]:
        kept = self._kept()
        if kept is not None and ("schedule" in kept or "needed_bytes" in kept):
            return kept
        return self._figures(lambda: self._compiling().finish())

    def _kept(self) -> dict[str, Any] | None:
        found = kept_programs.get(self._key)
        return None if found is None else dict(found)

    def _compiling(self) -> UnderWay:
        if self._under_way is None:
            self._under_way = UnderWay(self._lowered, self._dump)
        return self._under_way

    def _figures(self, compiled: Callable[[], Program]) -> dict[str, Any]:
        told: dict[str, Any]
        try:
            program = compiled()
            module = hlo.parse(program.text)
            told = {
                "argument_bytes": program.argument_bytes, "peak_bytes": program.peak_bytes,
                "counts": counts.count(module, self._grid).plain(),
            }  # fmt: skip
            if program.cost_analysis:
                told["schedule"] = schedule.plain(schedule.read(module, origins.read(program.text), self._grid))
        except OutOfMemory as error:
            told = {"needed_bytes": error.needed_bytes, "message": str(error).partition("\n")[0]}
        kept_programs.put(self._key, told)
        return told


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
