"""Reading rows: every format gives the same rows, and what cannot be read is counted or refused by name."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from gemma4_tpu.data import sources
from gemma4_tpu.data.sources import read_rows
from gemma4_tpu.errors import UserError
from tests.data.conftest import chat_row

ROWS = [chat_row(f"question {i}", f"answer {i}") for i in range(5)]


def values(path):
    return [row.value for row in read_rows(path)]


def test_jsonl_plain_and_gzipped(write_jsonl):
    assert values(write_jsonl(ROWS)) == ROWS
    assert values(write_jsonl(ROWS, "rows.jsonl.gz")) == ROWS


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert values(str(path)) == ROWS


def test_folder_in_the_order_of_names(write_jsonl, tmp_path):
    write_jsonl(ROWS[3:], "data/part-2.jsonl")
    write_jsonl(ROWS[:3], "data/deep/part-1.jsonl.gz")
    write_jsonl(["not data"], "data/.cache/junk.jsonl")
    (tmp_path / "data/README.md").write_text("about")
    rows = list(read_rows(str(tmp_path / "data")))
    assert [row.value for row in rows] == ROWS
    names = [f"{tmp_path}/data/deep/part-1.jsonl.gz:{i}" for i in (1, 2, 3)] + [
        f"{tmp_path}/data/part-2.jsonl:{i}" for i in (1, 2)
    ]
    assert [str(row.origin) for row in rows] == names


def test_folder_of_several_splits_is_not_mixed(write_jsonl, tmp_path):
    write_jsonl(ROWS, "data/train-00000.jsonl")
    write_jsonl(ROWS, "data/test.jsonl")
    with pytest.raises(UserError, match=r"several splits \(test, train\)"):
        values(str(tmp_path / "data"))


def test_hugging_face_data_sets(write_jsonl, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = str(tmp_path / "saved")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    assert values(folder) == ROWS
    write_jsonl(ROWS, "hub/train.jsonl")
    write_jsonl(ROWS[:2], "hub/test.jsonl")
    assert values(f"hf:{tmp_path}/hub") == ROWS
    assert values(f"hf:{tmp_path}/hub:test") == ROWS[:2]
    with pytest.raises(UserError, match="cannot load the data set"):
        values(f"hf:{tmp_path}/hub:dev")


def test_embedded_rows_travel_with_the_package():
    assert all(row["messages"] for row in values("embedded:verilog_smoke/heldout.jsonl.gz"))


def test_remote_rows_through_fsspec(tmp_path):
    import fsspec

    with fsspec.open("memory://bucket/rows.jsonl", "w") as stream:
        stream.write(json.dumps(ROWS[0]) + "\n")
    assert values("memory://bucket/rows.jsonl") == ROWS[:1]
    assert [str(row.origin) for row in read_rows("memory://bucket/")] == ["memory://bucket/rows.jsonl:1"]


def test_unreadable_lines_are_reported_with_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    lines = [
        b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode(),  # a byte order mark is no fault
        b'{"messages": [{"role": "us',
        b"",
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud83d"}',
        b'["a list"]',
        b'{"text": "' + b"x" * 5000 + b'"}',
        json.dumps(ROWS[1]).encode() + b"\r",
        b"null",
        b'{"text": "torn at the end of the fi',
    ]
    path.write_bytes(b"\n".join(lines))
    rows = list(read_rows(str(path)))
    assert [row.value for row in rows if row.value] == ROWS[:2]
    problems = [(row.origin.row, row.problem.reason) for row in rows if row.problem]
    assert problems == [
        (2, "invalid_json"),
        (4, "invalid_utf8"),
        (5, "invalid_utf8"),
        (6, "not_an_object"),
        (7, "line_too_long"),
        (9, "not_an_object"),
        (10, "invalid_json"),
    ]


def test_a_torn_archive_is_refused(write_jsonl, tmp_path):
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS * 100))
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"torn\.jsonl\.gz: the file is torn after row \d+"):
        values(str(tmp_path / "torn.jsonl.gz"))
    (tmp_path / "not.jsonl.gz").write_bytes(b"{}\n")
    with pytest.raises(UserError, match=r"not\.jsonl\.gz"):
        values(str(tmp_path / "not.jsonl.gz"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"torn\.parquet: unreadable"):
        values(str(tmp_path / "torn.parquet"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/nowhere.jsonl", "no such file or folder"),
        ("{tmp}", "the folder holds none of"),
        ("{tmp}/notes.txt", "unknown format"),
        ("s9://bucket/rows.jsonl", "s9"),
        ("embedded:nothing.jsonl", "no such embedded asset"),
    ],
)
def test_wrong_paths_are_named(tmp_path, path, message):
    if path.endswith(".txt"):
        (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match=message):
        values(path.format(tmp=tmp_path))


def test_missing_gcs_package_names_the_command():
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'gemma4-tpu\[gcp\]'"):
            values("gs://bucket/rows.jsonl")


def test_an_address_of_the_hub_is_a_file_and_no_data_set_name(monkeypatch):
    from gemma4_tpu.data import sources

    asked = []

    def filesystem(path):
        asked.append(path)
        raise UserError("no network here")

    monkeypatch.setattr(sources, "filesystem", filesystem)
    with pytest.raises(UserError, match="no network"):
        list(sources.read_rows("hf://datasets/owner/name/rows.jsonl"))
    assert asked == ["hf://datasets/owner/name/rows.jsonl"]
