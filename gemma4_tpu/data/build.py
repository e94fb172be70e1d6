"""From sources to tokenised examples: read, clean, render, encode, flag; and count what is dropped on the way."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data import codev
from gemma4_tpu.data.chat import MODEL_HEADER, ChatFormat
from gemma4_tpu.data.drops import DropReport, RowDropped
from gemma4_tpu.data.examples import Examples, ExamplesBuilder, Origin
from gemma4_tpu.data.sources import RawRow, read_rows
from gemma4_tpu.data.tokenizer import tokenizer_fingerprint
from gemma4_tpu.errors import UserError

logger = logging.getLogger(__name__)

CHUNK_ROWS = 512  # rows encoded by one call; enough to keep every core of the tokenizer busy
PROGRESS_SECONDS = 10.0


class Tokenised(NamedTuple):
    """One example on its way into the store."""

    ids: np.ndarray  # int32 [n + 1]
    flags: np.ndarray  # bool [n + 1]
    source: int
    origin: Origin
    prompt: int  # hash of what stands before the first answer


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and is measured on, and what became of the rows."""

    train: Examples
    heldout: Examples | None
    train_report: DropReport
    heldout_report: DropReport | None
    """None where the held-out rows are a share of the training rows, whose report covers both."""
    shared_prompts: int
    """Held-out examples whose prompt is also trained on."""
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
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / max(self.seconds, 1e-9)),
        }


def summary(examples: Examples) -> dict[str, Any]:
    """Sizes of a set of examples; lengths are in slots of a packed row."""
    slots = examples.slots
    return {
        "examples": len(examples),
        "real_tokens": int(slots.sum()),
        "target_tokens": int(examples.targets.sum()),
        "length_tokens": {
            "mean": round(float(slots.mean()), 1),
            "max": int(slots.max()),
            **{f"p{q}": round(float(np.percentile(slots, q)), 1) for q in (50, 90, 99)},
        },
        "fingerprint": examples.fingerprint,
    }


def build_data(data: DataConfig, tokenizer: Any) -> TrainingData:
    """Read and tokenise the training and held-out sources.

    Without held-out sources, `data.heldout_fraction` of the training rows is set aside by a hash of their prompt: the
    choice depends on nothing else, and equal prompts are on the same side.

    Raises:
      UserError: a source cannot be read, too many rows were dropped, or a set is empty.
    """
    started = time.monotonic()
    chat = ChatFormat(tokenizer, data.thoughts, data.train_on)
    made_of = {**tokenizer_fingerprint(tokenizer), "thoughts": data.thoughts, "train_on": data.train_on}
    tokeniser = _Tokeniser(data, chat)
    fraction = 0.0 if data.heldout else data.heldout_fraction

    train = ExamplesBuilder([source.weight for source in data.train])
    aside = ExamplesBuilder([1.0] * len(data.train))
    prompts: set[int] = set()  # by hash
    for example in tokeniser.run("data.train", data.train, data.max_rows):
        if example.prompt < fraction * 2**64:
            aside.add(example.ids, example.flags, example.source, example.origin)
        else:
            train.add(example.ids, example.flags, example.source, example.origin)
            prompts.add(example.prompt)
    made_of["rows"] = tokeniser.digest
    train_report, heldout_report, shared = tokeniser.report, None, 0
    heldout = aside.build(made_of) if len(aside) else None
    if fraction and (heldout is None or not len(train)):
        raise UserError(
            f"data.heldout_fraction={fraction} of {train_report.rows_kept} rows leaves {len(train)} for training and "
            f"{len(aside)} held out: give more rows, another fraction, or data.heldout sources"
        )
    if data.heldout:
        store = ExamplesBuilder([source.weight for source in data.heldout])
        for example in tokeniser.run("data.heldout", data.heldout):
            store.add(example.ids, example.flags, example.source, example.origin)
            shared += example.prompt in prompts
        heldout, heldout_report = store.build({**made_of, "rows": tokeniser.digest}), tokeniser.report
        if shared:
            logger.warning("%d of %d held-out examples have a prompt that is also trained on", shared, len(store))
    built = TrainingData(
        train.build(made_of), heldout, train_report, heldout_report, shared, time.monotonic() - started
    )
    if data.thoughts == "train" and not chat.holds_thoughts(built.train.tokens):
        logger.warning("data.thoughts=train, but no answer holds a thought: thinking prompts with plain answers")
    logger.info("train: %s; held out: %s; %.1f s", built.train, built.heldout or "none", built.seconds)
    return built


