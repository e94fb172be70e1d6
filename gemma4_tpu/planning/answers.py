"""What the compiling process finds out: a plan's figures once memory is assigned, and its schedule at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gemma4_tpu.compiler_flags import compiler_options
from gemma4_tpu.config.checks import rows_per_microbatch
from gemma4_tpu.config.plan_checks import examine_plan
from gemma4_tpu.config.tasks import PlanRoot
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.sharding import make_mesh
from gemma4_tpu.planning import compile as compiling
from gemma4_tpu.planning import programs
from gemma4_tpu.planning.child import ASSIGNED, FINISHED
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.program import OutOfMemory, Program, UnderWay
from gemma4_tpu.planning.topology import absent_devices

UPDATES = 1_000
"""Of the run, as the program's learning rates see it: the same for all plans, so that a run with other rows or epochs
is the same program. No figure depends on it."""
Answer = tuple[str, dict[str, Any]]
"""A stage, and what is known then: `hbm_limit_bytes`, `versions`, and either `compiled` (`compile.Compiled`) or
`out_of_memory` (`message`, `needed_bytes`). What was compiled before is known at once, with its schedule."""


def answers(config: PlanRoot, dump: Path) -> Iterator[Answer]:
    """Compiles the step of a configuration.

    Args:
      config: with a remat policy, not `auto`.
      dump: a folder to make, for the compiler's files.

    Raises:
      UserError: the configuration, or the compiler, refuses it.
    """
    checked, problems = examine_plan(config)
    if checked is None:
        raise UserError("; ".join(problem.message for problem in problems))
    sizes, options = checked.mesh, compiler_options(config.hardware)
    mesh = make_mesh(sizes.fsdp, sizes.tp, absent_devices(checked.slice), dp=sizes.dp)
    devices = list(mesh.devices.flat)
    rows = rows_per_microbatch(config.trainer, config.data, sizes.row_places)
    given = compiling.shapes(
        checked.architecture, config.lora, config.optimizer, config.trainer, mesh,
        rows=rows, length=config.data.sequence_length, updates=UPDATES, options=options,
    )  # fmt: skip
    answer: dict[str, Any] = {
        "hbm_limit_bytes": compiling.hbm_limit_bytes(devices[0]),
        "versions": {"jax": version("jax"), "libtpu": version("libtpu")},
    }
    print("lowering", flush=True)
    started = time.perf_counter()
    lowered = compiling.lower_step(given)
    answer["lowering_seconds"] = time.perf_counter() - started
    places = [f"{device.device_kind} {device.coords}" for device in devices]
    key = programs.key(lowered.as_text(), answer["versions"], options, places)
    work = _Work(given, Grid.of(checked.slice, [device.coords for device in devices]), key)
    if (known := work.kept()) is not None:
        yield ASSIGNED, answer | known | {"kept": True}
    else:
        for stage, more in work.compiled(lowered, dump, answer["hbm_limit_bytes"], to_the_end=config.plan.schedule):
            yield stage, answer | more


@dataclass(frozen=True)
class _Work:
    """A step to compile, unless that was done before."""

    given: compiling.Shapes
    grid: Grid
    key: str

    @property
    def _read(self) -> str:
        return f"{self.key}_{programs.readers()}"

    def kept(self) -> dict[str, Any] | None:
        """What is known of the program that was compiled to the end before."""
        found = programs.get(self._read)
        if found is None and (program := programs.get(self.key)) is not None:
            found = self._told(Program(**program["program"]), program["seconds"])
            programs.put(self._read, found)
        return found

    def compiled(self, lowered: Any, dump: Path, limit_bytes: int, *, to_the_end: bool) -> Iterator[Answer]:
        """Compiles: what is known once memory is assigned, and at the end, which is kept."""
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
            programs.put(self.key, {"program": asdict(program), "seconds": seconds})
            told = self._told(program, seconds)
        except OutOfMemory as error:
            found = {"message": str(error), "needed_bytes": error.needed_bytes}
            told = {"out_of_memory": found, "held": self.given.bytes_per_chip()}
        programs.put(self._read, told)
        yield stage, told

    def _told(self, program: Program, seconds: float) -> dict[str, Any]:
        print("counting", flush=True)
        return {"compiled": asdict(compiling.read(program, self.given, self.grid)), "compile_seconds": seconds}
