"""Reads the rows of one file by its extension: JSON Lines, JSON, CSV, Parquet, Arrow, each also as gzip or Zstandard.

A file whose content does not match its extension is refused, and the message says what it contains. A row that cannot
be read is passed on with the reason, and reading continues after it.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from gemma4_tpu.data.drops import Origin, RowDropped
from gemma4_tpu.data.file_kinds import MAGIC, UTF8_MARK, refuse_another_format
from gemma4_tpu.errors import UserError

MAX_LINE_BYTES = 16 * 2**20  # far beyond any example of a legal length; keeps a binary file from filling memory
MAX_JSON_BYTES = 2 * 2**30  # limit for a .json file, which is read whole
ARROW_BATCH_ROWS = 1024
BUFFER_BYTES = 2**18


class RawRow(NamedTuple):
    """A row as read: its value, or an empty value and the reason why it could not be read."""

    origin: Origin
    value: dict[str, Any]
    problem: RowDropped | None = None
    columnar: bool = False
    """The row comes from a table, in which every row has all columns: null stands for an absent key."""


def read_file(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """Yields the rows of an open, seekable file; the extension of `name` gives its format, and `name` appears in
    origins.

    Raises:
      UserError: the extension is unknown, the content is of another format, or the file is truncated.
    """
    ending, compression = endings(name)
    if ending is None:
        raise UserError(f"{name}: unknown format; rows come from {', '.join(READERS)}, each also as .gz and .zst")
    try:
        plain = io.BufferedReader(_unpacked(stream, name, compression), BUFFER_BYTES)
        refuse_another_format(plain.peek(BUFFER_BYTES), name, ending)
    except _TORN as error:
        raise _torn(name, 0, error) from error
    yield from READERS[ending](plain, name)


def endings(name: str) -> tuple[str | None, str]:
    """(`.jsonl`, `.gz`) for `rows.jsonl.gz`: format and compression; the format is None if unsupported."""
    lower = name.lower()
    compression = next((ending for ending in (".gz", ".zst") if lower.endswith(ending)), "")
    lower = lower.removesuffix(compression)
    return next((ending for ending in READERS if lower.endswith(ending)), None), compression


def _unpacked(stream: Any, name: str, compression: str) -> Any:
    if not compression:
        return stream
    head = stream.read(len(UTF8_MARK) + 1)
    stream.seek(0)
    if head and not any(head.startswith(magic) for magic, (_, ending) in MAGIC.items() if ending == compression):
        raise UserError(f"{name}: not a {compression} file; rename it so that its extension matches its content")
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stream)
    import pyarrow

    return pyarrow.CompressedInputStream(stream, "zstd")


def _lines(stream: Any, name: str) -> Iterator[bytes | None]:
    r"""Yields lines, split at \\n only; None stands for a line that is too long."""
    number = 0
    while True:
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
            whole = len(line) <= MAX_LINE_BYTES
            while not whole and line and not line.endswith(b"\n"):  # skip the rest of an overlong line
                line = stream.readline(MAX_LINE_BYTES)
        except _TORN as error:
            raise _torn(name, number, error) from error
        if whole and not line:
            return
        number += 1
        yield (line.removeprefix(UTF8_MARK) if number == 1 else line) if whole else None


TOO_LONG = RowDropped("line_too_long", f"more than {MAX_LINE_BYTES} bytes")


def _read_json_lines(stream: Any, name: str) -> Iterator[RawRow]:
    decoder, twice = _decoder()
    for number, line in enumerate(_lines(stream, name), start=1):
        if line is None:
            yield RawRow(Origin(name, number), {}, TOO_LONG)
        elif line.strip():
            twice.clear()
            yield _parsed(line, Origin(name, number), decoder, twice)


def _parsed(line: bytes, origin: Origin, decoder: json.JSONDecoder, twice: list[str]) -> RawRow:
    try:
        return _checked(decoder.decode(line.decode("utf-8")), b"\\u" in line, origin, twice)
    except UnicodeDecodeError as error:
        return RawRow(origin, {}, RowDropped("invalid_utf8", str(error.reason)))
    except (ValueError, RecursionError) as error:
        return RawRow(origin, {}, RowDropped("invalid_json", str(error)[:80]))


def _decoder() -> tuple[json.JSONDecoder, list[str]]:
    """A decoder, and the list of keys that it found twice in one object: Python silently keeps the last value."""
    twice: list[str] = []

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.extend(key for key in made if keys.count(key) > 1)
        return made

    return json.JSONDecoder(object_pairs_hook=to_object), twice


def _checked(value: Any, escapes: bool, origin: Origin, twice: list[str]) -> RawRow:
    """The row of a parsed value, which must be an object without duplicate keys or halves of surrogate pairs."""
    if twice:
        return RawRow(origin, {}, RowDropped("invalid_json", f"the key {twice[0][:40]!r} appears twice in one object"))
    if escapes:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            return RawRow(origin, {}, RowDropped("invalid_utf8", str(error.reason)))
        except RecursionError:
            return RawRow(origin, {}, RowDropped("invalid_json", "nested too deeply"))
    if not isinstance(value, dict):
        return RawRow(origin, {}, RowDropped("not_an_object", type(value).__name__))
    return RawRow(origin, value)


def _read_json(stream: Any, name: str) -> Iterator[RawRow]:
    """Yields the elements of an array, or objects one after the other, with or without line breaks inside."""
    try:
        content = stream.read(MAX_JSON_BYTES + 1)
    except _TORN as error:
        raise _torn(name, 0, error) from error
    if len(content) > MAX_JSON_BYTES:
        raise UserError(f"{name}: more than {MAX_JSON_BYTES} bytes of JSON; write one object per line (.jsonl)")
    try:
        text = content.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start} ({error.reason})") from error
    (decoder, twice), number = _decoder(), 0
    at = _skipped(text, 0, BLANKS)
    array = text.startswith("[", at)
    at += array
    while (at := _skipped(text, at, BLANKS + "," * array)) < len(text):
        if array and text[at] == "]":
            if _skipped(text, at + 1, BLANKS) < len(text):
                raise UserError(f'{name}: more follows the JSON array; rows are objects, such as {{"messages": […]}}')
            return
        number, start = number + 1, at
        twice.clear()
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # where the next one begins is unknown
            raise _torn(name, number - 1, error) from error
        yield _checked(value, "\\u" in text[start:at], Origin(name, number), twice)
    if array:
        raise _torn(name, number, "the array is never closed")


BLANKS = " \t\r\n"


def _skipped(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _read_csv(stream: Any, name: str) -> Iterator[RawRow]:
    """Yields rows under a header line, which determines the delimiter. An empty cell means that the row lacks the
    column.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    left_out: list[RowDropped] = []

    def texts() -> Iterator[str]:
        for line in _lines(stream, name):
            if line is None:
                left_out.append(TOO_LONG)
            yield (line or b"\n").decode("utf-8", "surrogateescape")

    lines = texts()
    header = next(lines, "")
    delimiter = max(",\t;|", key=re.sub('"[^"]*"', "", header).count)
    records = _csv_records(csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True))
    columns = next(records, [])
    if isinstance(columns, RowDropped):
        raise UserError(f"{name}: its header cannot be read ({columns.detail}); the first line names the columns")
    _refuse_columns_twice([column for column in columns if column], name)
    number = 0
    for cells in records:
        for problem in left_out:
            number += 1
            yield RawRow(Origin(name, number), {}, problem)
        left_out.clear()
        if cells == []:  # a blank line
            continue
        number += 1
        yield _csv_row(cells, columns, Origin(name, number))


