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
from gemma4_tpu.tracking import shapes
from gemma4_tpu.tracking.files import jsonable, read_json, write_compact_json, write_json
from gemma4_tpu.tracking.typed import Shape

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


_SHAPES = {
    TRAINING: shapes.TRAINING, PLAN: shapes.PLAN, MERGE: shapes.MERGE, EVALUATION: shapes.EVALUATION,
    HARNESS: shapes.HARNESS, SERVING: shapes.SERVING, LOAD_TEST: shapes.LOAD_TEST, CELL: shapes.CELL,
    CERTIFICATE: shapes.CERTIFICATE, DATA: shapes.DATA, PROVENANCE: shapes.PROVENANCE, REPLAY: shapes.REPLAY,
    STIMULUS: shapes.STIMULUS, SWEEP: shapes.SWEEP,
}  # fmt: skip
"""Of the kinds that a command reads."""
_NAMED = {
    f"{kind}.json": kind for kind in (CERTIFICATE, DATA, PLAN, PROVENANCE, REPLAY, STIMULUS, SWEEP)
}  # fmt: skip
"""Files that are of one kind in every run folder, whether they say so or not."""
_AGAIN = {
    PLAN: ", or plan again", MERGE: ", or merge again", EVALUATION: ", or evaluate again into another folder",
    LOAD_TEST: ", or run the load test again", CELL: ", or delete it: the same load test measures it again",
    SWEEP: ", or use another folder", TRAINING: ", or delete it: the run then counts as not ended",
}  # fmt: skip
"""Kind → what works besides bringing back a copy."""


def check_shape(value: Any, shape: Shape, where: str | Path, advice: str = "bring back a copy") -> None:
    """Checks what a file contains.

    Args:
      value: its content.
      shape: what its writer writes.
      where: the file, with a line number if it has several rows.
      advice: what would work.

    Raises:
      UserError: it has another shape; names the file, the dotted key, what it is and what it should be.
    """
    if told := shape(value, ""):
        raise UserError(f"{where}: damaged: {told}; {advice}")


def read_checked(path: Path, shape: Shape, advice: str) -> Any:
    """The content of a JSON file other than a record, as `check_shape` has it.

    Raises:
      UserError: it is not JSON, or has another shape.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); {advice}") from None
    check_shape(content, shape, path, advice)
    return content


def read_record(path: Path, wanted: str | None = None) -> Record:
    """Reads a record of this or an earlier version, and checks that it has the shape of its kind.

    Args:
      path: the file.
      wanted: the kind that the caller relies on; None: whatever the file says it is.

    Raises:
      UserError: the file cannot be read, is of another kind, has a later version, or another shape than its kind.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    found = _recognised(path, content) if isinstance(content, dict) else Record(None, {})
    kind = wanted or _NAMED.get(path.name) or found.kind
    if found.kind not in (None, kind):
        raise UserError(f"{path}: damaged: kind is {found.kind!r}, not {kind!r}; bring back a copy")
    if kind in _SHAPES and path.name != FOLDER:  # which says only the kind
        values = found.values if isinstance(content, dict) else content
        check_shape(values, _SHAPES[kind], path, f"bring back a copy{_AGAIN.get(kind, '')}")
    return found


def _recognised(path: Path, values: dict[str, Any]) -> Record:
    if not isinstance(values.get("version"), int) or not isinstance(values.get("kind"), str):
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
    values = read_record(path, CERTIFICATE).values if path.is_file() else {}
    return None if values.get("holds", True) else "; ".join(values["broken"])


def config_of(folder: Path) -> dict[str, Any]:
    """`config.yaml` of a run folder as plain values; empty where there is none."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    config = _read_yaml(path, dict)
    check_shape(config, shapes.CONFIG, path)
    return config


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
    rank = re.search(r"r=(\d+)$", str(plan.get("trained")))
    return {"lora_rank": int(rank[1]) if rank else None} | plan
