"""What the compiling process reports: a plan's figures once memory is assigned, and the schedule at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gemma4_tpu.compiler_flags import compiler_options
from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.hardware import Slice
from gemma4_tpu.models.sharding import make_mesh
from gemma4_tpu.planning import compile as compiling
from gemma4_tpu.planning import kept_programs
from gemma4_tpu.planning.compilation import ASSIGNED, FINISHED
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.phases import Phases
from gemma4_tpu.planning.program import OutOfMemory, Program, UnderWay
from gemma4_tpu.planning.topology import absent_devices
from gemma4_tpu.training.recipe import Recipe

Answer = tuple[str, dict[str, Any]]
"""A stage, and what is known then: `hbm_limit_bytes`, `versions`, and either `compiled` (`compile.Compiled`) or
`out_of_memory` (`message`, `needed_bytes`); for an on-policy objective also `phases` (`Phases.assigned`). For a cached
program, everything including its schedule is known at once.
"""


def answers(
    recipe: Recipe, wanted: Slice, dump: Path, *, to_the_end: bool, rollouts: RolloutsConfig | None = None
) -> Iterator[Answer]:
    """Compiles a step.

    Args:
      recipe: with a remat policy other than `auto`.
      wanted: the slice.
      dump: a folder to create for the compiler's files.
      to_the_end: generate code, for the schedule.
      rollouts: for an on-policy objective: also compile what precedes the update.

    Raises:
      UserError: the compiler refuses it.
    """
    sizes = recipe.mesh
    mesh = make_mesh(sizes.fsdp, sizes.tp, absent_devices(wanted), dp=sizes.dp, cp=sizes.cp)
    devices = list(mesh.devices.flat)
    given = compiling.shapes(recipe, mesh)
    answer: dict[str, Any] = {
        "hbm_limit_bytes": compiling.hbm_limit_bytes(devices[0]),
        "versions": {"jax": version("jax"), "libtpu": version("libtpu")},
    }
    print("lowering", flush=True)
    started = time.perf_counter()
    lowered = compiling.lower_step(given)
    answer["lowering_seconds"] = time.perf_counter() - started
    places = [f"{device.device_kind} {device.coords}" for device in devices]
    key = kept_programs.key(lowered.as_text(), answer["versions"], compiler_options(recipe.hardware), places)
    grid = Grid.of(wanted, [device.coords for device in devices])
    phases = None
    if rollouts is not None:
        kept_as = [answer["versions"], places]
        phases = Phases(given, rollouts, mesh, grid, dump, answer["hbm_limit_bytes"], kept_as)
        answer["phases"] = phases.assigned()
    work = _StepToCompile(given, grid, key)
    if (known := work.kept()) is not None:
        if phases is not None and to_the_end:
            answer["phases"] = phases.finished()
        yield ASSIGNED, answer | known | {"kept": True}
    else:
        for stage, more in work.compiled(lowered, dump / "update", answer["hbm_limit_bytes"], to_the_end=to_the_end):
            if phases is not None and stage == FINISHED:
                answer["phases"] = phases.finished()
            yield stage, answer | more


@dataclass(frozen=True)
class _StepToCompile:
    """A step to compile, unless it is cached."""

    given: compiling.Shapes
    grid: Grid
    key: str

    @property
    def _read(self) -> str:
        return f"{self.key}_{kept_programs.readers()}"

    def kept(self) -> dict[str, Any] | None:
        """The cached program, compiled to the end."""
        found = kept_programs.get(self._read)
        if found is None and (program := kept_programs.get(self.key)) is not None:
            found = self._told(Program(**program["program"]), program["seconds"])
            kept_programs.put(self._read, found)
        return found

    def compiled(self, lowered: Any, dump: Path, limit_bytes: int, *, to_the_end: bool) -> Iterator[Answer]:
        """Compiles: reports once memory is assigned, and at the end, which is cached."""
        print("compiling", flush=True)
        started = time.perf_counter()
        under_way, stage = UnderWay(lowered, dump), ASSIGNED
        try:
            program = under_way.until_assigned(limit_bytes)
            yield stage, self._told(program, time.perf_counter() - started)
            if not to_the_end:
                return
            stage = FINISHED
            print("compiling to the end", flush=True)
            program = under_way.finish()
            seconds = time.perf_counter() - started
            kept_programs.put(self.key, {"program": asdict(program), "seconds": seconds})
            told = self._told(program, seconds)
        except OutOfMemory as error:
            found = {"message": str(error), "needed_bytes": error.needed_bytes}
            told = {"out_of_memory": found, "held": self.given.bytes_per_chip()}
        kept_programs.put(self._read, told)
        yield stage, told

    def _told(self, program: Program, seconds: float) -> dict[str, Any]:
        print("counting", flush=True)
        return {"compiled": asdict(compiling.read(program, self.given, self.grid)), "compile_seconds": seconds}