def _as_they_are(row: dict[str, Any]) -> Any:
    """The turns of a row that holds them already."""
    if "messages" not in row:
        raise RowDropped("no_messages", f"keys: {', '.join(row)}"[:120])
    return row["messages"]


FORMATS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "chat": _as_they_are,
    "codev_r1": codev.to_messages,
}  # fmt: skip
"""`data.format` → the turns of a row, `[{"role": …, "content": …}, …]`; raises RowDropped for one that has none."""


class _Tokeniser:
    """Runs sources through cleaning, rendering and encoding. `report` and `digest` belong to the latest run."""

    def __init__(self, data: DataConfig, chat: ChatFormat):
        if data.format not in FORMATS:
            raise UserError(f"data.format={data.format}: there are {', '.join(FORMATS)}")
        self._data = data
        self._chat = chat
        self._iverilog = codev.find_iverilog() if data.check_syntax and data.format == "codev_r1" else None
        self.report = DropReport()
        self.digest = ""

    def run(self, name: str, sources: list[DataSource], max_rows: int | None = None) -> Iterator[Tokenised]:
        """Examples of all `sources` in order, of the first `max_rows` rows; refuses too many drops at the end."""
        if not sources:
            raise UserError(f"{name} is empty: name at least one source, such as {name}.0.path=rows.jsonl")
        if bad := [source for source in sources if source.weight <= 0]:
            raise UserError(f"{name}: {bad[0].path} has weight {bad[0].weight}; a weight is above 0")
        self.report = DropReport()
        digest = hashlib.sha256()
        every = ((number, row) for number, source in enumerate(sources) for row in read_rows(source.path))
        rows = itertools.islice(every, max_rows)
        report_at = time.monotonic() + PROGRESS_SECONDS
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
                for _, row in chunk:
                    digest.update(_canonical(row))
                yield from self._tokenise(chunk, pool)
                if time.monotonic() > report_at:
                    logger.info("%s: %d rows read, %d dropped", name, self.report.rows_read, self.report.rows_dropped)
                    report_at = time.monotonic() + PROGRESS_SECONDS
        self.digest = digest.hexdigest()
        for line in self.report.lines():
            logger.warning("%s: dropped %s", name, line)
        self.report.check(name, self._data.max_drop_fraction)

    def _tokenise(self, chunk: list[tuple[int, RawRow]], pool: ThreadPoolExecutor) -> Iterator[Tokenised]:
        self.report.rows_read += len(chunk)
        # Threads help only where a row waits for the simulator's compiler.
        rendered = (pool.map if self._iverilog else map)(self._render, [row for _, row in chunk])
        texts: list[str] = []
        sources: list[tuple[int, Origin]] = []
        for (number, row), text in zip(chunk, rendered, strict=True):
            if isinstance(text, RowDropped):
                self.report.drop(text, row.origin)
            else:
                texts.append(text)
                sources.append((number, row.origin))
        for text, ids, (number, origin) in zip(texts, self._chat.encode(texts), sources, strict=True):
            try:
                flags = self._chat.loss_flags(ids, text)
                if len(ids) - 1 > self._data.sequence_length:
                    raise RowDropped("too_long", f"{len(ids) - 1} tokens")
            except RowDropped as problem:
                self.report.drop(problem, origin)
                continue
            yield Tokenised(ids, flags, number, origin, _prompt_hash(text))

    def _render(self, row: RawRow) -> str | RowDropped:
        if row.problem is not None:
            return row.problem
        try:
            messages = FORMATS[self._data.format](row.value)
            if self._iverilog:
                codev.check_syntax(codev.fenced_code(messages), self._iverilog)
            return self._chat.render(messages, row.value.get("tools") if self._data.format == "chat" else None)
        except RowDropped as problem:
            return problem


def _canonical(row: RawRow) -> bytes:
    """What identifies a row's content, whatever file format it came in."""
    if row.problem is not None:
        return str(row.problem).encode()
    return json.dumps(row.value, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def _prompt_hash(text: str) -> int:
    """64 bits of what a rendered conversation holds before its first answer."""
    prompt = text.partition(MODEL_HEADER)[0]
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
