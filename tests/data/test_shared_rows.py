"""The rows of public reports in `../shared/data/rows`: the right examples, or a right and counted drop."""

import pytest

from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.normalise import Normalised, Normaliser
from gemma4_tpu.data.sources import find, read_rows
from gemma4_tpu.errors import UserError
from tests.house.scripts import ROOT

FOLDER = ROOT.parent / "shared/data/rows"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared is absent: no rows of public reports")

# file → (training examples, held-out ones, what is said); of the rows that chat templates can't be blamed for.
FOUND = {
    "alpaca.jsonl": (2, 1, ["rows read: 3 as alpaca", "1 training rows repeat an earlier row exactly"]),
    "pc.jsonl": (2, 1, ["rows read: 3 as prompt_completion"]),
    "seq.parquet": (2, 1, ["a dict of lists turned into turns: 3 rows"]),
    "sharegpt.jsonl": (2, 1, ["role human read as user: 3 rows", "role gpt read as assistant: 3 rows"]),
    "split_folders": (3, 3, ["3 held-out rows are also training rows"]),
    "tcint.jsonl": (1, 0, ["rows read: 1 as chat"]),
    "think.jsonl": (1, 0, ["thoughts taken out of the content: 1 rows"]),
    "think_multi.jsonl": (1, 1, []),
    "tools.parquet": (1, 1, ["nulls in place of absent keys removed: 2 rows"]),
    "tools_same.jsonl": (1, 1, []),
    "toolstr.jsonl": (1, 1, ["tools given as a JSON string: 2 rows"]),
    "twenty.jsonl": (18, 2, ["rows read: 20 as chat"]),
}


@pytest.mark.parametrize("name", FOUND)
def test_rows_as_people_have_them(name, tiny_tokenizer):
    data = DataConfig(
        train=[DataSource(path=str(FOLDER / name))], sequence_length=1024, heldout_fraction=0.05, max_drop_fraction=0.5
    )
    built = build_data(data, tiny_tokenizer)
    train, heldout, told = FOUND[name]
    rows = {(side, str(s.origin(i))) for side, s in enumerate([built.train, built.heldout]) if s for i in range(len(s))}
    assert sum(side == 0 for side, _ in rows) == train
    assert sum(side == 1 for side, _ in rows) == heldout
    assert set(told) <= set(built.told())
    dropped = {reason: drop.count for reason, drop in built.train_report.dropped.items()}
    assert dropped == ({"bad_tool_call": 1} if name == "tcint.jsonl" else {})


def conversations(name):
    normaliser = Normaliser("auto", {}, Normalised())
    return [normaliser(row) for row in read_rows(str(FOLDER / name))]


def test_tables_and_lines_say_the_same():
    assert conversations("tools.parquet") == conversations("tools_same.jsonl")


def test_each_turn_keeps_what_the_row_said_about_its_loss():
    first, second = conversations("weight.jsonl")
    assert [turn.get("train") for turn in first.messages] == [None, False, None, True]
    assert [turn.get("train") for turn in second.messages] == [None, False, None, None]


def test_utf_16_is_named():
    with pytest.raises(UserError, match="the text is UTF-16, not UTF-8; convert it: iconv"):
        list(find(DataSource(path=str(FOLDER / "u16.jsonl"))).rows())