def _refuse_columns_twice(columns: list[str], name: str) -> None:
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        raise UserError(f"{name}: there are {columns.count(twice[0])} columns named {twice[0]}; rename all but one")


def _csv_records(reader: Iterator[list[str]]) -> Iterator[list[str] | RowDropped]:
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RowDropped("invalid_csv", str(error))


def _csv_row(cells: list[str] | RowDropped, columns: list[str], origin: Origin) -> RawRow:
    if isinstance(cells, RowDropped):
        return RawRow(origin, {}, cells)
    if len(cells) != len(columns):
        return RawRow(origin, {}, RowDropped("invalid_csv", f"{len(cells)} cells under {len(columns)} columns"))
    if not "".join(cells).isascii() and any("\udc80" <= mark <= "\udcff" for mark in "".join(cells)):
        return RawRow(origin, {}, RowDropped("invalid_utf8", "in a cell"))
    row = {column: cell or None for column, cell in zip(columns, cells, strict=True)}
    return RawRow(origin, row, columnar=True)


def _read_parquet(stream: Any, name: str) -> Iterator[RawRow]:
    import pyarrow.parquet

    with _seekable(stream) as file:
        yield from _batches(lambda: pyarrow.parquet.ParquetFile(file).iter_batches(ARROW_BATCH_ROWS), name)


def _read_arrow(stream: Any, name: str) -> Iterator[RawRow]:
    """Yields the batches of an Arrow stream, as `datasets` saves them, or of an Arrow file."""
    import pyarrow.ipc

    with _seekable(stream) as file:

        def batches() -> Iterator[Any]:
            if file.read(6) == b"ARROW1":
                whole = pyarrow.ipc.open_file(file)
                return (whole.get_batch(number) for number in range(whole.num_record_batches))
            file.seek(0)
            return iter(pyarrow.ipc.open_stream(file))

        yield from _batches(batches, name)


def _seekable(stream: Any) -> IO[bytes]:
    """The file itself, or a decompressed copy on disk: tables need random access."""
    if stream.seekable() and not isinstance(stream.raw, gzip.GzipFile):
        return stream
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    shutil.copyfileobj(stream, unpacked)
    unpacked.seek(0)
    return unpacked


def _batches(begin: Callable[[], Iterator[Any]], name: str) -> Iterator[RawRow]:
    import pyarrow

    number = 0
    try:
        for batch in begin():
            _refuse_columns_twice(batch.schema.names, name)
            short = {f.name: f.type for f in batch.schema if f.type in (pyarrow.float16(), pyarrow.float32())}
            for start in range(0, batch.num_rows, ARROW_BATCH_ROWS):
                for value in batch.slice(start, ARROW_BATCH_ROWS).to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    value |= {key: _shortest(value[key], kind) for key, kind in short.items()}
                    yield RawRow(Origin(name, number), value, columnar=True)
    except (pyarrow.ArrowException, *_TORN, KeyError, ValueError) as error:
        raise _torn(name, number, error) from error


def _shortest(number: float | None, kind: Any) -> float | None:
    """A number of 16 or 32 bits with the digits that identify it there, as people wrote it: 0.1, not 0.10000000149."""
    return None if number is None else float(str(kind.to_pandas_dtype()(number)))


_TORN = (EOFError, zlib.error, OSError)  # gzip.BadGzipFile and pyarrow's stream errors are OSErrors


def _torn(name: str, row: int, error: object) -> UserError:
    return UserError(f"{name}: the file is truncated or unreadable after row {row} ({error}); copy it again")


READERS: dict[str, Callable[[Any, str], Iterator[RawRow]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
"""Extension → reader of an open, decompressed file."""
