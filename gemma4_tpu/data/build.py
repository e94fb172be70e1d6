"""Builds the training and held-out examples of a configuration, and reports what happened to the rows."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gemma4_tpu.config.limits import MAX_WEIGHT
from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.aside import set_aside
from gemma4_tpu.data.chat import ChatFormat
from gemma4_tpu.data.drops import DropReport
from gemma4_tpu.data.examples import Examples, ExamplesBuilder
from gemma4_tpu.data.forms import CONVERSATIONS
from gemma4_tpu.data.normalise import VERSION, Normalised
from gemma4_tpu.data.pictures import PictureReader
from gemma4_tpu.data.sources import SourcePlace, find
from gemma4_tpu.data.tokenise import Keep, TokenisedRow, Tokeniser, let_go
from gemma4_tpu.data.tokenizer import tokenizer_fingerprint
from gemma4_tpu.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """The examples that a run trains on and is evaluated on, and what happened to the rows."""

    train: Examples
    heldout: Examples | None
    train_report: DropReport
    heldout_report: DropReport | None
    """None if the held-out rows are a share of the training rows; the training report then covers both."""
    shared_prompts: int
    """Held-out rows whose first prompt is also trained on."""
    shared_rows: int
    """Held-out rows that are also trained on, unchanged."""
    duplicates: int
    """Training rows identical to an earlier one."""
    normalised: Normalised
    """Normalisations applied to the rows of all sources."""
    places: list[str]
    """What was read from each source, and what was skipped."""
    seconds: float
    """Time to read and tokenise everything."""

    def to_json(self) -> dict[str, Any]:
        """Counts, lengths, drops and fingerprints, for the run folder's `data.json`."""
        sets = {"train": (self.train, self.train_report), "heldout": (self.heldout, self.heldout_report)}
        tokens = sum(len(examples.tokens) for examples, _ in sets.values() if examples is not None)
        return {
            **{
                name: {**summary(examples), **(report.to_json() if report else {})}
                for name, (examples, report) in sets.items()
                if examples is not None
            },
            "shared_prompts": self.shared_prompts,
            "shared_rows": self.shared_rows,
            "duplicates": self.duplicates,
            **self.normalised.to_json(),
            "places": self.places,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / max(self.seconds, 1e-9)),
        }

    def told(self) -> list[str]:
        """One line each on what was read, how it was normalised, and what is duplicated."""
        counts = {
            "training rows repeat an earlier row exactly": self.duplicates,
            "held-out rows are also training rows": self.shared_rows,
            "held-out rows have a first prompt that is also trained on": self.shared_prompts,
        }
        train = self.train
        shown = [key for keys in train.pictures or () for key in keys]
        pictures = (
            f"{len(shown)} pictures in training examples, {len(set(shown))} of them distinct; their tokens are"
            f" {train.picture_tokens} of {int(train.slots.sum())}"
        )
        there = [pictures] if shown else []
        return [*self.places, *self.normalised.lines(), *there, *(f"{n} {what}" for what, n in counts.items() if n)]


def summary(examples: Examples) -> dict[str, Any]:
    """Sizes of a set of examples; lengths are in slots of a packed row."""
    slots = examples.slots
    shown = [key for keys in examples.pictures or () for key in keys]
    pictures = {
        "pictures": len(shown), "distinct_pictures": len(set(shown)), "picture_tokens": examples.picture_tokens
    }  # fmt: skip
    return {
        "examples": len(examples),
        **(pictures if shown else {}),
        "real_tokens": int(slots.sum()),
        "target_tokens": int(examples.targets.sum()),
        "length_tokens": {
            "mean": round(float(slots.mean()), 1),
            "max": int(slots.max()),
            **{f"p{q}": round(float(np.percentile(slots, q)), 1) for q in (50, 90, 99)},
        },
        "fingerprint": examples.fingerprint,
    }


