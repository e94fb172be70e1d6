"""docs/data.md: the rows that it shows are taken, the reasons for drops are all there."""

import json
import re

from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.drops import REASONS
from gemma4_tpu.data.tokenizer import load_tokenizer
from tests.house.scripts import ROOT

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")


def test_rows_that_are_shown_can_be_trained_on(tmp_path):
    rows = re.findall(r"^```json\n(.*?)^```", PAGE, re.M | re.S)[0].splitlines()
    assert len(rows) == 3 and all(map(json.loads, rows))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    data = DataConfig(train=[DataSource(path=str(path))], sequence_length=1024)
    built = build_data(data, load_tokenizer("embedded:tiny"))
    assert (built.train_report.rows_kept, built.train_report.rows_dropped) == (3, 0)


def test_every_reason_for_a_drop_is_told():
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M)) == REASONS
