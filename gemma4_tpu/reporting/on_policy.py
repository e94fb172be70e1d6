"""The section about the certificate of a run that learned from its own answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma4_tpu.costing.figures import BY, MEASURED
from gemma4_tpu.markdown import plain, table
from gemma4_tpu.reporting.found import Records
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.records import CERTIFICATE_FILE, VALIDATION_FILE, read_record

_MEASURED = BY[MEASURED]
_STATES = {
    "reward": ("reward", ".3f"), "mean_tokens": ("tokens", ".1f"), "entropy": ("entropy (nats per token)", ".3f"),
    "malformed": ("malformed", ".1%"),
}  # fmt: skip
"""Key of a policy's state → its heading and format."""


def on_policy(records: Records) -> Iterator[str]:
    """Whether its batches came from the policy that they trained, with the evidence; nothing for other runs."""
    path = records.run.path / CERTIFICATE_FILE
    if not path.is_file():
        return
    known = read_record(path).values
    yield from ["## On-policy certificate", ""]
    if known["holds"]:
        yield f"It holds over {known['updates']:,} updates. {_MEASURED}, all of it: `{CERTIFICATE_FILE}`."
    else:
        yield f"**It does not hold**: {plain('; '.join(known['broken']))}."
    yield ""
    yield from table(["", "figure"], list(_proof(known)))
    if known["by_kind"]:
        yield from table(["answers by verdict", "answers", "mean reward"], [
            [plain(kind), f"{one['answers']:,}", f"{one['mean_reward']:.3f}"] for kind, one in known["by_kind"].items()
        ])  # fmt: skip
    yield from _validated(records.run.path / VALIDATION_FILE)
    shown = [name for name in _STATES if name in known["first"]]
    yield from table(["", *(_STATES[name][0] for name in shown)], [
        [f"update {one['update']}", *(format(one[name], _STATES[name][1]) for name in shown)]
        for one in (known["first"], known["last"])
    ])  # fmt: skip


def _validated(path: Path) -> Iterator[str]:
    """The first, last and best of its validations, compared with the first."""
    rows = read_metrics(path) if path.is_file() else []
    if not rows:
        return
    best = max(rows, key=lambda row: row["reward"])
    shown = {row["update"]: row for row in (rows[0], best, rows[-1])}
    yield from table(["validation, after update", "mean reward", "difference from the start (95% over prompts)"], [
        [f"{update}", f"{row['reward']:.3f}",
         f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if "difference" in row else ""]
        for update, row in sorted(shown.items())
    ])  # fmt: skip
    yield f"On {len(rows[0]['rewards'])} prompts that were not trained on, same seeds each time. {_MEASURED}."
    if "low" in rows[-1]:
        least = (rows[-1]["high"] - rows[-1]["low"]) / 2
        yield f"With this many answers, a difference of less than about {least:.2f} cannot be told from chance."
    if best is not rows[-1]:
        yield f"The best of {len(rows)} validations owes something to chance: the last row is the run's result."
    yield ""


def _proof(known: dict[str, Any]) -> Iterator[list[str]]:
    compared, groups, answers, kl = (known[key] for key in ("compared", "groups", "answers", "kl"))
    updates = ", ".join(map(str, compared["updates"][:6])) + (", …" if len(compared["updates"]) > 6 else "")
    if compared["tokens"]:
        yield ["Sampler compared with trainer, mean |Δ log p| (worst update; limit)",
               f"{compared['mean_difference']:.2g} ({compared['limit']:g}), {compared['tokens']:,} tokens of updates"
               f" {updates}"]  # fmt: skip
        yield ["The same, largest of any token", f"{compared['max_difference']:.2g}"]
        yield ["Surprise of the samples, standard errors (limit)",
               f"{compared['surprise_z']:+.1f} ({compared['surprise_limit']:g})"]  # fmt: skip
    yield ["Policies sampled from and trained, distinguished by digest", f"{known['adapters']:,}"]
    if lag := known.get("max_lag"):
        yield ["Updates between drawing and training, at most (`rollouts.off_policy`)", f"{lag}"]
    if known["max_loss_error"] is not None:
        yield ["Loss of the step compared with its batch, off by at most", f"{known['max_loss_error']:.1g}"]
    yield ["Groups with and without something to learn from", f"{groups['live']:,} and {groups['dead']:,}"]
    yield ["Answers; distinct; cut off", f"{answers['answers']:,}; {answers['distinct']:,}; {answers['truncated']:,}"]
    if kl["max"] is not None:
        yield ["KL per update, nats per token: mean, maximum", f"{kl['mean']:.2g}, {kl['max']:.2g}"]
