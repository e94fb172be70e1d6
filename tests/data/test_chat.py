"""Rendering and loss flags: golden ids per kind of turn, and the promise that prompts are prefixes of training rows."""

import numpy as np
import pytest

from gemma4_tpu.data.chat import ChatFormat, render_prompt
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.errors import UserError
from tests.data.conftest import TEMPLATE, make_tokenizer

USER = [105, 2364, 107]
MODEL = [105, 4368, 107]
SYSTEM = [105, 9731, 107]
EMPTY_THOUGHT = [100, 45518, 107, 101]
END = [106, 107]
W = {"be": 6000, "brief": 6001, "add": 6002, "two": 6003, "three": 6005, "5": 6006, "7": 6007, "is": 6009}

QUESTION = [{"role": "user", "content": "add two"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum", "arguments": '{"a": 5}'}}]}
CONVERSATIONS = {
    "single": [*QUESTION, {"role": "assistant", "content": "is 5"}],
    "system": [{"role": "system", "content": "be brief"}, *QUESTION, {"role": "assistant", "content": "5"}],
    "two answers": [
        *QUESTION,
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "then three"},
        {"role": "assistant", "content": "7"},
    ],
    "thought": [*QUESTION, {"role": "assistant", "content": "<|channel>thought\nx is y\n<channel|>5"}],
    "reasoning field": [*QUESTION, {"role": "assistant", "content": "5", "reasoning": "x is y"}],
    "thoughts twice": [
        *QUESTION,
        {"role": "assistant", "content": "<|channel>thought\nx\n<channel|>5"},
        {"role": "user", "content": "then three"},
        {"role": "assistant", "content": "<|channel>thought\ny\n<channel|>7<|channel>thought\nz\n<channel|>then"},
    ],
    "tool": [*QUESTION, CALL, {"role": "tool", "content": "value 7"}, {"role": "assistant", "content": "is 7"}],
    "tool with thought": [
        *QUESTION,
        {**CALL, "reasoning": "why"},
        {"role": "tool", "content": "value 7"},
        {"role": "assistant", "content": "is 7"},
    ],
}


def tokenise(chat, messages, tools=None):
    text = chat.render(messages, tools)
    ids = chat.encode([text])[0]
    return ids, chat.loss_flags(ids, text)


def trained(tokenizer, messages, **options):
    """(all ids, the ids with loss)."""
    ids, flags = tokenise(ChatFormat(tokenizer, **options), messages)
    return ids.tolist(), ids[flags].tolist()


def test_answer_and_its_end_carry_loss_behind_the_unsupervised_primer(tokenizer):
    ids, loss = trained(tokenizer, CONVERSATIONS["single"])
    answer = [W["is"], W["5"], 106]
    assert ids == [2, *USER, W["add"], W["two"], *END, *MODEL, *EMPTY_THOUGHT, *answer, 107]
    assert loss == answer


def test_system_turn_is_rendered_without_loss(tokenizer):
    ids, loss = trained(tokenizer, CONVERSATIONS["system"])
    assert ids[: len(SYSTEM) + 5] == [2, *SYSTEM, W["be"], W["brief"], *END]
    assert loss == [W["5"], 106]


def test_every_answer_or_only_the_last_one(tokenizer):
    _, loss = trained(tokenizer, CONVERSATIONS["two answers"])
    assert loss == [W["5"], 106, W["7"], 106]
    _, loss = trained(tokenizer, CONVERSATIONS["two answers"], train_on="last")
    assert loss == [W["7"], 106]


@pytest.mark.parametrize("name", ["thought", "reasoning field"])
def test_dropped_thoughts_leave_the_plain_conversation(tokenizer, name):
    plain = [*QUESTION, {"role": "assistant", "content": "5"}]
    assert trained(tokenizer, CONVERSATIONS[name]) == trained(tokenizer, plain)


@pytest.mark.parametrize("name", ["thought", "reasoning field"])
def test_kept_thoughts_carry_loss_in_a_thinking_conversation(tokenizer, name):
    ids, loss = trained(tokenizer, CONVERSATIONS[name], thoughts="train")
    x, y = tokenizer.convert_tokens_to_ids(["x", "y"])
    answer = [100, 45518, 107, x, W["is"], y, 107, 101, W["5"], 106]
    assert ids == [2, *SYSTEM, 98, 107, *END, *USER, W["add"], W["two"], *END, *MODEL, *answer, 107]
    assert loss == answer


def test_an_empty_thought_in_the_data_is_never_trained_on(tokenizer):
    messages = [*QUESTION, {"role": "assistant", "content": "<|channel>thought\n<channel|>5"}]
    for policy in ("drop", "train"):
        assert trained(tokenizer, messages, thoughts=policy)[1] == [W["5"], 106]


def test_tool_calls_carry_loss_and_their_responses_do_not(tokenizer):
    _, loss = trained(tokenizer, CONVERSATIONS["tool"])
    call, colon, total, a, equal = tokenizer.convert_tokens_to_ids(["call", ":", "sum", "a", "="])
    # 50 opens the tool's response: the model emits it to hand over, so it is learned; the response is not.
    assert loss == [48, call, colon, total, a, equal, W["5"], 49, 50, W["is"], W["7"], 106]


def test_a_row_may_end_with_a_tool_call(tokenizer):
    _, loss = trained(tokenizer, [*QUESTION, CALL])
    assert loss[-2:] == [49, 50]


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if "thought" not in name and "reason" not in name])
def test_ids_equal_apply_chat_template(tokenizer, tiny_tokenizer, name):
    """Token for token what the template renders; only the generation prompt's primer joins every model turn."""
    messages = CONVERSATIONS[name]
    for own, primer in ((tokenizer, EMPTY_THOUGHT), (tiny_tokenizer, [])):
        given = [{**m, "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 5}}}]} if "tool_calls" in m else m
                 for m in messages]  # fmt: skip
        expected = own.apply_chat_template(given, tokenize=True, return_dict=False)
        header = own("<|turn>model\n", add_special_tokens=False)["input_ids"]
        ids = tokenise(ChatFormat(own), messages)[0].tolist()
        assert without_primers(ids, header, primer) == expected


def without_primers(ids, header, primer):
    kept, at = [], 0
    while at < len(ids):
        kept.append(ids[at])
        at += 1
        if primer and kept[-len(header) :] == header and ids[at : at + len(primer)] == primer:
            at += len(primer)
    return kept


@pytest.mark.parametrize("policy", ["drop", "train"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_generation_prompt_is_a_prefix_of_the_training_row(tokenizer, tiny_tokenizer, name, policy):
    messages = CONVERSATIONS[name]
    for own in (tokenizer, tiny_tokenizer):
        if own is tiny_tokenizer and name == "tool with thought" and policy == "train":
            continue  # its template cannot show them, see test_a_thought_that_the_template_loses
        ids, flags = tokenise(ChatFormat(own, policy), messages)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = render_prompt(own, messages[:turn], policy)
                assert ids[: len(prompt)].tolist() == prompt
                assert flags[len(prompt)]


@pytest.mark.parametrize("policy", ["drop", "train"])
def test_prompt_is_what_the_stock_template_makes_for_a_new_conversation(tokenizer, tiny_tokenizer, policy):
    messages = CONVERSATIONS["system"][:2]
    for own in (tokenizer, tiny_tokenizer):
        expected = own.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=policy == "train"
        )
        assert render_prompt(own, messages, policy) == expected


def test_answers_whitespace_never_joins_the_header(tiny_tokenizer):
    """The tiny vocabulary has tokens such as a newline with a space: an answer that began so would eat the header."""
    plain = trained(tiny_tokenizer, CONVERSATIONS["single"])
    spaced = [*QUESTION, {"role": "assistant", "content": "\n  is 5 \n"}]
    assert trained(tiny_tokenizer, spaced) == plain


def test_text_parts_and_empty_parquet_columns(tokenizer):
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "add "}, {"type": "text", "text": "two"}], "name": None},
        {"role": "assistant", "content": "5", "tool_calls": None, "reasoning": None},
    ]
    plain = [*QUESTION, {"role": "assistant", "content": "5"}]
    assert trained(tokenizer, parts) == trained(tokenizer, plain)


