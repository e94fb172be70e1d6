"""Samples and verdicts on disk: one JSON line each, written as they arrive, so that a killed evaluation can resume.

```
samples.jsonl    {"problem", "sample", "completion", "finish", "tokens", …}
verdicts.jsonl   {"problem", "sample", "kind", "official", "detail", …}
```
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.files import write_text
from gemma4_tpu.tracking.typed import ANYTHING, COUNT, NUMBER, TEXT, WHOLE, Shape, fields, listed, maybe

log = logging.getLogger(__name__)

Key = tuple[str, int]
"""(problem's name, sample's number)"""

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion."""

    problem: str
    sample: int
    """Its number, from 0."""
    completion: str
    finish: str = STOP
    """`stop`, or `length` if it was cut off."""
    tokens: int | None = None
    """Number of generated tokens, including the one that ended it; None: unknown."""
    seed: int | None = None
    """None: the server accepts no seeds."""
    choices: list[dict[str, float]] | None = None
    """If answers are scored: `logprob` and `tokens` of each, including the end of the turn; the completion is then the
    most likely one."""

    @property
    def key(self) -> Key:
        return self.problem, self.sample


_KEYED = fields({"problem": TEXT, "sample": COUNT})
_CHOICE = fields({"logprob": NUMBER, "tokens": COUNT})
_SAMPLE = fields({"completion": TEXT}, {
    "finish": TEXT, "tokens": maybe(COUNT), "seed": maybe(WHOLE), "choices": maybe(listed(_CHOICE)),
})  # fmt: skip


class Rows:
    """An append-only JSONL file of rows with `problem` and `sample`; one row per key, of which the first counts."""

    def __init__(self, path: Path, shape: Shape = ANYTHING):
        """Reads existing rows, which must have this shape; an incomplete last line (the writer was killed) is cut off.

        Raises:
          UserError: another line is damaged.
        """
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1].decode("utf-8", errors="replace")
        if data and not data.endswith(b"\n"):
            log.warning("%s: the last line is incomplete and ignored", path)
            write_text(path, whole)
        for number, line in enumerate(whole.split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                if told := _KEYED(row, "") or shape(row, ""):
                    raise ValueError(told)
                self.rows.setdefault((row["problem"], row["sample"]), row)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: damaged ({error}); delete that line") from None
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row; when this returns, the row survives the end of the process."""
        self._file.write(json.dumps(row) + "\n")  # ASCII, in which U+2028 and lone surrogates are safe
        self._file.flush()
        self.rows.setdefault((row["problem"], row["sample"]), row)

    def add_for(self, sample: Sample, found: dict[str, Any]) -> None:
        """Appends findings about a sample."""
        self.add({"problem": sample.problem, "sample": sample.sample, **found})

    def close(self) -> None:
        """Closes the file, which already contains every added row."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Samples(Rows):
    """`samples.jsonl`."""

    def __init__(self, path: Path):
        super().__init__(path, _SAMPLE)

    def add_sample(self, sample: Sample) -> None:
        """Appends a completion."""
        self.add(asdict(sample))

    @property
    def samples(self) -> list[Sample]:
        """All samples, by problem and number."""
        known = Sample.__dataclass_fields__
        return [Sample(**{k: v for k, v in self.rows[key].items() if k in known}) for key in sorted(self.rows)]


def alike(samples: Iterable[Sample]) -> dict[tuple[str, str], list[Sample]]:
    """(problem, completion) → the samples that have it, so that equal ones are processed once."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.problem, sample.completion), []).append(sample)
    return groups


def read_foreign(path: str, problems: Sequence[str]) -> list[Sample]:
    """Reads samples from elsewhere: `{"problem": …, "completion": …}` per line, numbered in order.

    Raises:
      UserError: a line is not such an object, or names no problem of the benchmark; shows a few.
    """
    samples: list[Sample] = []
    counts: dict[str, int] = dict.fromkeys(problems, 0)
    wrong: list[str] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        problem, completion = _foreign_row(line)
        if problem is None or completion is None:
            wrong.append(f'line {number}: not {{"problem": "…", "completion": "…"}}')
        elif problem not in counts:
            wrong.append(f"line {number}: no problem {problem!r} in this benchmark")
        else:
            samples.append(Sample(problem=problem, sample=counts[problem], completion=completion))
            counts[problem] += 1
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"eval.samples={path}: {'; '.join(wrong[:3])}{more}; problems are named {_some(problems)}")
    if not samples:
        raise UserError(f"eval.samples={path}: contains no sample; give a file with one per line")
    return samples


def _text(path: str) -> str:
    """A JSONL file's text. Lines end only at line feeds: `str.splitlines` would also split at U+2028 in a string."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"eval.samples={path}: not UTF-8 ({error})") from None


def _foreign_row(line: str) -> tuple[str | None, str | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(row, dict):
        return None, None
    problem, completion = row.get("problem"), row.get("completion")
    return (problem if isinstance(problem, str) else None), (completion if isinstance(completion, str) else None)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return f"{listed[0]}, …" if len(listed) > 1 else "".join(listed)
