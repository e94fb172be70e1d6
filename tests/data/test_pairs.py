"""Pairs of a chosen and a rejected answer: the forms they come in, what is dropped, and how they lie in rows."""

import io

import numpy as np
import pytest
from rich.console import Console

from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.forms import CONVERSATIONS, PAIRS
from gemma4_tpu.data.pipeline import Pipeline
from gemma4_tpu.errors import UserError
from gemma4_tpu.reporting import preview
from tests.data.conftest import chat_row

SYSTEM, ASK = {"role": "system", "content": "be brief"}, {"role": "user", "content": "add two and three"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("sum is 5", "sum is 7"))
EARLIER = [{"role": "user", "content": "add x"}, {"role": "assistant", "content": "ok"}]


def build(path, tokenizer, rows_are=PAIRS, **options):
    options = {"sequence_length": 64, "max_drop_fraction": 1.0, **options}
    return build_data(DataConfig(train=[DataSource(path=path)], **options), tokenizer, rows_are)


def texts(examples, tokenizer, index=0):
    """(all of it, what carries loss) of each sequence of an example."""
    return [(tokenizer.decode(ids), tokenizer.decode(ids[flags])) for ids, flags in examples.sequences(index)]


def test_the_forms_of_pairs_say_the_same(tokenizer, write_jsonl):
    rows = [
        {"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},  # the prompt is what both begin with
        {"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": ASK["content"], "system": "be brief", "chosen": GOOD["content"], "rejected": BAD["content"]},
        {"question": ASK["content"], "system": "be brief", "chosen": "sum is 5", "rejected": "sum is 7"},
        {"prompt": "add two and three", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD], "score": 3},
    ]
    built = build(write_jsonl(rows), tokenizer).train
    pairs = [texts(built, tokenizer, index) for index in range(len(rows))]
    assert all(pair == pairs[0] for pair in pairs)
    (_, chosen_loss), (rejected, rejected_loss) = pairs[0]
    assert chosen_loss.replace(" ", "") == "sumis5<turn|>" and rejected_loss.replace(" ", "") == "sumis7<turn|>"
    (alone,) = texts(build(write_jsonl([{"messages": rows[0]["rejected"]}]), tokenizer, CONVERSATIONS).train, tokenizer)
    assert alone == (rejected, rejected_loss)  # proven and trained as a conversation of its own would be


def test_answers_of_the_prompt_carry_no_loss(tokenizer, write_jsonl):
    row = {"chosen": [*EARLIER, ASK, GOOD], "rejected": [*EARLIER, ASK, BAD]}
    built = build(write_jsonl([row]), tokenizer, sequence_length=128).train
    (_, chosen), (_, rejected) = texts(built, tokenizer)
    assert chosen.replace(" ", "") == "sumis5<turn|>" and rejected.replace(" ", "") == "sumis7<turn|>"


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": "add x", "chosen": "ok", "rejected": "ok"}, "equal_sides", ""),
        ({"prompt": "add x", "chosen": "ok", "rejected": "ok "}, "equal_sides", "once they are rendered"),
        ({"chosen": [ASK, GOOD], "rejected": [EARLIER[0], BAD]}, "different_prompts", "after 0 turns"),
        ({"chosen": [ASK, GOOD, ASK], "rejected": [ASK, GOOD, *EARLIER]}, "different_prompts", "a user turn"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "different_prompts", "rejected ends"),
        ({"prompt": "add x", "chosen": "ok", "rejected": ""}, "no_response", ""),
        ({"chosen": "ok", "rejected": "no"}, "no_prompt", ""),
        ({"prompt": "add x", "chosen": "ok", "rejected": "<eos>"}, "control_token", "rejected: message 1"),
        ({"prompt": "add x", "chosen": "ok", "rejected": "a " * 60}, "too_long", "tokens"),
    ],
)  # fmt: skip
def test_a_pair_is_dropped_and_counted_where_a_side_fails(tokenizer, write_jsonl, row, reason, detail):
    fine = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    report = build(write_jsonl([fine, row]), tokenizer).train_report
    assert (report.rows_kept, list(report.dropped)) == (1, [reason])
    assert detail in report.dropped[reason].examples[0] and "rows.jsonl:2" in report.dropped[reason].examples[0]


