"""Every format of file gives the same rows, what a file is not is said by name, and a bad row is handed on."""

import gzip
import io
import json

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from gemma4_tpu.data import readers
from gemma4_tpu.data.readers import read_file
from gemma4_tpu.errors import UserError

ROWS = [{"prompt": f"question {i}", "completion": "a\u2028b\x85c\n\nd" if i == 1 else f'"{i}", ö'} for i in range(4)]


def packed(content, ending):
    if ending == ".gz":
        return gzip.compress(content, mtime=0)
    return pyarrow.compress(content, "zstd", asbytes=True) if ending == ".zst" else content


def written(kind):
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(ROWS)
    if kind == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif kind == ".arrow":
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    elif kind == "file.arrow":
        with pyarrow.ipc.new_file(file, table.schema) as stream:
            stream.write_table(table)
    return file.getvalue()


def lines(rows=ROWS, **options):
    return "".join(json.dumps(row, ensure_ascii=False, **options) + "\n" for row in rows).encode()


def csv(delimiter=",", end="\r\n"):
    cells = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)]
    return end.join(delimiter.join('"' + c.replace('"', '""') + '"' for c in line) for line in cells).encode()


CONTENTS = {
    "rows.jsonl": lines(),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(),
    "rows.ndjson": b"\n" + lines().replace(b"}\n", b"}\r\n\n"),
    "rows.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": lines(),
    "several.json": lines(indent=1),
    "rows.csv": csv(),
    "semicolons.csv": b"\xef\xbb\xbf" + csv(";", "\n"),
    "rows.tsv": csv("\t"),
    "rows.parquet": written(".parquet"),
    "rows.arrow": written(".arrow"),
    "file.arrow": written("file.arrow"),
}


def twice(names, kind):
    """A table in which a column, or a field of its turns, stands twice."""
    table = pyarrow.Table.from_arrays([pyarrow.array([name]) for name in names], names=names)
    file = io.BytesIO()
    if kind == ".arrow":
        turns = pyarrow.StructArray.from_arrays([column.chunk(0) for column in table.columns], names=names)
        table = pyarrow.table({"messages": turns})
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    else:
        pyarrow.parquet.write_table(table, file)
    return file.getvalue()


TWICE = twice(["prompt", "completion", "completion"], ".parquet")
TWICE_INSIDE = twice(["role", "content", "content"], ".arrow")


def values(content, name):
    return [row.value for row in read_file(io.BytesIO(content), name)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_rows(name, ending):
    assert values(packed(CONTENTS[name], ending), name + ending) == ROWS


def test_parts_of_compressed_files_may_follow_each_other():
    for ending in (".gz", ".zst"):
        assert values(packed(lines(ROWS[:2]), ending) + packed(lines(ROWS[2:]), ending), f"rows.jsonl{ending}") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", lines().decode().encode("utf-16"), "the text is UTF-16, not UTF-8; convert it: iconv"),
        ("rows.csv", csv().decode().encode("utf-16-be"), "the text is UTF-16"),
        ("rows.jsonl", json.dumps(ROWS).encode(), "one object per line; rename it to end in .json"),
        ("rows.jsonl", json.dumps(ROWS, indent=2).encode(), "holds a JSON array"),
        ("rows.ndjson", lines(indent=1), "holds JSON objects over several lines"),
        ("rows.jsonl", CONTENTS["rows.parquet"], "is Parquet, not text; rename it to end in .parquet"),
        ("rows.jsonl", packed(lines(), ".gz"), "is gzip-compressed, not text; rename it to end in .gz"),
        ("rows.csv", b"PK\x03\x04xlsx", "a ZIP archive (or an Excel sheet)"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
        ("rows.jsonl.gz", lines(), "not a .gz file"),
        ("rows.jsonl.zst", packed(lines(), ".gz"), "not a .zst file"),
        ("rows.parquet", lines(), "not Parquet"),
        ("rows.parquet", CONTENTS["rows.arrow"], "holds an Arrow stream, not Parquet"),
        ("rows.parquet", CONTENTS["rows.parquet"][:-30], "truncated"),
        ("rows.arrow", CONTENTS["rows.arrow"][:-400], "truncated"),
        ("rows.jsonl.zst", packed(lines(ROWS * 99), ".zst")[:-9], "truncated"),
        ("rows.json", json.dumps(ROWS).encode()[:-9], "truncated or unreadable after row 3"),
        ("rows.json", b'[{"role": "user"}]\n[{"role": "user"}]', "more follows the JSON array"),
        ("rows.txt", b"x", "unknown format; rows come from .jsonl"),
        ("rows.csv", csv(end="\r"), "a carriage return alone; convert them: tr"),
        ("rows.jsonl", lines().replace(b"\n", b"\r"), "a carriage return alone"),
        ("rows.csv", b"prompt,completion,completion\na,good,bad\n", "there are 2 columns named completion"),
        ("rows.csv", b'"prompt"x,completion\na,b\n', "its header cannot be read"),
        ("rows.parquet", TWICE, "there are 2 columns named completion"),
        ("rows.arrow", TWICE_INSIDE, "duplicate field names"),
    ],
)  # fmt: skip
def test_what_a_file_is_not_is_said(name, content, told):
    with pytest.raises(UserError) as caught:
        values(content, name)
    assert told in str(caught.value)
    assert str(caught.value).startswith(name)


def test_rows_of_csv_that_cannot_be_read_are_handed_on_with_the_reason(monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    content = (
        b'prompt,completion\na,b\na,b,c\n\na,\n"a"x,b\n\xff,b\n' + b"a," + b"x" * 200 + b'\nlast,b\na,"never closed\n'
    )
    rows = list(read_file(io.BytesIO(content), "rows.csv"))
    assert [row.value for row in rows if not row.problem] == [
        {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, {"prompt": "last", "completion": "b"},
    ]  # fmt: skip
    problems = [(row.origin.row, row.problem.reason) for row in rows if row.problem]
    assert problems == [
        (2, "invalid_csv"),
        (4, "invalid_csv"),
        (5, "invalid_utf8"),
        (6, "line_too_long"),
        (8, "invalid_csv"),
    ]


def test_short_floats_are_read_as_they_were_written():
    file = io.BytesIO()
    numbers = [0.1, None, 2.5, -3.0, float("inf")]
    kinds = {"half": pyarrow.float16(), "single": pyarrow.float32(), "double": pyarrow.float64()}
    columns = {name: pyarrow.array(numbers, pyarrow.float64()).cast(kind) for name, kind in kinds.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    assert values(file.getvalue(), "rows.parquet") == [dict.fromkeys(kinds, number) for number in numbers]


def test_headers_of_csv_are_read_as_records_are():
    """A delimiter or a line break within quotes belongs to a column's name; a table may end in nameless columns."""
    content = b'"a;b;c;d","x\ny",prompt,,\n1,2,q,,\n'
    assert values(content, "rows.csv") == [{"a;b;c;d": "1", "x\ny": "2", "prompt": "q", "": None}]


def test_an_empty_file_holds_no_rows():
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        assert values(b"", name) == []


def test_a_key_that_stands_twice_in_an_object_drops_its_row_alone():
    """Python keeps the last value and says nothing: half of what was written would be lost."""
    twice = b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b", "content": "c"}]}\n'
    for name in ("rows.jsonl", "rows.json"):
        rows = list(read_file(io.BytesIO(twice + lines()), name))
        assert [row.value for row in rows[1:]] == ROWS
        assert str(rows[0].problem) == "invalid_json: the key 'content' appears twice in one object"