def build_data(
    data: DataConfig, tokenizer: Any, rows_are: str = CONVERSATIONS, pictures: PictureReader | None = None,
    keep: Keep = let_go,
) -> TrainingData:  # fmt: skip
    """Reads and tokenises the training and held-out rows.

    Held-out rows are those of `data.heldout`, else the validation (or test) splits of the training sources, else
    `data.heldout_fraction` of the training rows (see `aside.py`).

    Args:
      data: sources, form, lengths and policies.
      tokenizer: the checkpoint's Hugging Face tokenizer.
      rows_are: the kind of rows (`forms.py`): conversations or pairs.
      pictures: reads the pictures of rows; None drops rows that have any.
      keep: receives the pictures of each chunk of rows while their bytes are in memory.

    Raises:
      UserError: a source cannot be read, too many rows were dropped, or a set is empty.
    """
    started = time.monotonic()
    chat = ChatFormat(tokenizer, data.thoughts, data.train_on)
    made_of = _made_of(data, tokenizer, pictures)
    places = _find("data.train", data.train)
    heldout_sources = data.heldout or _heldout_splits(data.train, places)
    heldout_places = _find("data.heldout", heldout_sources) if heldout_sources else []

    tokeniser = Tokeniser(data, chat, rows_are, pictures, keep)
    rows = list(tokeniser.run("data.train", data.train, places, data.max_rows))
    made_of["rows"], train_report = tokeniser.digest, tokeniser.report
    heldout_report, heldout_made_of = None, made_of
    weights = [source.weight for source in data.train]
    if heldout_places:
        heldout_rows = list(tokeniser.run("data.heldout", heldout_sources, heldout_places))
        heldout_made_of, heldout_report = {**made_of, "rows": tokeniser.digest}, tokeniser.report
        heldout_weights = [source.weight for source in heldout_sources]
    else:
        aside = set_aside([row.identity for row in rows], data.heldout_fraction)
        heldout_rows = [row for row, out in zip(rows, aside, strict=True) if out]
        rows = [row for row, out in zip(rows, aside, strict=True) if not out]
        heldout_weights = [1.0] * len(weights)  # each held-out row counts once, however often its source is repeated

    # Count rows, not examples: several examples can come from one row, and would be alike.
    trained = {row.identity.whole for row in rows}
    prompts = {row.identity.prompt for row in rows}
    built = TrainingData(
        train=_store(rows, weights, made_of),
        heldout=_store(heldout_rows, heldout_weights, heldout_made_of) if heldout_rows else None,
        train_report=train_report,
        heldout_report=heldout_report,
        shared_prompts=sum(row.identity.prompt in prompts for row in heldout_rows),
        shared_rows=sum(row.identity.whole in trained for row in heldout_rows),
        duplicates=len(rows) - len(trained),
        normalised=tokeniser.normalised,
        places=[line for place in [*places, *heldout_places] for line in place.told()],
        seconds=time.monotonic() - started,
    )
    _tell(built, len(rows), len(heldout_rows))
    if data.thoughts == "train" and not chat.holds_thoughts(built.train.tokens, built.train.flags):
        logger.warning("data.thoughts=train, but no answer contains a thought: thinking prompts get plain answers")
    logger.info("train: %s; held out: %s; %.1f s", built.train, built.heldout or "none", built.seconds)
    return built


def _made_of(data: DataConfig, tokenizer: Any, pictures: PictureReader | None) -> dict[str, str]:
    """What examples follow from besides the rows."""
    made_of = {
        **tokenizer_fingerprint(tokenizer), "thoughts": data.thoughts, "train_on": data.train_on,
        "normaliser": json.dumps([VERSION, data.format, data.columns], sort_keys=True),
    }  # fmt: skip
    return made_of if pictures is None else {**made_of, "pictures": pictures.fingerprint}


def _tell(built: TrainingData, trained: int, heldout: int) -> None:
    """Logs what was read, and warns about duplicates among the trained and held-out rows."""
    for line in built.told():
        logger.info("%s", line)
    if built.shared_prompts:
        logger.warning(
            "%d of %d held-out rows have a first prompt that is also trained on, %d are also training rows",
            built.shared_prompts, heldout, built.shared_rows,
        )  # fmt: skip
    if built.duplicates:
        logger.warning("%d of %d training rows repeat an earlier row exactly", built.duplicates, trained)


def _find(name: str, sources: list[DataSource]) -> list[SourcePlace]:
    if not sources:
        raise UserError(f"{name} is empty: name at least one source, such as {name}.0.path=rows.jsonl")
    if bad := [source for source in sources if not 0 < source.weight <= MAX_WEIGHT]:
        raise UserError(
            f"{name}: {bad[0].path} has weight {bad[0].weight}; a weight is above 0 and at most {MAX_WEIGHT}"
        )
    return [find(source, heldout=name == "data.heldout") for source in sources]


def _heldout_splits(sources: list[DataSource], places: list[SourcePlace]) -> list[DataSource]:
    """The validation splits (or else the test splits) of the places that are trained on."""
    found = [
        replace(source, split=name, weight=1.0)
        for source, place in zip(sources, places, strict=True)
        for name in place.heldout_splits()
    ]
    if found:
        told = ", ".join(f"{source.path} split {source.split}" for source in found)
        logger.info("held out, since data.heldout is empty: %s", told)
    return found


def _store(rows: list[TokenisedRow], weights: list[float], made_of: dict[str, str]) -> Examples:
    store = ExamplesBuilder(weights)
    for row in rows:
        for example in row.examples:
            store.add(example.ids, example.flags, row.source, row.origin, example.second, example.pictures)
    return store.build(made_of)