def test_a_side_that_would_take_several_examples_is_dropped(tokenizer, write_jsonl):
    """The stock template shows past answers otherwise than they are generated: no single sequence holds two."""
    row = {"chosen": [ASK, GOOD, *EARLIER], "rejected": [ASK, BAD]}
    path = write_jsonl([{"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, row])
    report = build(path, tokenizer).train_report
    assert "chosen: 2 examples" in report.dropped["split_side"].examples[0]
    (_, chosen), (_, rejected) = texts(build(path, tokenizer, train_on="last").train, tokenizer, 1)
    assert chosen.replace(" ", "") == "ok<turn|>" and rejected.replace(" ", "") == "sumis7<turn|>"


def test_both_sides_share_a_row_whatever_the_packing(tokenizer, write_jsonl):
    rows = [{"prompt": "add x" + " y" * i, "chosen": "ok" + " a" * (i % 3), "rejected": "why"} for i in range(9)]
    built = build(write_jsonl(rows), tokenizer).train
    for packing in ("true", "false", "buckets"):
        data = DataConfig(sequence_length=64, packing=packing)
        seen = []
        for update in Pipeline(examples=built, data=data, rows_per_update=2, seed=0, epochs=1):
            for row, members in enumerate(update.rows[0]):
                ids = update.arrays["segment_ids"][0, row]
                assert ids.max() == 2 * len(members)
                for place, index in enumerate(members):
                    for side, (tokens, flags) in enumerate(built.sequences(index)):
                        at = ids == 2 * place + side + 1
                        np.testing.assert_array_equal(update.arrays["tokens"][0, row, at], tokens[:-1])
                        np.testing.assert_array_equal(update.arrays["target_mask"][0, row, at], flags[1:])
                        assert update.arrays["positions"][0, row, at].tolist() == list(range(len(tokens) - 1))
                seen += members
            assert update.real_tokens == np.count_nonzero(update.arrays["segment_ids"])
            assert update.target_tokens == np.count_nonzero(update.arrays["target_mask"])
        assert sorted(seen) == list(range(9))
    lengths = [len(ids) - 1 for index in (3, 1) for ids, _ in built.sequences(index)]
    assert built.lengths([3, 1]).tolist() == lengths


def test_pairs_of_one_prompt_are_held_out_together(tokenizer, write_jsonl):
    rows = [{"prompt": f"add {'x ' * (i % 5)}y", "chosen": "ok " + "a " * i, "rejected": "why"} for i in range(20)]
    built = build(write_jsonl(rows), tokenizer, heldout_fraction=0.3)
    assert built.shared_prompts == 0 and len(built.heldout) % 4 == 0 and len(built.heldout) + len(built.train) == 20


def test_rows_of_another_kind_are_refused_with_the_objective_that_takes_them(tokenizer, write_jsonl):
    with pytest.raises(UserError, match=r"of the form preference are pairs, .* takes conversations; .*objective=dpo"):
        build(write_jsonl([{"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}]), tokenizer, CONVERSATIONS)
    with pytest.raises(UserError, match=r"of the form chat are conversations, but this run takes pairs.*objective=sft"):
        build(write_jsonl([chat_row("add x", "ok")]), tokenizer)
    rows = [{"task": "add x", "better": "ok", "worse": "why"}]
    with pytest.raises(UserError, match=r"are not pairs: .*data.columns='\{prompt: …, chosen: …, rejected: …\}'"):
        build(write_jsonl(rows), tokenizer)
    named = build(write_jsonl(rows), tokenizer, columns={"prompt": "task", "chosen": "better", "rejected": "worse"})
    assert len(named.train) == 1


def test_the_preview_shows_both_sides(tiny_tokenizer, write_jsonl):
    path = write_jsonl([{"prompt": "Invert a.", "chosen": "assign y = ~a;", "rejected": "No."}])
    data, out = DataConfig(train=[DataSource(path=path)], sequence_length=128), io.StringIO()
    built, console = build_data(data, tiny_tokenizer, PAIRS), Console(file=out, highlight=False)
    preview.preview(built, data, tiny_tokenizer, rows_per_update=2, seed=0, console=console)
    text = out.getvalue()
    assert "1 training pairs" in text
    chosen, rejected = text.split("rejected, ")
    assert "⟦assign y = ~a;<turn|>⟧" in chosen.partition("chosen, ")[2] and "⟦No.<turn|>⟧" in rejected
