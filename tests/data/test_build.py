"""From sources to examples: drops, held-out rows, weights, limits, speed, and what the run folder gets to know."""

import json
import resource
import shutil
import subprocess
import sys
import time

import pytest

from gemma4_tpu.assets import ROOT
from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.chat import ChatFormat
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.errors import UserError
from tests.data.conftest import TEMPLATE, chat_row, make_tokenizer

WORDS = ["add", "two", "three", "sum", "value", "then", "now", "call"]


def config(*paths, **options):
    return DataConfig(train=[DataSource(path=path) for path in paths], **{"sequence_length": 64, **options})


def rows(count, start=0):
    return [
        chat_row(f"add {' '.join(WORDS[: i % 8])} x" + " y" * (i // 8), "is 5") for i in range(start, start + count)
    ]


def prompts(examples, tokenizer):
    found = []
    for index in range(len(examples)):
        ids, flags = examples.example(index)
        found.append(tokenizer.decode(ids[: flags.argmax()]))
    return found


def test_examples_are_the_rendered_rows_in_order(tokenizer, write_jsonl):
    path = write_jsonl(rows(20))
    built = build_data(config(path), tokenizer)
    chat = ChatFormat(tokenizer)
    assert len(built.train) == 20
    assert built.heldout is None
    for index, row in enumerate(rows(20)):
        [[example]] = chat.examples([chat.render(Conversation(row["messages"]))])
        ids, flags = built.train.example(index)
        assert (ids.tolist(), flags.tolist()) == (example.ids.tolist(), example.flags.tolist())
        assert str(built.train.origin(index)) == f"{path}:{index + 1}"


def test_drops_are_counted_by_reason_with_row_numbers(tokenizer, write_jsonl):
    long = chat_row("add " + "x " * 80, "5")
    bad = [{"messages": []}, '{"torn', "\n", long, chat_row("add <eos>", "5"), {"messages": rows(1)[0]["messages"][:1]}]
    path = write_jsonl([*rows(3), *bad, *rows(2), long])
    built = build_data(config(path, max_drop_fraction=0.6), tokenizer)
    report = built.train_report
    assert (report.rows_read, report.rows_kept, report.rows_dropped) == (11, 5, 6)
    assert {reason: drop.count for reason, drop in report.dropped.items()} == {
        "no_messages": 1, "invalid_json": 1, "too_long": 2, "control_token": 1, "no_target": 1,
    }  # fmt: skip
    assert [example.split(" ")[0] for example in report.dropped["too_long"].examples] == [f"{path}:6", f"{path}:11"]
    assert len(built.train) == 5
    saved = json.loads(json.dumps(built.to_json()))
    assert saved["train"]["dropped"]["no_messages"]["examples"] == [f"{path}:4 (list)"]
    assert saved["train"]["dropped_fraction"] == 6 / 11


def test_an_example_is_never_cut(tokenizer, write_jsonl):
    path = write_jsonl(rows(1))
    whole = len(build_data(config(path), tokenizer).train.example(0)[0])
    assert len(build_data(config(path, sequence_length=whole - 1), tokenizer).train.example(0)[0]) == whole
    with pytest.raises(UserError, match="too_long"):
        build_data(config(path, sequence_length=whole - 2), tokenizer)


def test_too_many_drops_are_an_error(tokenizer, write_jsonl):
    path = write_jsonl([*rows(9), {"messages": []}])
    assert len(build_data(config(path, max_drop_fraction=0.1), tokenizer).train) == 9
    with pytest.raises(
        UserError, match=r"1 of 10 rows dropped \(10\.0%\).*data.max_drop_fraction=0\.05(?s:.*)rows.jsonl:10"
    ):
        build_data(config(path), tokenizer)


def test_nothing_left_is_an_error(tokenizer, write_jsonl):
    with pytest.raises(UserError, match=r"none of the 2 rows can be trained on(?s:.*)no_messages"):
        build_data(config(write_jsonl([{"messages": []}] * 2), max_drop_fraction=1.0), tokenizer)
    with pytest.raises(UserError, match="the sources contain no rows"):
        build_data(config(write_jsonl(["\n"])), tokenizer)
    with pytest.raises(UserError, match=r"data\.train is empty"):
        build_data(config(), tokenizer)


def test_max_rows_takes_the_first_of_each_source_by_weight(tokenizer, write_jsonl):
    paths = [write_jsonl(rows(9), "a.jsonl"), write_jsonl(rows(9, start=9), "b.jsonl"), write_jsonl(rows(1), "c.jsonl")]
    data = config(*paths, max_rows=9)
    data.train[0].weight = 2.0

    def taken():
        train = build_data(data, tokenizer).train
        return sorted(str(train.origin(i)).rpartition("/")[2] for i in range(len(train)))

    # Shares of 2 : 1 : 1, and what the last source does not have goes to the others.
    assert taken() == [*(f"a.jsonl:{n}" for n in range(1, 7)), "b.jsonl:1", "b.jsonl:2", "c.jsonl:1"]
    data.train = data.train[:1]
    assert taken() == [f"a.jsonl:{n}" for n in range(1, 10)]


def test_sources_keep_their_weights(tokenizer, write_jsonl):
    data = config()
    data.train = [
        DataSource(path=write_jsonl(rows(3), "a.jsonl"), weight=2.0),
        DataSource(path=write_jsonl(rows(2), "b.jsonl")),
    ]
    built = build_data(data, tokenizer)
    assert built.train.weights == (2.0, 1.0)
    assert built.train.source.tolist() == [0, 0, 0, 1, 1]
    for weight in (0, -1, float("inf"), float("nan"), 1e12):
        data.train[1].weight = weight
        with pytest.raises(UserError, match=r"b\.jsonl has weight .*at most 1000"):
            build_data(data, tokenizer)


def test_equal_prompts_are_never_on_both_sides(tokenizer, write_jsonl):
    twice = [chat_row(row["messages"][0]["content"], answer) for row in rows(200) for answer in ("is 5", "is 7")]
    built = build_data(config(write_jsonl(twice), heldout_fraction=0.2), tokenizer)
    train, heldout = set(prompts(built.train, tokenizer)), set(prompts(built.heldout, tokenizer))
    assert not train & heldout
    assert len(built.train) + len(built.heldout) == 400
    # A hash gives each of 200 prompts a chance of 0.2: 40 ± 5.7 prompts (one standard deviation), two rows each.
    assert 40 <= len(built.heldout) <= 120
    more = build_data(config(write_jsonl([*rows(50, start=300), *twice]), heldout_fraction=0.2), tokenizer)
    assert heldout <= set(prompts(more.heldout, tokenizer))  # a row's side depends on that row alone


def test_validation_splits_are_held_out_and_never_trained_on(tokenizer, write_jsonl, tmp_path, caplog):
    write_jsonl(rows(8), "set/train.jsonl")
    write_jsonl(rows(2, start=7), "set/validation.jsonl")
    write_jsonl(rows(5, start=20), "set/test.jsonl")
    with caplog.at_level("INFO"):
        built = build_data(config(str(tmp_path / "set"), heldout_fraction=0.5), tokenizer)
    assert (len(built.train), len(built.heldout), built.heldout_report.rows_read) == (8, 2, 2)
    assert "held out, since data.heldout is empty: " in caplog.text and "split validation" in caplog.text
    assert (built.shared_prompts, built.shared_rows) == (1, 1)
    assert "not read here: test, train" in "\n".join(built.told())


def test_duplicates_are_counted(tokenizer, write_jsonl, caplog):
    built = build_data(config(write_jsonl(rows(3) + rows(2))), tokenizer)
    assert built.duplicates == built.to_json()["duplicates"] == 2
    assert "2 of 5 training rows repeat an earlier row exactly" in caplog.text


def test_a_row_that_takes_too_long_is_dropped_and_the_next_ones_are_not(write_jsonl, monkeypatch):
    from gemma4_tpu.data import timeout

    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    loop = "{% if 'x y' in messages[-1].content %}" + endless + "{% endif %}"
    monkeypatch.setattr(timeout, "ROW_SECONDS", 1.0)
    slow = chat_row("add two", "is x y")
    built = build_data(
        config(write_jsonl([slow, *rows(3), slow]), max_drop_fraction=0.5), make_tokenizer(loop + TEMPLATE)
    )
    assert {reason: drop.count for reason, drop in built.train_report.dropped.items()} == {"too_slow": 2}
    assert len(built.train) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory on Linux only")
def test_a_row_whose_rendering_fills_memory_is_dropped_and_the_next_ones_are_not(write_jsonl):
    huge = "{% if 'x y' in messages[-1].content %}{{ 'a' * 3000000000 }}{% endif %}"
    row = chat_row("add two", "is x y")
    built = build_data(
        config(write_jsonl([row, *rows(3), row]), max_drop_fraction=0.5), make_tokenizer(huge + TEMPLATE)
    )
    assert {reason: drop.count for reason, drop in built.train_report.dropped.items()} == {"too_much_memory": 2}
    assert len(built.train) == 3
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_heldout_sources_and_shared_prompts(tokenizer, write_jsonl, caplog):
    data = config(write_jsonl(rows(10), "train.jsonl"))
    data.heldout = [DataSource(path=write_jsonl(rows(4, start=8), "heldout.jsonl"))]
    with caplog.at_level("WARNING"):
        built = build_data(data, tokenizer)
    assert (len(built.train), len(built.heldout), built.shared_prompts) == (10, 4, 2)
    assert "2 of 4 held-out rows have a first prompt that is also trained on" in caplog.text
    assert built.heldout_report.rows_read == 4


def test_fingerprint_tells_what_changed(tokenizer, tiny_tokenizer, write_jsonl):
    path = write_jsonl(rows(5))
    base = build_data(config(path), tokenizer).train.fingerprint

    def changed(data, own=tokenizer):
        other = build_data(data, own).train.fingerprint
        return {key for key in base if base[key] != other[key]}

    assert changed(config(path)) == set()
    assert changed(config(write_jsonl(rows(5), "copy.jsonl.gz"))) == set()  # content counts, not its place or format
    assert changed(config(write_jsonl(rows(6), "six.jsonl"))) == {"rows", "examples"}
    assert changed(config(path, thoughts="train")) == {"thoughts", "examples"}
    assert changed(config(path, sequence_length=256), tiny_tokenizer) == {"tokenizer", "examples"}
    retold = make_tokenizer(TEMPLATE + "{#- a comment -#}")
    assert changed(config(path), retold) == {"chat_template"}


def test_thinking_without_thoughts_is_told(tokenizer, write_jsonl, caplog):
    plain, thinking = (
        config(write_jsonl(rows(3)), thoughts="train"),
        chat_row("add", "<|channel>thought\nx\n<channel|>5"),
    )
    build_data(plain, tokenizer)
    assert "no answer contains a thought" in caplog.text
    caplog.clear()
    build_data(config(write_jsonl([thinking]), thoughts="train"), tokenizer)
    assert "no answer contains a thought" not in caplog.text


CODEV_ANSWER = "<think>x</think><answer>```sv\nmodule a;\nendmodule\n```</answer>"


def codev_config(write_jsonl, *responses):
    path = write_jsonl([{"system": "s", "prompt": "p", "response": response} for response in responses])
    return config(path, format="codev_r1", sequence_length=256, max_drop_fraction=0.9)


def test_codev_rows(tiny_tokenizer, write_jsonl):
    built = build_data(codev_config(write_jsonl, CODEV_ANSWER, "<think>never"), tiny_tokenizer)
    assert {reason: drop.count for reason, drop in built.train_report.dropped.items()} == {"unclosed_think": 1}
    ids, flags = built.train.example(0)
    assert tiny_tokenizer.decode(ids[flags]) == "```verilog\nmodule a;\nendmodule\n```<turn|>"


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="Icarus Verilog is not installed")
def test_codev_rows_that_do_not_compile(tiny_tokenizer, write_jsonl):
    data = codev_config(write_jsonl, CODEV_ANSWER, CODEV_ANSWER.replace("a;", "a b c;"))
    assert build_data(data, tiny_tokenizer).train_report.rows_dropped == 0
    data.check_syntax = True
    dropped = build_data(data, tiny_tokenizer).train_report.dropped
    assert {reason: drop.count for reason, drop in dropped.items()} == {"syntax_error": 1}


def test_rows_that_become_an_example_for_each_answer_are_counted(tiny_tokenizer, write_jsonl):
    """The prompt's empty thought is not in earlier turns: the second prompt does not begin with the first example."""
    turns = [("user", "add 1 2"), ("assistant", "3"), ("user", "and 1"), ("assistant", "4")]
    several = {"messages": [{"role": role, "content": text} for role, text in turns]}
    built = build_data(config(write_jsonl([several, *rows(2)])), tiny_tokenizer)
    told = built.to_json()["train"]
    assert (told["rows_split"], told["rows_kept"], told["examples"]) == (1, 3, 4)
    assert told["length_tokens"]["max"] >= told["length_tokens"]["p50"] > 0
    assert {"examples", "tokenizer", "chat_template"} <= told["fingerprint"].keys()


def test_embedded_rows_fit_and_are_quick_to_build(tiny_tokenizer):
    data = DataConfig(
        train=[DataSource(path="embedded:verilog_smoke/train.jsonl.gz")],
        heldout=[DataSource(path="embedded:verilog_smoke/heldout.jsonl.gz")],
    )
    started = time.process_time()
    built = build_data(data, tiny_tokenizer)
    rows_per_second = (len(built.train) + len(built.heldout)) / (time.process_time() - started)
    assert built.train_report.rows_dropped == built.heldout_report.rows_dropped == 0
    assert built.shared_prompts == 0
    assert rows_per_second > 300  # per core; about 3,000 on an idle one


def test_folders_without_a_fit_tokenizer_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == tokenizer.chat_template
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("normalizer", {"type": "Lowercase"}, "reads '.*Xy  z.*' as '.*xy  z"),
        ("normalizer", {"type": "NFKC"}, "as 'é fi"),
        ("normalizer", {"type": "Strip", "strip_left": True, "strip_right": True}, "as 'Xy"),
        ("normalizer", {"type": "Prepend", "prepend": " "}, "as '<.turn> Xy"),
        ("model", {"dropout": 0.1}, "draws its tokens by chance"),
    ],
)
def test_a_tokenizer_that_changes_texts_is_refused(tmp_path, part, change, words):
    """Its rows would be trained in another spelling than a server's answers are read in."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "tiny" / name, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content[part] = {**(content[part] or {}), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=f"{words}.*model.tokenizer="):
        load_tokenizer(str(tmp_path))


def test_tokenizer_from_a_remote_folder(tiny_tokenizer):
    import fsspec

    from gemma4_tpu import assets

    store = fsspec.filesystem("memory")
    store.put(assets.resolve("embedded:tiny"), "/models/tiny", recursive=True)
    assert load_tokenizer("memory://models/tiny").get_vocab() == tiny_tokenizer.get_vocab()


def test_building_data_brings_no_jax():
    script = "import sys; import gemma4_tpu.data.build, gemma4_tpu.data.pipeline, gemma4_tpu.reporting.preview; "
    done = subprocess.run(
        [sys.executable, "-c", script + "print('jax' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
