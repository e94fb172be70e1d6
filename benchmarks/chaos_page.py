"""What `chaos.py` counts, and the figures on chaos.md that it makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmarks.killing import KillTally
from gemma4_tpu.markdown import table

EVERY, UPDATES = 3, 60
"""Updates between checkpoints, and of a training run."""
KILLS_PER_COMMAND = 8


@dataclass
class KillCounts:
    """What the table shows."""

    series: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    """By what was killed, and how: `train SIGKILL`."""
    resumes: int = 0
    """Starts that resumed from a checkpoint."""
    fresh_starts: int = 0
    """Starts that found none yet."""
    exits_42: int = 0
    interrupted_saves: int = 0
    """Kills while a checkpoint was being written."""
    lost_updates: list[int] = field(default_factory=list)
    """Of each killed training: updates done that the next start has to do again."""
    unrecoverable: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Kills after which something else was not as documented."""
    left_by_sigkill: int = 0
    """SIGKILLs after which temporary files were left."""
    equal_weights: int = 0
    equal_metrics: int = 0
    equal_merges: int = 0
    seconds: float = 0.0

    @property
    def total_kills(self) -> int:
        return sum(self.kills.values())


def page(counts: KillCounts, tallies: dict[str, KillTally], stamp: str) -> str:
    """The result as Markdown; `stamp` is when and where it began."""
    lost = counts.lost_updates
    rows = [
        ("training runs (series)", counts.series),
        *[(f"kills: {what}", number) for what, number in sorted(counts.kills.items())],
        ("kills in all", counts.total_kills),
        ("of them while a checkpoint was being written", counts.interrupted_saves),
        ("SIGTERM or SIGUSR2 during a training run that exited with 42", counts.exits_42),
        ("starts that resumed from a checkpoint", counts.resumes),
        ("starts that found no checkpoint yet", counts.fresh_starts),
        (f"updates lost by a kill (checkpoint.every={EVERY}): mean", f"{np.mean(lost):.1f}" if lost else "-"),
        ("updates lost by a kill: most", max(lost, default=0)),
        ("final weights equal to the reference, bitwise", f"{counts.equal_weights} of {counts.series}"),
        ("metrics.jsonl equal to the reference, no gap or duplicate", f"{counts.equal_metrics} of {counts.series}"),
        ("merged models equal to the reference, bitwise", f"{counts.equal_merges} of {counts.series}"),
        ("SIGKILLs that left temporary files", counts.left_by_sigkill),
        ("unrecoverable", len(counts.unrecoverable)),
        ("different results", len(counts.different)),
        ("otherwise not as documented", len(counts.wrong)),
    ]
    others = [
        (name, *(tally.kills.get(number, 0) for number in ("SIGINT", "SIGTERM", "SIGUSR2", "SIGKILL")),
         ", ".join(f"{code} ({times})" for code, times in sorted(tally.exits.items())),
         f"{tally.went_on} of {tally.series}", tally.left_by_sigkill, len(tally.wrong))
        for name, tally in tallies.items()
    ]  # fmt: skip
    total = counts.total_kills + sum(tally.total for tally in tallies.values())
    lines = [
        f"{stamp} {total} kills in {counts.seconds / 60:.0f} minutes.",
        "",
        "## Training and merging, bit by bit",
        "",
        *table(["", ""], rows),
        f"Each training run makes {UPDATES} updates of `tiny`, cut to two layers, with dropout, two microbatches,"
        f" packed rows and a checkpoint every {EVERY} updates, written while training continues. A kill loses the"
        " updates since the last complete checkpoint: at most one interval, plus those made while the next one was"
        " being written.",
        "",
        "## Every other command",
        "",
        f"At most {KILLS_PER_COMMAND} kills a series, at moments drawn evenly over the time of an untouched start."
        " After each: the documented exit code, one message and no traceback, no process left, and, but for SIGKILL, no"
        " temporary file; after each series the same command, left alone, has to end with what an untouched one leaves."
        " `search` is an Optuna search of 20 jobs, `meshes` a sweep over meshes of 8 CPU devices.",
        "",
        *table(
            ["command", "SIGINT", "SIGTERM", "SIGUSR2", "SIGKILL", "exit codes (times)", "series that ended as if never"
             " touched", "SIGKILLs that left temporary files", "not as documented"],
            others,
        ),
    ]  # fmt: skip
    wrong = [
        *counts.unrecoverable,
        *counts.different,
        *counts.wrong,
        *(line for tally in tallies.values() for line in tally.wrong),
    ]
    if wrong:
        lines += ["## Not as documented", "", *(f"- {_shortened(line)}" for line in wrong), ""]
    return "\n".join(lines)


def _shortened(said: str) -> str:
    """How it begins, and the last line: no traceback, whose paths are those of one machine."""
    first, *_, last = [" ".join(line.split()) for line in said.splitlines() if line.strip()] * 2
    return first[:200] if first == last else f"{first[:80]} … {last[:200]}"
