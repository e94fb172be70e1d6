"""Sections about a run itself: curves, result, data, configuration, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu.costing.figures import BY, ESTIMATED, MEASURED
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import GIB
from gemma4_tpu.markdown import code, pictures, plain, table
from gemma4_tpu.prices import format_usd
from gemma4_tpu.reporting.curves import Followed, draw_curves, missing
from gemma4_tpu.reporting.found import Records
from gemma4_tpu.tracking.differences import leaves
from gemma4_tpu.tracking.metrics import HELDOUT, read_metrics
from gemma4_tpu.tracking.progress import format_seconds
from gemma4_tpu.tracking.records import config_of, overrides_of, read_record
from gemma4_tpu.tracking.result import Result

_MEASURED, _ESTIMATED = BY[MEASURED], BY[ESTIMATED]
_THEIR_OWN = ("run_dir", "name", "replay")
"""Keys that differ even between equal runs."""
Fact = tuple[str, str, str]
"""(what, figure, its origin)"""


def result_of(records: Records) -> Result | None:
    """The run's result; None until it has ended."""
    return Result.read(records.run.result_path) if records.run.result_path.is_file() else None


def followed(records: Records) -> Followed:
    """The run with its rows; raises UserError if they are damaged."""
    try:
        return Followed(records.name, read_metrics(records.run.metrics_path))
    except ValueError as error:
        raise UserError(str(error)) from None


def training(records: Records, page: Path, folder: Path) -> Iterator[str]:
    """The section about training: curves (drawn into `folder`), result and data."""
    yield from ["## Training", ""]
    curves = followed(records)
    if curves.rows:
        last = max(row["update"] for row in curves.rows)
        yield f"{_MEASURED} at each of the {last:,} updates: `metrics.jsonl`, {len(curves.rows):,} rows."
        yield ""
        yield from pictures(draw_curves([curves], folder), page)
        if absent := missing([curves]):
            yield from [f"Not recorded, so not drawn: {', '.join(absent)}{_why(absent)}.", ""]
    else:
        yield from ["No curves: `metrics.jsonl` has no row.", ""]
    yield from ["### Result", ""]
    result = result_of(records)
    if result is None:
        yield from ["No `result.json`: the run has not ended, or it was killed.", ""]
    else:
        yield from table(["", "figure", "by"], [list(fact) for fact in facts(result)])
    yield from _data(records)


def _why(absent: Sequence[str]) -> str:
    return " (this backend does not report its memory)" if absent == ["device memory"] else ""


def facts(result: Result) -> list[Fact]:
    """All figures that `result.json` contains."""
    reason = result.error or result.ended
    ended = plain(result.status) + (f": {plain(reason)}" if reason else "")
    found: list[Fact] = [("Status", ended, ""), ("Updates", f"{result.updates:,}", _MEASURED)]
    if result.skipped_updates:
        found.append(("Updates skipped as spikes", f"{result.skipped_updates:,}", _MEASURED))
    if result.train_loss_last is not None:
        found.append(("Training loss, first and last update", _pair(result.train_loss_first, result.train_loss_last),
                      _MEASURED))  # fmt: skip
    if result.heldout_loss_last is not None:
        found.append(("Held-out loss, before and after", heldout(result), _MEASURED))
    if result.heldout_loss_best is not None:
        at = f"{result.heldout_loss_best:.4f} at update {result.heldout_update_best}"
        found.append(("Lowest held-out loss", at, _MEASURED))
    found += [(_words(name), f"{value:.4g}", _MEASURED) for name, value in result.measures.items()]
    tokens = f"{result.real_tokens:,}, {result.target_tokens:,} of them with loss"
    fill = f", fill {result.fill:.1%}" if result.fill is not None else ""
    found += [("Real tokens", tokens + fill, _MEASURED), ("Time", format_seconds(result.seconds), _MEASURED)]
    if result.goodput is not None:
        found.append(("Goodput: share of the run's time that trained", f"{result.goodput:.0%}", _MEASURED))
    if result.real_tokens_per_second:
        found.append(("Real tokens per second", f"{result.real_tokens_per_second:,.0f}", _MEASURED))
    if result.update_seconds is not None:
        told = f"{result.update_seconds:.3g} s"
        if result.measured_over_predicted is not None:
            low, high = result.measured_over_predicted_low, result.measured_over_predicted_high
            told += f", {result.measured_over_predicted:.2f} times what {code(result.predicted_by)} says"
            told += f" ({low:.2f} to {high:.2f} over most updates)"
        found.append(("An update", told, _MEASURED))
    if result.mfu is not None:
        found.append(("Model FLOP/s utilisation", f"{result.mfu:.1%}", f"{_ESTIMATED}: measured rate × counted FLOPs"))
    peak = "not reported by this backend"
    if result.hbm_peak_bytes is not None:
        peak = f"{result.hbm_peak_bytes / GIB:.2f} GiB"
    found.append(("Peak device memory", peak, _MEASURED if result.hbm_peak_bytes is not None else ""))
    if result.lora_parameters is not None:
        trained = f"{result.lora_parameters:,} on {result.adapted_modules} matrices"
        found.append(("LoRA parameters", trained if result.lora_parameters else "none: full fine-tuning", _MEASURED))
    if result.in_full_parameters:
        found.append(("Parameters trained in full", f"{result.in_full_parameters:,}", _MEASURED))
    if result.usd is not None:
        found.append(("Cost", format_usd(result.usd), f"{_ESTIMATED}: measured time × price"))
    return found


