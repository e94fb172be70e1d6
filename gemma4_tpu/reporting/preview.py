"""`python -m gemma4_tpu.train preview=true`: shows what would be trained on before you pay for it.

Prints rendered rows with the trained tokens marked, lengths, the fill of one pass, and the dropped rows.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from gemma4_tpu.config.schema import DataConfig, ModelConfig
from gemma4_tpu.data import chat, markup
from gemma4_tpu.data.build import TrainingData, build_data
from gemma4_tpu.data.forms import CHOSEN, REJECTED
from gemma4_tpu.data.updates import Updates
from gemma4_tpu.plotting import new_figure

ROWS_SHOWN = 3
BINS = 16
BAR_CELLS = 50
PLOT = Path("outputs/preview/lengths.png")
TRAINED_STYLE = "bold green"
TRAINED_MARKS = "⟦", "⟧"  # used without colour
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters with which a row could control the terminal


def preview(
    built: TrainingData,
    data: DataConfig,
    tokenizer: Any,
    *,
    rows_per_update: int,
    seed: int,
    console: Console,
    plot_path: Path | None = None,
) -> None:
    """Prints rendered rows, lengths, fill and drops; writes the length histogram to `plot_path` (PNG)."""
    train = built.train
    colour = console.is_terminal and not console.no_color
    how = "in green" if colour else f"inside {'…'.join(TRAINED_MARKS)}"
    what = "examples" if train.second is None else "pairs"
    console.print(Text(f"{len(train)} training {what}; tokens with loss are {how}\n", "bold"))
    for index in np.linspace(0, len(train) - 1, min(ROWS_SHOWN, len(train)), dtype=int).tolist():
        slots, targets = train.slots[index], train.targets[index]
        head = f"── {train.origin(index)} · {slots} tokens, {targets} with loss"
        console.print(Text(head, "bold"), soft_wrap=True)
        sequences = train.sequences(index)
        for side, (ids, flags) in zip((CHOSEN, REJECTED), sequences, strict=False):
            if len(sequences) > 1:
                console.print(Text(f"{side}, {int(flags.sum())} tokens with loss:", "bold"), soft_wrap=True)
            console.print(rendered(ids, flags, tokenizer, colour), soft_wrap=True)
    console.print(Text("── lengths in tokens", "bold"))
    console.print(Text(histogram(train.slots, data.sequence_length)), soft_wrap=True)
    for line in _totals(built, data, rows_per_update, seed):
        console.print(Text(line), soft_wrap=True)
    if plot_path is not None:
        plot_lengths(built, data.sequence_length, plot_path)
        console.print(Text(f"length histogram: {plot_path}"), soft_wrap=True)


def rendered(ids: np.ndarray, flags: np.ndarray, tokenizer: Any, colour: bool) -> Text:
    """One sequence as text, with the tokens that carry loss in colour or between marks."""
    cuts = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(ids)]
    text = Text()
    for start, stop in itertools.pairwise(cuts):
        piece = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
        piece = UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]):02x}", piece)
        piece = markup.pictures_in_words(piece)
        trained = bool(flags[start])
        if trained and not colour:
            piece = piece.join(TRAINED_MARKS)
        text.append(piece, TRAINED_STYLE if trained and colour else None)
    return text


def histogram(slots: np.ndarray, capacity: int) -> str:
    """Histogram of lengths up to `capacity`, as lines of bars."""
    counts, edges = np.histogram(slots, bins=min(BINS, capacity), range=(0, capacity))
    bars = np.ceil(BAR_CELLS * counts / max(counts.max(), 1)).astype(int)
    width = len(str(capacity))
    return "\n".join(
        f"{int(edges[i]):>{width}}-{int(edges[i + 1]):<{width}} {'█' * bars[i]} {counts[i]}" for i in range(len(counts))
    )


def plot_lengths(built: TrainingData, capacity: int, path: Path) -> None:
    """Writes the histogram of example lengths as PNG."""
    with new_figure(path, (8, 4)) as figure:
        axes = figure.subplots()
        for name, examples in (("train", built.train), ("held out", built.heldout)):
            if examples is not None:
                axes.hist(examples.slots, bins=60, range=(0, capacity), label=f"{name} ({len(examples)})", alpha=0.8)
        axes.axvline(capacity, color="black", linestyle="--", label=f"sequence_length ({capacity})")
        axes.set(xlabel="tokens per example", ylabel="examples", yscale="log", title="Lengths of the examples")
        axes.legend()


def _totals(built: TrainingData, data: DataConfig, rows_per_update: int, seed: int) -> list[str]:
    """Fill and number of updates of one pass, held-out examples, drops."""
    train = built.train
    plan = Updates(train, data, rows_per_update=rows_per_update, seed=seed, epochs=1)
    updates = [plan[update] for update in range(len(plan))]
    visits = [index for update in updates for row in update.rows for index in row]
    real_tokens = int(train.slots[visits].sum())
    target_tokens = int(train.targets[visits].sum())
    slots = sum(rows_per_update * update.length for update in updates)
    lengths = ", ".join(str(length) for length in plan.buckets)
    lines = [
        f"one pass: {len(updates)} updates of {rows_per_update} rows of {lengths} tokens; {len(visits)} visits, "
        f"{real_tokens} real tokens, {target_tokens} with loss; fill {real_tokens / slots:.1%} "
        f"(packing={data.packing})",
        f"held out: {0 if built.heldout is None else len(built.heldout)} examples",
        *(UNPRINTABLE.sub("?", line) for line in built.told()),
    ]
    for name, report in (("training", built.train_report), ("held-out", built.heldout_report)):
        if report is not None:
            lines.append(
                f"{name} rows read: {report.rows_read}, dropped: {report.rows_dropped} ({report.fraction:.1%})"
            )
            if report.rows_split:
                lines.append(
                    f"  {report.rows_split} rows became one example per answer: the chat template renders earlier "
                    "answers differently from how they are generated"
                )
            lines += [f"  {UNPRINTABLE.sub('?', line)}" for line in report.lines()]
            if report.fraction > data.max_drop_fraction:
                lines.append(f"  more than data.max_drop_fraction={data.max_drop_fraction}: training would refuse this")
    return lines


@contextmanager
def _warnings_of_templates() -> Iterator[None]:
    """Prints the warnings about a chat template, which the preview does not list."""
    handler, logger = logging.StreamHandler(), logging.getLogger(chat.__name__)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def show(model: ModelConfig, data: DataConfig, rows_are: str, *, rows_per_update: int, seed: int) -> int:
    """Builds a training configuration's data and previews it; too many dropped rows are shown instead of refused.

    Args:
      model: names the tokenizer.
      data: sources, form, lengths and policies.
      rows_are: the kind of rows (`forms.py`).
      rows_per_update: rows over all processes and microbatches.
      seed: shuffles the rows shown, as in training.

    Returns:
      The exit code, 0.

    Raises:
      UserError: there is no base model or tokenizer, a source is unreadable, or no row can be trained on.
    """
    from gemma4_tpu.data.seen import picture_reader
    from gemma4_tpu.data.tokenizer import load_tokenizer
    from gemma4_tpu.models.base import resolve_base

    logging.getLogger("gemma4_tpu.data").addHandler(logging.NullHandler())  # the preview itself lists the drops
    base = resolve_base(model)
    tokenizer = load_tokenizer(base.tokenizer_folder, base.new_tokens)
    pictures = picture_reader(base, data)
    with _warnings_of_templates():
        built = build_data(replace(data, max_drop_fraction=1.0), tokenizer, rows_are, pictures)
    console = Console(highlight=False)
    preview(built, data, tokenizer, rows_per_update=rows_per_update, seed=seed, console=console, plot_path=PLOT)
    return 0
