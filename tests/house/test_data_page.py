"""docs/data.md: the rows that it shows are taken, the reasons for drops are all there."""

import json
import re

from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data import hard_limit, readers, timeout, tokenizer
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


def test_the_limits_are_those_of_the_code():
    page, gib = " ".join(PAGE.split()), 2**30
    assert f"A row has {timeout.ROW_SECONDS:g} s, its rendering {timeout.ROW_GIB} GiB of memory" in page
    assert f"After {hard_limit.SECONDS:g} s of rendering, or {hard_limit.SECONDS:g} s and 1 s per" in page
    assert f"{tokenizer._CHARACTERS_PER_SECOND:,} characters of encoding" in page
    assert f"more than {hard_limit.BYTES // gib} GiB and {tokenizer._BYTES_PER_CHARACTER} bytes per character" in page
    assert f"after {tokenizer.LOAD_SECONDS:g} s or {tokenizer.LOAD_BYTES // gib} GiB of loading a tokenizer" in page
    assert f"longer than {readers.MAX_LINE_BYTES // 2**20} MiB" in page
