"""Training runs and evaluations of an experiment on `tiny`: each is a command in its own process, and one that has
finished is not repeated. The CPU time of each is recorded with them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma4_tpu.evals.compare import compare
from gemma4_tpu.evals.scores import EvaluationOutcome
from gemma4_tpu.tracking.files import write_json
from gemma4_tpu.tracking.result import Result

CPU_FILE = "cpu_seconds.json"


@dataclass(frozen=True)
class SmallRuns:
    """Of one experiment, under `out`."""

    out: Path

    def train(self, name: str, *words: str) -> str:
        """The run folder of a training run without held-out rows."""
        run = self.out / name
        if not (run / "result.json").is_file():
            seconds = _run("train", "data.heldout=[]", "checkpoint.keep_best=false", *words, f"run_dir={run}")
            write_json(self.out / CPU_FILE, {**self.cpu_seconds, name: self.cpu_seconds.get(name, 0.0) + seconds})
        return str(run)

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """Of each training run: of all its starts, compilation included."""
        path = self.out / CPU_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def result(self, name: str) -> Result:
        """The result of a training run."""
        return Result.read(self.out / name / "result.json")

    def evaluate(self, name: str) -> EvaluationOutcome:
        """Two samples to each of the 200 held-out problems."""
        folder = self.out / f"{name}_evaluation"
        if not (folder / "result.json").is_file():
            _run("evaluate", f"run={self.out / name}", "eval.adapter=run", f"run_dir={folder}")
        return EvaluationOutcome.read(folder / "result.json")

    def record(self, names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Updates, tokens, pass@1 with intervals, and differences of some pairs, problem by problem."""
        results = {name: self.result(name) for name in names}
        outcomes = {name: self.evaluate(name) for name in names}
        return {
            "updates": {name: result.updates for name, result in results.items()},
            "target_tokens": {name: result.target_tokens for name, result in results.items()},
            "cpu_seconds": {name: round(seconds, 1) for name, seconds in self.cpu_seconds.items()},
            "pass_at_1": {name: asdict(outcome.scores()["strict"]["all"][0]) for name, outcome in outcomes.items()},
            "differences": {
                f"{a} - {b}": asdict(compare(outcomes[a], outcomes[b], (a, b)).differences[0]) for a, b in pairs
            },
        }


def _run(command: str, *words: str) -> float:
    """CPU seconds that a command took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", f"gemma4_tpu.{command}", *words], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
