"""Reading rows: every format gives the same rows, and what cannot be read is counted or refused by name."""

import errno
import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from gemma4_tpu.config.schema import DataSource
from gemma4_tpu.data import readers
from gemma4_tpu.data.sources import find, read_rows
from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import StorageGone
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


LAYOUTS = {
    "folders": ["train/0000.jsonl", "validation/0000.jsonl"],
    "the Hub's Parquet branch": ["default/train/0000.jsonl", "default/validation/0000.jsonl"],
    "names": ["dialogues_train.jsonl", "dialogues_test.jsonl"],
    "shards": ["data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
    "no name for training": ["rows.jsonl", "rows_val.jsonl"],
    "splits of one's own": ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
}


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=LAYOUTS)
def test_a_folder_with_splits_gives_each_to_its_side(write_jsonl, tmp_path, files):
    write_jsonl(ROWS[:3], f"set/{files[0]}")
    write_jsonl(ROWS[3:], f"set/{files[1]}")
    source = DataSource(path=str(tmp_path / "set"))
    train, heldout = find(source), find(source, heldout=True)
    assert [row.value for row in train.rows()] == ROWS[:3]
    assert [row.value for row in heldout.rows()] == ROWS[3:]
    assert train.heldout_splits() == [heldout.split]
    assert f"not read here: {heldout.split}" in train.told()[0]


def test_splits_that_cannot_be_told_are_refused_until_named(write_jsonl, tmp_path):
    for number, name in enumerate(["train_sft", "train_gen", "test_sft"]):
        write_jsonl(ROWS[number : number + 1], f"set/{name}-00000-of-00001.jsonl")
    folder = str(tmp_path / "set")
    with pytest.raises(UserError, match=r"several splits could be meant .*train_gen.* split: <name>"):
        find(DataSource(path=folder))
    named = find(DataSource(path=folder, split="train_sft"))
    assert [row.value for row in named.rows()] == ROWS[:1]
    assert named.heldout_splits() == ["test_sft"]
    with pytest.raises(UserError, match="no split dev"):
        find(DataSource(path=folder, split="dev"))
    write_jsonl(ROWS, "only/test.jsonl")
    with pytest.raises(UserError, match="no split can be trained on"):
        find(DataSource(path=str(tmp_path / "only")))


def test_a_subset_is_a_folder_within(write_jsonl, tmp_path):
    write_jsonl(ROWS[:1], "set/en/train.jsonl")
    write_jsonl(ROWS[1:], "set/de/train.jsonl")
    assert [row.value for row in find(DataSource(path=str(tmp_path / "set"), subset="de")).rows()] == ROWS[1:]


def test_files_passed_over_are_counted_by_ending(write_jsonl, tmp_path):
    write_jsonl(ROWS, "set/rows.jsonl")
    for name in ("README.md", "notes.md", "rows.xlsx", "dataset_info.json", ".gitattributes"):
        (tmp_path / "set" / name).write_text("x")
    (told,) = find(DataSource(path=str(tmp_path / "set"))).told()
    assert "1 files read, skipped: 2 × .md" in told
    assert all(f"1 × {what}" in told for what in ("hidden", "dataset_info.json", ".xlsx"))


def test_saved_data_sets_need_no_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert values(str(tmp_path / "one")) == ROWS
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")
    assert values(str(tmp_path / "several")) == ROWS
    assert len(list(find(DataSource(path=str(tmp_path / "several")), heldout=True).rows())) == 2


def test_hugging_face_data_sets(write_jsonl, tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(ROWS, "hub/train.jsonl")
    write_jsonl(ROWS[:2], "hub/test.jsonl")
    assert values(f"hf:{tmp_path}/hub") == ROWS
    assert values(f"hf:{tmp_path}/hub:test") == values(f"hf:{tmp_path}/hub:default:test") == ROWS[:2]
    place = find(DataSource(path=f"hf:{tmp_path}/hub"))
    assert (place.split, place.heldout_splits()) == ("train", ["test"])
    with pytest.raises(UserError, match=r"no split dev \(there are: train, test\)"):
        values(f"hf:{tmp_path}/hub:dev")
    with pytest.raises(UserError, match="cannot load the data set"):
        values(f"hf:{tmp_path}/hub:nothing:train")


def test_embedded_rows_travel_with_the_package():
    assert all(row["messages"] for row in values("embedded:verilog_smoke/heldout.jsonl.gz"))


def test_remote_rows_through_fsspec(tmp_path):
    import fsspec

    folder = f"memory://{tmp_path.name}"  # other tests put files into the same memory
    with fsspec.open(f"{folder}/rows.jsonl", "w") as stream:
        stream.write(json.dumps(ROWS[0]) + "\n")
    assert values(f"{folder}/rows.jsonl") == ROWS[:1]
    assert [str(row.origin) for row in read_rows(f"{folder}/")] == [f"{folder}/rows.jsonl:1"]


def test_unreadable_lines_are_reported_with_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
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
    with pytest.raises(UserError, match=r"torn\.jsonl\.gz: the file is truncated or unreadable after row \d+"):
        values(str(tmp_path / "torn.jsonl.gz"))
    (tmp_path / "not.jsonl.gz").write_bytes(b"{}\n")
    with pytest.raises(UserError, match=r"not\.jsonl\.gz"):
        values(str(tmp_path / "not.jsonl.gz"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"torn\.parquet: the file is truncated"):
        values(str(tmp_path / "torn.parquet"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/nowhere.jsonl", "no such file or folder"),
        ("{tmp}", "the folder contains no"),
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


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("{}\n")
    scandir = os.scandir

    def refusing(place):
        if str(place).rstrip("/").endswith("closed"):  # as for a user without access to it
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="closed"):
        find(DataSource(path=str(tmp_path)))


def test_an_address_that_does_not_answer_is_named():
    with pytest.raises(StorageGone, match=r"^http://127\.0\.0\.1:1/rows\.jsonl: .*check the address, the network$"):
        find(DataSource(path="http://127.0.0.1:1/rows.jsonl"))
