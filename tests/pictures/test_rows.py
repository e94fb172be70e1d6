"""Rows with pictures, in the forms that people have them: what becomes of each, and what is dropped why."""

import base64
import io
import json
import re
import textwrap
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from gemma4_tpu.config.schema import DataConfig, DataSource, ModelConfig
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.markup import IMAGE
from gemma4_tpu.data.seen import picture_reader
from gemma4_tpu.data.sources import _undecoded
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.models.base import resolve_base
from gemma4_tpu.reporting.preview import preview

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "templates"
PAGE = (Path(__file__).parents[2] / "docs/pictures.md").read_text(encoding="utf-8")
ANSWER = {"role": "assistant", "content": "1 red circle"}
ASK = {"type": "text", "text": "What is it?"}


def png(width=96, height=96, colour=(200, 30, 30)):
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def read(base, tmp_path_factory):
    """`read(rows)` → what is built of them; `a.png` and `b/c d.png` lie beside the file."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.png").write_bytes(png())
    (folder / "b").mkdir()
    (folder / "b" / "c d.png").write_bytes(png(64, 150))
    (folder / "torn.png").write_bytes(png()[:-40])
    (folder / "bomb.png").write_bytes(png(9000, 9000))
    with (folder / "huge.png").open("wb") as huge:
        huge.truncate(64 * 2**20 + 1)
    found = resolve_base(ModelConfig(name="tiny_e2b", path=str(base)), pictures=True)
    tokenizer = load_tokenizer(found.tokenizer_folder)
    own_template = tokenizer.chat_template

    def build(rows, name="rows.jsonl", pictures=True, template=None, **options):
        path = folder / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            import datasets

            datasets.Dataset.from_list(rows).to_parquet(path)
        data = DataConfig(train=[DataSource(path=str(path))], image_cache="cache", max_drop_fraction=1.0, **options)
        tokenizer.chat_template = template or own_template
        built = build_data(data, tokenizer, pictures=picture_reader(found, data) if pictures else None)
        image_token = found.arch.vision.image_token
        soft = [int((built.train.example(i)[0] == image_token).sum()) for i in range(len(built.train))]
        return built, soft

    build.folder, build.tokenizer = folder, tokenizer
    return build


def said(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


def test_every_spelling_of_a_picture_is_the_same_picture(read):
    path, data = read.folder / "a.png", base64.b64encode(png()).decode()
    url, lines = f"data:image/png;base64,{data}", base64.encodebytes(png()).decode()
    rows = [
        said({"type": "image", "path": "a.png"}, ASK),
        said({"type": "image", "image": str(path)}, ASK),
        said({"type": "image", "url": "a.png"}, ASK),
        said({"type": "image_url", "image_url": {"url": url}}, ASK),
        said({"type": "image_url", "image_url": path.as_uri()}, ASK),
        said({"type": "image_url", "image_url": {"url": f"file:{path}"}}, ASK),
        said({"type": "input_image", "image_url": url}, ASK),
        said({"type": "image_url", "image_url": {"url": f"data:;base64,{quote(data, safe='')}"}}, ASK),
        said({"type": "image_url", "image_url": {"url": f"DATA:image/jpeg; BASE64,{lines}"}}, ASK),
        said({"type": "image_url", "image_url": {"url": f"data:image/png,{quote(png())}"}}, ASK),
        said({"type": "image", "base64": data}, ASK),
        said({"type": "image", "base64": url}, ASK),
        said({"type": "image", "bytes": lines}, ASK),
        said({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}, ASK),
        {**said({"type": "image"}, ASK), "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, ANSWER], "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "1 red circle"}],
         "image": "a.png"},
        {"prompt": "What is it?", "completion": "1 red circle", "image": url},
        {**said({"type": "image"}, ASK), "images": [{"bytes": data, "path": None}]},
    ]  # fmt: skip
    built, soft = read(rows)
    assert built.train_report.rows_dropped == 0
    assert len(set(built.train.pictures)) == 1 and built.duplicates == len(rows) - 1
    assert soft == [64] * len(rows)  # 96 × 96 pixels in cells of 12


def test_two_pictures_stand_where_the_row_has_them_and_carry_no_loss(read):
    mixed = said({"type": "image", "path": "a.png"}, ASK, {"type": "image", "path": "b/c d.png"}, ASK)
    placed = {"messages": [{"role": "user", "content": "What is it?<image>and<image>What is it?"}, ANSWER],
              "images": ["a.png", "b/c d.png"]}  # fmt: skip
    built, soft = read([mixed, placed])
    assert f"their tokens are {sum(soft)} of" in "\n".join(built.told())
    assert soft[0] == soft[1] > 64 and built.train.pictures[0] == built.train.pictures[1]
    ids, flags = built.train.example(0)
    where = np.flatnonzero(flags)
    assert (np.diff(where) == 1).all() and where[-1] == len(ids) - 1  # the answer alone
    starts = np.flatnonzero(np.diff((ids == ids[np.bincount(ids)[ids].argmax()]).astype(int)) == 1)
    assert len(starts) == 2 and starts[1] - starts[0] > 64 + 2  # the question between them


def test_a_preview_shows_what_a_picture_takes(read):
    built, soft = read([said({"type": "image", "path": "a.png"}, ASK)])
    out = io.StringIO()
    console = Console(file=out, width=200)
    preview(built, DataConfig(train=[]), read.tokenizer, rows_per_update=1, seed=0, console=console)
    assert f"[picture of {soft[0]} tokens]" in out.getvalue() and "⟦1 red circle" in out.getvalue()


def test_a_folder_of_labelled_pictures_becomes_rows_as_the_page_says(read, monkeypatch):
    (snippet,) = re.findall(r"^ *```python\n( *import json, pathlib\n.*?)^ *```", PAGE, re.M | re.S)
    (read.folder / "photos/scratch").mkdir(parents=True)
    (read.folder / "photos/scratch/0001.jpg").write_bytes(png())
    monkeypatch.chdir(read.folder)
    exec(textwrap.dedent(snippet), {})
    built, soft = read([json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()])
    assert soft == [64] and "scratch" in read.tokenizer.decode(built.train.example(0)[0])


def test_parquet_as_datasets_writes_it(read):
    answer = {"role": "assistant", "content": [{"type": "text", "text": "1 red circle"}]}
    turns = [{"role": "user", "content": [{"type": "image", "text": None}, ASK]}, answer]
    rows = [{"images": [one], "messages": turns} for one in (
        {"bytes": png(), "path": None}, {"bytes": None, "path": "a.png"}, {"bytes": png(), "path": "nothing.png"}
    )]  # fmt: skip
    built, soft = read(rows, "rows.parquet")
    assert soft == [64, 64, 64] and len(set(built.train.pictures)) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (said({"type": "image", "path": "nothing.png"}, ASK), "missing_picture"),
        (said({"type": "image"}, ASK), "missing_picture"),
        ({**said({"type": "image"}, ASK), "images": ["a.png", "a.png"]}, "missing_picture"),
        (said({"type": "image", "path": "rows.jsonl"}, ASK), "unreadable_picture"),
        (said({"type": "image", "path": "torn.png"}, ASK), "unreadable_picture"),
        (said({"type": "image_url", "image_url": "data:image/png;base64,%%"}, ASK), "unreadable_picture"),
        (said({"type": "image", "path": "bomb.png"}, ASK), "picture_too_large"),
        (said({"type": "image", "path": "huge.png"}, ASK), "picture_too_large"),
        (said({"type": "image_url", "image_url": "data:image/png,iVBORw0KGgo="}, ASK), "unreadable_picture"),
        (said({"type": "image_url", "image_url": "data:image/svg+xml,%3Csvg/%3E"}, ASK), "unreadable_picture"),
        (said({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, ASK), "picture_on_the_web"),
        (
            {
                "messages": [
                    {"role": "user", "content": "Draw."},
                    {"role": "assistant", "content": [{"type": "image", "path": "a.png"}]},
                ]
            },
            "bad_content",
        ),
        (
            {"messages": [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": IMAGE}]},
            "control_token",
        ),
        (said({"type": "video", "path": "a.mp4"}, ASK), "bad_content"),
        (said(ASK, {"type": "text", "text": IMAGE}), "control_token"),
    ],
)
def test_dropped_by_reason(read, row, reason):
    built, _ = read([said({"type": "image", "path": "a.png"}, ASK), row])
    assert list(built.train_report.dropped) == [reason]


def test_columns_of_pictures_have_any_name(read):
    named = {"messages": [{"role": "user", "content": "What is it?"}, ANSWER], "file_name": "a.png"}
    built, soft = read([named], columns={"image": "file_name"})
    assert soft == [64] and "column 'file_name' not used" not in built.normalised.notes
    built, soft = read([named])
    assert soft == [0] and built.normalised.notes["column 'file_name' not used"] == 1


def test_pictures_inside_turns_of_a_data_set_of_the_hub_stay_files():
    import datasets

    part = {"type": datasets.Value("string"), "image": datasets.Image()}
    kept = _undecoded(datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)}))
    assert kept.feature["content"].feature["image"] == datasets.Image(decode=False)
    text = datasets.List({"role": datasets.Value("string")})
    assert _undecoded(text) is text


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("file://a.png", "file://a.png: names a host; write file:///<path>"),
        ("~nobody-of-this-name/a.png", "No such file"),
        ("b", "Is a directory"),
        ("\x1b[2Ja\0.png", "\\x1b[2Ja\\x00.png: embedded null byte"),
        ("s3:/a.png", "No such file"),
    ],
)
def test_what_is_told_of_a_path_that_is_none(read, path, told):
    built, _ = read([said(ASK), said({"type": "image", "path": path}, ASK)])
    assert told in built.train_report.dropped["missing_picture"].examples[0]


def test_base64_in_place_of_a_path_is_dropped_with_what_to_do(read):
    data = base64.b64encode(np.random.default_rng(0).bytes(9000)).decode().replace("/", "a")
    built, _ = read([said(ASK), said({"type": "image", "image": data}, ASK)])
    (told,) = built.train_report.dropped["missing_picture"].examples
    assert "base64 is read under the key `base64`" in told and len(told) < 400


def test_rows_with_pictures_and_rows_without_in_one_file(read):
    marks = {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, ANSWER]}
    both = {**said({"type": "image"}, ASK), "images": ["b/c d.png"], "image": "a.png"}
    built, soft = read([said(ASK), {**said(ASK), "images": []}, marks, both])
    assert soft[:3] == [0, 0, 0] and soft[3] > 0 and built.train.pictures[:3] == ((), (), ())
    notes = built.normalised.notes
    assert notes["<image> in texts left as text: no picture of a column belongs there"] == 1
    assert notes["column 'image' not used"] == 1 and "column 'images' not used" not in notes


def test_a_picture_longer_than_a_row_is_dropped_by_its_tokens(read):
    built, soft = read([said(ASK), said({"type": "image", "path": "a.png"}, ASK)], sequence_length=64)
    assert soft == [0] and list(built.train_report.dropped) == ["too_long"]
    assert built.told() and not built.train.picture_tokens


def test_without_a_cache_rows_with_pictures_are_dropped_and_the_key_is_named(read):
    built, _ = read([said({"type": "image", "path": "a.png"}, ASK), said(ASK)], pictures=False)
    assert "data.image_cache" in built.train_report.dropped["bad_content"].examples[0]
    assert built.train.pictures is None


@pytest.mark.parametrize("revision", ["2026-04-13", "2026-04-29", "2026-07-09"])
def test_googles_templates(read, revision):
    path = SHARED / f"e2b_{revision}.jinja"
    if not path.is_file():
        pytest.skip("../shared is absent: no templates of released checkpoints")
    two = {"messages": [*said({"type": "image", "path": "a.png"}, ASK)["messages"],
                        *said(ASK, {"type": "image", "path": "b/c d.png"})["messages"]]}  # fmt: skip
    built, soft = read([two], template=path.read_text(encoding="utf-8"))
    assert built.train_report.rows_dropped == 0 and len(soft) == 1 and soft[0] > 64
    assert len(built.train.pictures[0]) == 2