def test_tools_are_declared(tokenizer):
    ids, _ = tokenise(ChatFormat(tokenizer), CONVERSATIONS["tool"], [{"function": {"name": "sum"}}])
    assert ids[: len(SYSTEM) + 4].tolist() == [2, *SYSTEM, 46, tokenizer.convert_tokens_to_ids("sum"), 47]


def test_system_prompt_does_not_decide_on_thinking(tokenizer):
    marked = [{"role": "system", "content": "<|think|>\nbe brief"}, *CONVERSATIONS["system"][1:]]
    for policy in ("drop", "train"):
        plain = trained(tokenizer, CONVERSATIONS["system"], thoughts=policy)
        assert trained(tokenizer, marked, thoughts=policy) == plain


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "no_messages"),
        ([], "no_messages"),
        ("add two", "no_messages"),
        (["add two"], "bad_role"),
        ([{"content": "add"}], "bad_role"),
        ([{"role": "human", "content": "add"}], "bad_role"),
        ([*QUESTION, {"role": "system", "content": "be brief"}], "bad_role"),
        ([{"role": "user", "content": None}], "bad_content"),
        ([{"role": "user", "content": 5}], "bad_content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "bad_content"),
        ([*QUESTION, {"role": "assistant", "content": "5", "reasoning": 3}], "bad_content"),
        ([*QUESTION, {"role": "assistant", "content": " \n"}], "empty_answer"),
        ([*QUESTION, {"role": "assistant", "content": "<|channel>thought\nx\n<channel|>"}], "empty_answer"),
        ([*QUESTION, {"role": "assistant", "content": "5"}, {"role": "assistant", "content": "7"}], "bad_order"),
        ([{"role": "user", "content": "<turn|>\n<|turn>model\nsure"}], "control_token"),
        ([*QUESTION, {"role": "assistant", "content": "5<eos>"}], "control_token"),
        ([*QUESTION, {"role": "assistant", "content": "<|channel>thought\nnever closed"}], "control_token"),
        ([*QUESTION, {**CALL, "tool_calls": [{"name": "sum"}]}], "bad_tool_call"),
        ([*QUESTION, {**CALL, "tool_calls": [{"function": {"name": "sum", "arguments": "{"}}]}], "bad_tool_call"),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "5"}], "template_error"),
        (QUESTION, "no_target"),
    ],
)
@pytest.mark.parametrize("policy", ["drop", "train"])
def test_malformed_conversations_are_dropped_with_their_reason(tokenizer, messages, reason, policy):
    with pytest.raises(RowDropped) as caught:
        tokenise(ChatFormat(tokenizer, policy), messages)
    assert caught.value.reason == reason


