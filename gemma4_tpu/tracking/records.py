"""Records: the JSON files of a run folder, each with its `kind` and the `version` of its format.

Readers ask for a kind. Files from before kinds existed, and files of other tools (`vllm bench serve`), are recognised
by their format, here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.files import jsonable, read_json, write_compact_json, write_json

TRAINING, PLAN, MERGE, EVALUATION, HARNESS, SERVING, LOAD_TEST = WORK = (
    "training", "plan", "merge", "evaluation", "harness", "serving", "load_test",
)  # fmt: skip
"""Kinds of run folders; their `result.json` (a plan's `plan.json`) has the same kind."""
(
    CELL, CERTIFICATE, CROSS_CHECK, DATA, DELTAS, PARITY, PROVENANCE, QUANTISED, REPLAY, SEARCH, SELFCHECK, START,
    STIMULUS, SWEEP,
) = (
    "cell", "certificate", "cross_check", "data", "deltas", "parity", "provenance", "quantised", "replay", "search",
    "selfcheck", "start", "stimulus", "sweep",
)  # fmt: skip
VERSION = 1
"""Of the form of every kind."""
FOLDER, RESULT, PLAN_FILE, CONFIG = "record.json", "result.json", "plan.json", "config.yaml"
OVERRIDES = "overrides.yaml"
CERTIFICATE_FILE = "certificate.json"
VALIDATION_FILE = "validation.jsonl"
ROLLOUTS = "rollouts"


@dataclass(frozen=True)
class Record:
    """One file."""

    kind: str | None
    """None: an unknown format."""
    values: dict[str, Any]
    """Without `kind` and `version`."""

    @property
    def failed(self) -> bool:
        """Whether it records only why the work failed."""
        return self.values.get("status") == "failed"


def write_record(path: Path, kind: str, values: Any, *, compact: bool = False) -> None:
    """Writes a mapping or a dataclass as strict JSON with its kind, atomically. `compact`: on one line."""
    write = write_compact_json if compact else write_json
    write(path, {"kind": kind, "version": VERSION, **jsonable(values)})


def read_record(path: Path) -> Record:
    """Reads a record of this or an earlier version.

    Raises:
      UserError: the file cannot be read, or has a later version.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    if not isinstance(values, dict):
        return Record(None, {})
    if not isinstance(values.get("version"), int) or "kind" not in values:
        kind = _old_kind(path, values)
        return Record(kind, _with_rank(values) if kind == PLAN else values)
    kind, version = values.pop("kind"), values.pop("version")
    if version > VERSION:
        raise UserError(f"{path}: a {kind} of version {version}; this gemma4-tpu reads up to {VERSION}: update it")
    return Record(kind, values)


def result_of(folder: Path) -> Record:
    """`result.json` of a run folder; without values if there is none because the run is in progress or was killed."""
    path = folder / RESULT
    if not path.is_file():
        return Record(None, {})
    found = read_record(path)
    if not found.values:
        raise UserError(f"{path}: damaged (not a JSON object)")
    return found


def broken_certificate(folder: Path) -> str | None:
    """Why the certificate of an on-policy run does not hold; None: it does, or the run needs none."""
    path = folder / CERTIFICATE_FILE
    values = read_record(path).values if path.is_file() else {}
    return None if values.get("holds", True) else "; ".join(values.get("broken", []))


def config_of(folder: Path) -> dict[str, Any]:
    """`config.yaml` of a run folder as plain values; empty where there is none."""
    path = folder / CONFIG
    return _read_yaml(path, dict) if path.is_file() else {}


def overrides_of(folder: Path) -> list[str] | None:
    """`overrides.yaml` of a run folder: what was given on its command line; None where there is none."""
    path = folder / OVERRIDES
    return [str(word) for word in _read_yaml(path, list)] if path.is_file() else None


def _read_yaml(path: Path, form: type) -> Any:
    """Raises `UserError` where the file is damaged."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path}: damaged, not valid YAML ({said}); bring back a copy") from None
    if not isinstance(value, form):
        raise UserError(f"{path}: damaged, it holds a {type(value).__name__}, not a {form.__name__}; bring back a copy")
    return value


def kind_of(folder: Path) -> str | None:
    """The kind of a run folder, one of `WORK`; None if it is not one."""
    if (folder / FOLDER).is_file():
        return read_record(folder / FOLDER).kind
    if (folder / "metrics.jsonl").is_file():
        return TRAINING  # even if a plan was laid there
    return PLAN if (folder / PLAN_FILE).is_file() else _kind_by_config(config_of(folder))


# ── before there were kinds ────────────────────────────────────────────────────────────────────────────────────────

_GROUPS = {
    "plan": PLAN, "export": MERGE, "eval": EVALUATION, "serving": SERVING, "bench": LOAD_TEST, "trainer": TRAINING,
}  # fmt: skip
"""Group of the configuration → what took it; a plan takes the trainer's, too."""
_FORMS = {
    PLAN: {"usd_per_million_real_tokens"},
    EVALUATION: {"scores"},
    TRAINING: {"real_tokens"},
    CELL: {"output_throughput", "total_input_tokens", "total_output_tokens", "completed"},
}
"""Kind → keys that tell it. Cells are under the names of `vllm bench serve`, which knows no kinds."""


def _kind_by_config(config: Mapping[str, Any]) -> str | None:
    return next((kind for group, kind in _GROUPS.items() if group in config), None)


def _old_kind(path: Path, values: Mapping[str, Any]) -> str | None:
    if told := next((kind for kind, keys in _FORMS.items() if keys <= values.keys()), None):
        return told
    if path.name == RESULT:
        return _kind_by_config(config_of(path.parent))
    return PLAN if path.name == PLAN_FILE else None


def _with_rank(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan whose adapters' rank stands only in `trained`, its caption."""
    rank = re.search(r"r=(\d+)$", plan.get("trained", ""))
    return {"lora_rank": int(rank[1]) if rank else None} | plan
