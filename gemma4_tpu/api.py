"""The commands as functions, for notebooks and scripts; `Gemma4` holds a model in memory.

```python
from gemma4_tpu import Gemma4, api

trained = api.train("data=chat_jsonl", {"data.train.0.path": "rows.jsonl", "lora.rank": 8})
model = Gemma4.load(trained.folder)
print(model.generate("What is a flip-flop?"))
merged = api.merge(f"run={trained.folder}").values["targets"]["merged"]
```

Overrides are those of the command line and go through the same composition and checks; a mapping needs no quoting. Each
function writes a run folder and returns the record in it. Whatever a command refuses is raised as `UserError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.lists import as_word
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.errors import INTERRUPTED, TERMINATED, Ended, UserError
from gemma4_tpu.evaluate import EVALUATE
from gemma4_tpu.evaluate import run as _evaluate
from gemma4_tpu.merge import MERGE
from gemma4_tpu.merge import run as _merge
from gemma4_tpu.plan import PLAN
from gemma4_tpu.plan import run as _plan
from gemma4_tpu.tracking.records import PLAN_FILE, RESULT, Record, read_record
from gemma4_tpu.train import TRAIN
from gemma4_tpu.train import run as _train

Words = str | Mapping[str, Any]
"""An override such as `lora.rank=8`, or a mapping from keys and groups to values."""


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    folder: Path
    """The run folder."""
    record: Record
    """Contents of its `result.json` (for a plan, `plan.json`; for a search, `search.json`)."""
    exit_code: int
    """As on the command line: 0, 1 for a plan that does not fit, 42 for a training run that was preempted and saved."""

    @property
    def values(self) -> dict[str, Any]:
        """The record's values by key."""
        return self.record.values


def train(*words: Words) -> Done:
    """Fine-tunes a model, like `python -m gemma4_tpu.train …`.

    Composes the configuration, checks it before JAX starts, trains, and leaves a run folder that `merge`, `evaluate`
    and `Gemma4.load` accept. `run_dir=<folder>` resumes a run; `lora.start=<folder>` starts a new one from its
    adapters.

    For example::

        done = train("data=chat_jsonl", {"data.train.0.path": "rows.jsonl", "trainer.max_updates": 100})
        print(done.values["heldout_loss_first"], done.values["heldout_loss_last"])  # nats per target token

    Args:
      *words: overrides of `conf/train.yaml`, as strings or mappings.

    Returns:
      The run's folder and `tracking.result.Result`. The exit code is 42 if the run was preempted and saved.

    Raises:
      UserError: the configuration, the rows or the checkpoint is refused; one message names every problem.
      KeyboardInterrupt: the run was interrupted; its last checkpoint is complete.
    """
    return _done(words, TRAIN, _train, RESULT)


def preview(*words: Words) -> None:
    """Prints what a run would train on: rendered rows, lengths and drops, like `train` with `preview=true`.

    Raises:
      UserError: as for `train`.
    """
    _train(load([*_command_line(words), "preview=true"], TRAIN))


def plan(*words: Words) -> Done:
    """Predicts whether a run fits, how fast it is and what it costs, like `python -m gemma4_tpu.plan …`.

    Compiles the training step for `hardware=…` with the TPU compiler; no TPU is needed, but Linux on x86-64 is. All
    figures are estimates. With `plan.schedule=false` it stops after memory and rooflines, which takes seconds instead
    of minutes.

    For example::

        done = plan("hardware=v6e4", "model=gemma4_31b", {"lora.rank": 64})
        print(done.values["fits"], done.values["hbm_bytes_per_chip"])

    Args:
      *words: overrides of `conf/plan.yaml`, as strings or mappings.

    Returns:
      The plan's folder and `planning.estimate.PlanResult`; with `search=true`, `planning.search.Found`. The exit code
      is 1 if the run does not fit.

    Raises:
      UserError: the configuration is refused.
    """
    return _done(words, PLAN, _plan, PLAN_FILE, "search.json")


def merge(*words: Words) -> Done:
    """Exports a trained run as a model that other tools load, like `python -m gemma4_tpu.merge …`.

    Writes into a staging folder, compares the weights and, where they fit in memory, the logits with the trained model,
    and only then publishes the folder by renaming it. `export=peft` writes an adapter instead of a merged model,
    `export=int8` or `fp8` a quantised one.

    For example::

        done = merge(f"run={trained.folder}")
        print(done.values["targets"]["merged"])

    Args:
      *words: overrides of `conf/merge.yaml`; `run=<folder>` names one run.

    Returns:
      The folder of the export's record. Its values include `targets`: kind of export → folder written.

    Raises:
      UserError: the run has no checkpoint, the target exists, or the comparison failed; nothing is overwritten.
    """
    return _done(words, MERGE, _merge, RESULT)


def evaluate(*words: Words) -> Done:
    """Scores a run, a checkpoint or a server, like `python -m gemma4_tpu.evaluate …`.

    Generates answers and judges them: `eval=verilog_eval` and the other Verilog benchmarks by simulation, which gives
    pass@k; `eval=accuracy` by comparing them with your rows; `eval=lm_eval` runs lm-evaluation-harness.

    For example::

        done = evaluate(f"run={trained.folder}", "eval=verilog_smoke", {"eval.n": 2})
        print(done.folder / "report.md")

    Args:
      *words: overrides of `conf/evaluate.yaml`, as strings or mappings.

    Returns:
      The evaluation's folder and `evals.scores.EvaluationOutcome`; with `eval=lm_eval`, `evals.harness.HarnessOutcome`.

    Raises:
      UserError: the configuration is refused, or the judge's sandbox does not work on this machine.
    """
    return _done(words, EVALUATE, _evaluate, RESULT)


def _done(
    given: tuple[Words, ...], entry: EntryPoint, command: Callable[[Loaded[Any, Any]], Ended], *records: str
) -> Done:
    words = _command_line(given)
    ended = command(load(words, entry))
    if ended.code in (INTERRUPTED, TERMINATED):
        raise KeyboardInterrupt
    if len(ended.folders) != 1:
        raise UserError(
            f"{' '.join(words)}: writes {len(ended.folders)} run folders, but this function returns the record of one;"
            f" use {entry.command}, or one call per run"
        )
    (folder,) = ended.folders
    written = next(path for path in map(partial(Path, folder), records) if path.is_file())
    return Done(folder, read_record(written), ended.code)


def _command_line(given: tuple[Words, ...]) -> list[str]:
    words: list[str] = []
    for one in given:
        words += [one] if isinstance(one, str) else [as_word(key, _plain(value)) for key, value in one.items()]
    return words


def _plain(value: Any) -> Any:
    """Converts a value to types that the command line accepts."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