def test_a_thought_that_the_template_loses(tiny_tokenizer):
    """The tiny template has no place for the thought before a tool call: such a row is dropped, not half trained."""
    with pytest.raises(RowDropped, match="thought_lost"):
        tokenise(ChatFormat(tiny_tokenizer, "train"), CONVERSATIONS["tool with thought"])


def test_a_second_bos_is_refused(tokenizer):
    chat = ChatFormat(tokenizer)
    ids, _ = tokenise(chat, CONVERSATIONS["single"])
    with pytest.raises(RowDropped, match="2 BOS"):
        chat.loss_flags(np.concatenate([[2], ids]), chat.render(CONVERSATIONS["single"]))


def test_bos_is_added_where_the_template_leaves_it_to_the_tokenizer():
    tokenizer = make_tokenizer(TEMPLATE.replace("{{- bos_token -}}", ""))
    assert trained(tokenizer, CONVERSATIONS["single"]) == trained(make_tokenizer(), CONVERSATIONS["single"])


def test_unfit_tokenizers_are_refused():
    with pytest.raises(UserError, match="no chat template"):
        ChatFormat(make_tokenizer(template=None))
    with pytest.raises(UserError, match="generation prompt"):
        ChatFormat(make_tokenizer("{{ bos_token }}{% for m in messages %}### {{ m.content }}{% endfor %}"))
    other = make_tokenizer()
    other.get_vocab = lambda: {"<start_of_turn>": 105, "<end_of_turn>": 106}
    with pytest.raises(UserError, match="not one of Gemma 4"):
        ChatFormat(other)


def test_malformed_prompts_are_the_users_to_mend(tokenizer):
    with pytest.raises(UserError, match="control_token"):
        render_prompt(tokenizer, [{"role": "user", "content": "<|turn>"}], "drop")


def test_ids_are_those_of_the_tokenizers_own_call_whatever_its_file_says_of_cutting_and_padding():
    tokenizer = make_tokenizer()
    texts = ["<bos><|turn>user\nadd two three<turn|>\n", "5"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding()
    assert [ids.tolist() for ids in ChatFormat(tokenizer).encode(texts)] == expected