def _words(measure: str) -> str:
    """A key of `Result.measures` in words."""
    name = measure.removeprefix(HELDOUT).replace("_", " ")
    return f"Held-out {name}, at the end" if measure.startswith(HELDOUT) else f"{name.capitalize()}, last update"


def heldout(result: Result) -> str:
    """Held-out loss before and after, in words."""
    return _pair(result.heldout_loss_first, result.heldout_loss_last)


def _pair(first: float | None, last: float | None) -> str:
    return f"{first:.4f} → {last:.4f}" if first is not None else f"{last:.4f}"


def _data(records: Records) -> Iterator[str]:
    yield from ["### Data", ""]
    if not records.run.data_path.is_file():
        yield from ["No `data.json`: the training data is not recorded.", ""]
        return
    data = read_record(records.run.data_path).values
    rows = []
    for split in ("train", "heldout"):
        if told := data.get(split):
            lengths = told.get("length_tokens", {})
            rows.append([split, *(_number(told.get(key)) for key in ("examples", "real_tokens", "target_tokens")),
                         *(_number(lengths.get(key)) for key in ("mean", "p99", "max"))])  # fmt: skip
    heads = ["", "examples", "real tokens", "with loss", "mean length", "99% are below", "longest"]
    yield from table(heads, rows, "lrrrrrr")
    dropped = data.get("train", {}).get("dropped") or {}
    reasons = [f"{drop['count']:,} {code(reason)} ({plain(drop['meaning'])})" for reason, drop in dropped.items()]
    yield from [f"{_MEASURED} when the data was read. Rows dropped: {'; '.join(reasons) or 'none'}.", ""]


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,.10g}"


def configuration(records: Records) -> Iterator[str]:
    """The section about configuration: what was given on the command line, then all of it."""
    yield from ["## Configuration", ""]
    given = overrides_of(records.run.path)
    if given is None:
        yield from ["No `overrides.yaml`: the command line is not recorded.", ""]
    elif given:
        yield from ["Given on the command line:", "", *(f"- {code(word)}" for word in given), ""]
    else:
        yield from ["Nothing was given on the command line; all values are defaults.", ""]
    text = yaml.safe_dump(config_of(records.run.path), sort_keys=False, allow_unicode=True).rstrip()
    yield from ["The resolved configuration (`config.yaml`):", "", "~~~~yaml", *text.splitlines(), "~~~~", ""]


def provenance(records: Records) -> Iterator[str]:
    """The section about provenance: code, packages, machine, seeds, fingerprints."""
    yield from ["## Provenance", ""]
    if not records.run.provenance_path.is_file():
        yield from ["No `provenance.json`: code, packages and machine are not recorded.", ""]
        return
    told = read_record(records.run.provenance_path).values
    source = told.get("code", {})
    changed = {True: ", with the changes in `git.diff`", False: "", None: ""}[source.get("git_dirty")]
    commit = f"commit {code(source['git_commit'][:12])}{changed}; " if source.get("git_commit") else ""
    rows = [
        ["Started", plain(told.get("started", ""))],
        ["Command", code(" ".join(told.get("command", [])))],
        ["Code", f"{commit}sha256 of the package's files {code(source.get('sha256', '')[:12])}"],
        ["Machine", _listed({"python": told.get("python"), "platform": told.get("platform"), "host": told.get("host"),
                             **told.get("hardware", {})})],
        ["Seeds", _listed(told.get("seeds", {}))],
        ["Packages", _listed(told.get("packages", {}))],
        ["Fingerprints", _listed(told.get("fingerprints", {}))],
        ["Starts", str(1 + len(told.get("resumed", [])))],
    ]  # fmt: skip
    yield from table(["", ""], rows)


def _listed(values: dict[str, Any]) -> str:
    """`name value, name value`; hashes are shortened to twelve characters."""
    shown = {
        name: value[:12] if isinstance(value, str) and len(value) == 64 else value for name, value in values.items()
    }
    return ", ".join(f"{plain(name)} {plain(value)}" for name, value in shown.items() if value not in (None, ""))


def differences(several: Sequence[Records]) -> list[list[str]]:
    """One row for each configuration key whose values differ between runs: the key, then its value in each run.

    Keys that only some of the runs have (because another version wrote them) are left out.
    """
    flat = [dict(leaves(config_of(records.run.path))) for records in several]
    rows = []
    for key in flat[0]:
        if key in _THEIR_OWN or not all(key in config for config in flat):
            continue
        values = [config[key] for config in flat]
        if any(value != values[0] for value in values[1:]):
            rows.append([code(key), *(plain("null" if value is None else value) for value in values)])
    return rows
