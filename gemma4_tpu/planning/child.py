"""One compilation in a process of its own: it can be stopped, its memory comes back, and several run at a time.

`python -m gemma4_tpu.planning.child <folder>` reads `request.json` there and writes `answer.json`; what it is doing
goes to stdout, one word per line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gemma4_tpu.config.load import from_yaml, to_yaml
from gemma4_tpu.config.tasks import PlanRoot
from gemma4_tpu.errors import UserError

REQUEST, ANSWER, DUMP = "request.json", "answer.json", "dump"


@dataclass(frozen=True)
class Request:
    """What to compile."""

    config: PlanRoot
    """With a remat policy, not `auto`."""
    updates: int


class Compilation:
    """A compilation under way."""

    def __init__(self, request: Request, stage: Callable[[str], None] = lambda name: None):
        self._folder = tempfile.TemporaryDirectory(prefix="gemma4-plan-")
        self._place = Path(self._folder.name)
        content = {"config": to_yaml(request.config), "updates": request.updates}
        (self._place / REQUEST).write_text(json.dumps(content), encoding="utf-8")
        self._errors = (self._place / "stderr").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gemma4_tpu.planning.child", str(self._place)],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._reader = threading.Thread(target=self._listen, args=(stage,), daemon=True)
        self._reader.start()

    def _listen(self, stage: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            stage(line.strip())

    def wait(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The answer; None if it is not there after so many seconds.

        The answer has `hbm_limit_bytes` and either `compiled` or `out_of_memory` (`message`, `needed_bytes`).

        Raises:
          UserError: the compiler refused the configuration.
          RuntimeError: it failed in another way; with the end of what it said.
        """
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(5)
        try:
            if not (self._place / ANSWER).is_file():
                raise RuntimeError(f"the compiling process ended with {_signal(code)}:\n{self._said()}")
            answer = json.loads((self._place / ANSWER).read_text(encoding="utf-8"))
        finally:
            self.close()
        if "refused" in answer:
            raise UserError(answer["refused"])
        return answer

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-3000:].strip()

    def close(self) -> None:
        """Stops it if it still runs, and removes its folder."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._errors.close()
        with suppress(OSError):
            self._folder.cleanup()


def _signal(code: int) -> str:
    if code == -9:
        return "signal 9 (was the machine out of memory? A whole 31B takes about 5 GB)"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def main(folder: str) -> None:
    """Compiles what the request describes."""
    from gemma4_tpu.planning.topology import set_environment

    set_environment()
    place = Path(folder)
    content = json.loads((place / REQUEST).read_text(encoding="utf-8"))
    try:
        answer = _compile(from_yaml(content["config"], PlanRoot), content["updates"], place / DUMP)
    except UserError as refusal:
        answer = {"refused": str(refusal)}
    (place / ANSWER).write_text(json.dumps(answer), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the compiler may still be generating code, which nobody waits for


def _compile(config: PlanRoot, updates: int, dump: Path) -> dict[str, Any]:
    from importlib.metadata import version

    from gemma4_tpu.config.checks import rows_per_microbatch
    from gemma4_tpu.config.plan_checks import examine_plan
    from gemma4_tpu.models.sharding import make_mesh
    from gemma4_tpu.planning import compile as compiling
    from gemma4_tpu.planning.program import OutOfMemory, finish, until_assigned
    from gemma4_tpu.planning.topology import absent_devices

    checked, problems = examine_plan(config)
    if checked is None:
        raise UserError("; ".join(problem.message for problem in problems))
    devices = absent_devices(checked.slice)
    limit = compiling.hbm_limit_bytes(devices[0])
    answer: dict[str, Any] = {
        "hbm_limit_bytes": limit,
        "versions": {"jax": version("jax"), "libtpu": version("libtpu")},
    }
    sizes = checked.mesh
    rows = rows_per_microbatch(config.trainer, config.data, sizes.row_places)
    given = compiling.shapes(
        checked.architecture, config.lora, config.optimizer, config.trainer,
        make_mesh(sizes.fsdp, sizes.tp, devices, dp=sizes.dp),
        rows=rows, length=config.data.sequence_length, updates=updates, options=config.hardware.compiler_options,
    )  # fmt: skip
    how = partial(finish, folder=dump)
    if not config.plan.generate_code:
        how = partial(until_assigned, folder=dump, limit_bytes=limit)
    try:
        answer["compiled"] = asdict(compiling.compile_step(given, how, lambda name: print(name, flush=True)))
    except OutOfMemory as error:
        answer["out_of_memory"] = {"message": str(error), "needed_bytes": error.needed_bytes}
        answer["held"] = given.bytes_per_chip()
    return answer


if __name__ == "__main__":
    main(sys.argv[1])
