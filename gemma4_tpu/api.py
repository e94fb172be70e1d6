"""The commands as functions, for notebooks and scripts; `Gemma4` holds a model in memory.

```python
from gemma4_tpu import Gemma4, api

trained = api.train("data=chat_jsonl", {"data.train.0.path": "rows.jsonl", "lora.rank": 8})
model = Gemma4.load(trained.folder)
print(model.generate("What is a flip-flop?"))
merged = api.merge(f"run={trained.folder}").values["targets"]["merged"]
```

Words are those of the command line, composed and checked as there; mappings spare quoting. What a command refuses is a
`UserError`; each leaves its run folder, and what it wrote there is what its function returns.
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
"""A word of the command line, such as `lora.rank=8`, or keys and groups with their values."""


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    folder: Path
    """Its run folder."""
    record: Record
    """The content of its `result.json` (a plan's `plan.json`, a search's `search.json`)."""
    exit_code: int
    """As on the command line: 0, or a plan's 1 (does not fit) and a training run's 42 (preempted and saved)."""

    @property
    def values(self) -> dict[str, Any]:
        """The record's values by their key."""
        return self.record.values


def train(*words: Words) -> Done:
    """Fine-tunes: `python -m gemma4_tpu.train …`. Values: `tracking.result.Result`.

    Raises:
      UserError: what the command refuses, in one message. So do the other functions here.
    """
    return _done(words, TRAIN, _train, RESULT)


def preview(*words: Words) -> None:
    """Prints what a run would learn from: rendered rows, lengths, drops; as `train` with `preview=true`."""
    _train(load([*_command_line(words), "preview=true"], TRAIN))


def plan(*words: Words) -> Done:
    """Whether it fits, how fast it is and what it costs: `python -m gemma4_tpu.plan …`.

    Values: `planning.estimate.PlanResult`, or with `search=true` `planning.search.Found`.
    """
    return _done(words, PLAN, _plan, PLAN_FILE, "search.json")


def merge(*words: Words) -> Done:
    """A trained run as a model that others can load: `python -m gemma4_tpu.merge …`, of one run.

    Values: among others `targets`, the folders written, by kind.
    """
    return _done(words, MERGE, _merge, RESULT)


def evaluate(*words: Words) -> Done:
    """Pass@k or accuracy: `python -m gemma4_tpu.evaluate …`.

    Values: `evals.scores.EvaluationOutcome`, or with `eval=lm_eval` `evals.harness.HarnessOutcome`.
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
            f"{' '.join(words)}: leaves {len(ended.folders)} run folders, and this function returns the record of one;"
            f" use {entry.command}, or a call for each run"
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
    """A value in types that the command line knows."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
