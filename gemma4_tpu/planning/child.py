"""The process of one compilation: `python -m gemma4_tpu.planning.child <folder>`.

Reads `request.json` there and writes an answer for each stage; prints its progress to stdout, one line per step.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from gemma4_tpu.config.load import from_yaml
from gemma4_tpu.config.tasks import PlanRoot
from gemma4_tpu.errors import UserError
from gemma4_tpu.planning.checks import examine_plan, recipe_of
from gemma4_tpu.planning.compilation import ASSIGNED, DUMP, REQUEST, WRITTEN
from gemma4_tpu.training.rollouts_checks import is_on_policy


def main(folder: str) -> None:
    """Compiles what the request describes."""
    from gemma4_tpu.planning.topology import set_environment

    set_environment()
    place = Path(folder)
    threading.Thread(target=_end_with_parent, args=(place,), daemon=True).start()
    content = json.loads((place / REQUEST).read_text(encoding="utf-8"))
    from gemma4_tpu.planning.answers import answers  # imports JAX

    config: PlanRoot = from_yaml(content["config"], PlanRoot)
    try:
        checked, problems = examine_plan(config)
        if checked is None:
            raise UserError("; ".join(problem.message for problem in problems))
        recipe = recipe_of(config, checked)
        rollouts = config.rollouts if is_on_policy(config.objective) else None
        for stage, answer in answers(
            recipe, checked.slice, place / DUMP, to_the_end=config.plan.schedule, rollouts=rollouts
        ):  # fmt: skip
            _write(place / f"{stage}.json", answer)
    except UserError as refusal:
        _write(place / f"{ASSIGNED}.json", {"refused": str(refusal)})
    sys.stdout.flush()
    os._exit(0)  # the compiler may still be generating code that nobody waits for


def _end_with_parent(place: Path) -> None:
    """Ensures that a killed plan leaves neither this process nor its folder."""
    sys.stdin.read()
    shutil.rmtree(place, ignore_errors=True)
    os._exit(1)


def _write(path: Path, answer: dict[str, Any]) -> None:
    path.write_text(json.dumps(answer), encoding="utf-8")
    print(f"{WRITTEN}{path.stem}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
