"""Rows from JSONL, Parquet, folders and Hugging Face data sets, local or remote, each with where it came from."""

from __future__ import annotations

import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from gemma4_tpu import assets
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.examples import Origin
from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import filesystem

logger = logging.getLogger(__name__)

HUGGING_FACE = "hf:"
HUGGING_FACE_NAME = re.compile(r"hf:(.+?)(?::([^/:]+))?")  # hf:NAME[:SPLIT]
MAX_LINE_BYTES = 16 * 2**20  # no example of any legal length comes near; keeps a binary file from filling memory
PARQUET_BATCH_ROWS = 1024
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SPLIT_NAME = re.compile(r"^(train|test|val|valid|validation|dev|eval)(?![a-z])")


class RawRow(NamedTuple):
    """A row as read: its value, or (with an empty one) why it could not be read."""

    origin: Origin
    value: dict[str, Any]
    problem: RowDropped | None = None


def read_rows(path: str) -> Iterator[RawRow]:
    """Rows of one source in a fixed order: files by name, rows as they lie in the file.

    Args:
      path: a `.jsonl`, `.jsonl.gz` or `.parquet` file, a folder of them, a data set folder saved by `datasets`,
        `hf:NAME[:SPLIT]` or `embedded:FILE`; local or with a URL scheme such as gs:// or hf://datasets/NAME/FILE.

    Raises:
      UserError: nothing is there, the format is unknown, a file is torn, or a reader is not installed.
    """
    if path.startswith(HUGGING_FACE) and "://" not in path:  # hf://datasets/… is a file system's address
        return _read_hugging_face(path)
    place = assets.resolve(path)
    store, root = filesystem(place)
    if store.isdir(root):
        root = root.rstrip("/")
        if store.exists(f"{root}/dataset_dict.json"):
            raise UserError(f"{path} holds several splits: name the folder of one of them")
        if store.exists(f"{root}/state.json"):
            return _read_saved_dataset(place)
        files = _data_files(store, root, path)
    elif store.exists(root):
        files = [root]
    else:
        raise UserError(f"{path}: no such file or folder")
    names = {file: path.rstrip("/") + file[len(root) :] for file in files}  # as the user wrote it
    return (row for file, name in names.items() for row in _read_file(store, file, name))


def _data_files(store: Any, root: str, path: str) -> list[str]:
    """The data files of a folder by name, refusing a mixture of splits that is hardly meant."""
    inside = {file: file[len(root) :].lstrip("/") for file in sorted(store.find(root))}
    files = [
        file
        for file, name in inside.items()
        if name.endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in name.split("/"))
    ]
    if not files:
        raise UserError(f"{path}: the folder holds none of {', '.join(SUFFIXES)}")
    splits = {match[1] for file in files if (match := SPLIT_NAME.match(file.rsplit("/", 1)[-1].lower()))}
    if len(splits) > 1:
        raise UserError(
            f"{path}: the folder holds files of several splits ({', '.join(sorted(splits))}); "
            "list the files of the split you mean as sources"
        )
    logger.info("%s: %d files", path, len(files))
    return files


def _read_file(store: Any, file: str, name: str) -> Iterator[RawRow]:
    if not file.endswith(SUFFIXES):
        raise UserError(f"{name}: unknown format; rows come from {', '.join(SUFFIXES)}")
    with store.open(file, "rb") as stream:
        if file.endswith(".parquet"):
            yield from _read_parquet(stream, name)
        elif file.endswith(".gz"):
            with gzip.open(stream, "rb") as unzipped:
                yield from _read_json_lines(unzipped, name)
        else:
            yield from _read_json_lines(stream, name)


def _read_json_lines(stream: Any, file: str) -> Iterator[RawRow]:
    number = 0
    while True:
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
            whole = len(line) <= MAX_LINE_BYTES
            while not whole and line and not line.endswith(b"\n"):  # skip what is left of a huge line
                line = stream.readline(MAX_LINE_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file}: the file is torn after row {number} ({error}); copy it again") from error
        if whole and not line:
            return
        number += 1
        if whole and not line.strip():
            continue
        origin = Origin(file, number)
        if not whole:
            yield RawRow(origin, {}, RowDropped("line_too_long", f"more than {MAX_LINE_BYTES} bytes"))
            continue
        yield _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, origin)


def _parse(line: bytes, origin: Origin) -> RawRow:
    try:
        value = json.loads(line.decode("utf-8"))
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses half of a surrogate pair
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return RawRow(origin, {}, RowDropped("invalid_utf8", str(error.reason)))
    except (ValueError, RecursionError) as error:
        return RawRow(origin, {}, RowDropped("invalid_json", str(error)[:80]))
    if not isinstance(value, dict):
        return RawRow(origin, {}, RowDropped("not_an_object", type(value).__name__))
    return RawRow(origin, value)


def _read_parquet(stream: Any, file: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(PARQUET_BATCH_ROWS):
            for value in batch.to_pylist():
                number += 1
                yield RawRow(Origin(file, number), value)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: unreadable after row {number} ({error}); copy it again") from error


def _import_datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: reading Hugging Face data sets needs `pip install datasets`") from error
    return datasets


def _read_hugging_face(path: str) -> Iterator[RawRow]:
    datasets = _import_datasets(path)
    parts = HUGGING_FACE_NAME.fullmatch(path)
    if parts is None:
        raise UserError(f"{path}: write hf:NAME or hf:NAME:SPLIT")
    try:
        dataset = datasets.load_dataset(parts[1], split=parts[2] or "train")
    except Exception as error:  # the hub client raises many kinds; all mean that this name gives no rows
        raise UserError(f"{path}: cannot load the data set ({type(error).__name__}: {error})") from error
    return (RawRow(Origin(path, number), value) for number, value in enumerate(dataset, start=1))


def _read_saved_dataset(path: str) -> Iterator[RawRow]:
    datasets = _import_datasets(path)
    return (RawRow(Origin(path, number), value) for number, value in enumerate(datasets.load_from_disk(path), start=1))
