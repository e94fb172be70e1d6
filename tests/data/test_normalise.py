"""Rows in the forms that people have: what each becomes, what is said about it, and what is refused or dropped."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.examples import Origin
from gemma4_tpu.data.forms import FORMS, Conversation
from gemma4_tpu.data.normalise import Normalised, Normaliser
from gemma4_tpu.data.readers import RawRow
from gemma4_tpu.errors import UserError

ASK = {"role": "user", "content": "add 1 2"}
ANSWER = {"role": "assistant", "content": "3"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"c": "Oslo"}}}],
}
RESULT = {"role": "tool", "content": "4", "name": "w"}
TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}


def read(row, columnar=False, form="auto", columns=None):
    """(conversation, form, notes)"""
    done = Normalised()
    raw = RawRow(Origin("rows.jsonl", 1), row, columnar=columnar)
    normaliser = Normaliser(form, columns or {}, done)
    normaliser.begin("rows.jsonl", [raw])
    made = normaliser(raw)
    return made, next(iter(done.forms)), dict(done.notes)


def dropped(row, **options):
    with pytest.raises(RowDropped) as caught:
        read(row, **options)
    return caught.value.reason


def answer(**keys):
    """The assistant's turn that a row with one such turn becomes."""
    return read({"messages": [ASK, {"role": "assistant", **keys}]})[0].messages[1]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [ASK, ANSWER]}, "chat"),
        ({"messages": json.dumps([ASK, ANSWER])}, "chat"),
        ({"messages": json.dumps(json.dumps([ASK, ANSWER]))}, "chat"),
        ({"messages": [json.dumps(ASK), json.dumps(ANSWER)]}, "chat"),
        ({"messages": {"role": ["user", "assistant"], "content": ["add 1 2", "3"]}}, "chat"),
        ({"prompt": "x", "prompt_id": "7", "messages": [ASK, ANSWER]}, "chat"),
        ({"conversations": [{"from": "human", "value": "add 1 2"}, {"from": "gpt", "value": "3"}]}, "sharegpt"),
        ({"conversations": [ASK, ANSWER]}, "sharegpt"),
        ({"messages": [{"role": "Human", "content": "add 1 2"}, {"role": "model", "content": "3"}]}, "chat"),
        ({"instruction": "add 1 2", "output": "3"}, "alpaca"),
        ({"instruction": "add 1 2", "input": "", "output": "3", "text": "Below is …"}, "alpaca"),
        ({"instruction": "add 1 2", "context": "", "response": "3"}, "alpaca"),
        ({"prompt": "add 1 2", "completion": "3"}, "prompt_completion"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "prompt_completion"),
        ({"prompt": "add 1 2", "response": "3"}, "prompt_completion"),
        ({"question": "add 1 2", "answer": 3}, "prompt_completion"),
        ({"input": "add 1 2", "output": "3"}, "prompt_completion"),
    ],
)
def test_forms_are_recognised_by_their_keys(row, form):
    made, found, _ = read(row)
    assert (made, found) == (Conversation([ASK, ANSWER]), form)


def test_alpaca_has_its_input_behind_the_instruction_and_its_history_before():
    row = {"instruction": "add", "input": "1 2", "output": "3", "history": [["hi", "hello"]], "system": "be brief"}
    assert [turn["content"] for turn in read(row)[0].messages] == ["be brief", "hi", "hello", "add\n\n1 2", "3"]


def test_text_is_for_continued_pre_training():
    assert read({"text": "once upon", "url": "x"}) == (
        Conversation([], None, "once upon"),
        "text",
        {"column 'url' not used": 1},
    )
    assert dropped({"text": " "}) == "no_text"


def test_answers_in_a_prompt_are_read_not_learnt():
    made = read({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]})[0]
    assert [turn.get("train") for turn in made.messages] == [None, False, None, None]


def test_columns_of_ones_own():
    row = {"task": "add 1 2", "reply": "3", "id": 5}
    made, form, notes = read(row, columns={"prompt": "task", "completion": "reply"})
    assert (made.messages, form, notes) == ([ASK, ANSWER], "prompt_completion", {"column 'id' not used": 1})
    for other in ({"prompt": "an id", **row}, {**row, "prompt": "an id"}):  # whatever the order of the columns
        made, _, notes = read(other, columns={"prompt": "task", "completion": "reply"})
        assert made.messages == [ASK, ANSWER]
        assert "column 'prompt' not used: data.columns names another" in notes
    turns = [{"speaker": "human", "said": "add 1 2"}, {"speaker": "bot", "said": "3"}]
    assert read({"talk": turns}, columns={"messages": "talk", "role": "speaker", "content": "said"})[0].messages == [
        ASK,
        ANSWER,
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"task": "a", "reply": "b"}, "data.columns='{prompt: task, completion: reply}'"),
        ({"talk": [ASK, ANSWER]}, "data.columns='{messages: talk}'"),
        ({"body": "a"}, "data.columns='{text: body}'"),
        ({"question": "a", "context": "b", "answer": "c"}, "{instruction: question, input: context, output: answer}"),
        ({"question": "a", "response": "long", "answer": "c"}, "keys question, response, answer"),  # either could be it
        ({"text": "a", "prompt": "b"}, "keys text, prompt"),
        ({}, "keys (none)"),
    ],
)
def test_what_cannot_be_recognised_is_refused_with_the_words_to_add(row, words):
    with pytest.raises(UserError) as caught:
        read(row)
    assert words in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl: rows with the keys ")


def test_columns_that_no_form_has_are_refused():
    with pytest.raises(UserError, match="the other way round"):
        Normaliser("auto", {"task": "prompt"}, Normalised())
    with pytest.raises(UserError, match="question_text is not a column of any form"):
        Normaliser("auto", {"question_text": "q"}, Normalised())


def test_verilog_is_cut_out_where_a_source_has_codev_markup():
    right = {
        "system": "s",
        "prompt": "p",
        "response": "<think>x</think> <answer>```verilog\nmodule a;\nendmodule\n```</answer>",
    }
    draft = {"system": "s", "prompt": "p", "response": "<think>never closed"}
    done = Normalised()
    normaliser = Normaliser("auto", {}, done)
    rows = [RawRow(Origin("c", n), row) for n, row in enumerate([draft, right])]
    normaliser.begin("c", rows)
    with pytest.raises(RowDropped, match="unclosed_think"):
        normaliser(rows[0])
    assert normaliser(rows[1]).messages[2]["content"] == "```verilog\nmodule a;\nendmodule\n```"
    assert read({"prompt": "p", "response": "an <answer>"})[1] == "prompt_completion"


@pytest.mark.parametrize(
    "keys",
    [
        {"content": "<think>two and two</think>\n4"},
        {"content": "\n<THINKING>\ntwo and two</thinking>4"},
        {"content": "two and two\n</think>\n\n4"},  # the template of the model that wrote it had opened it
        {"content": "4", "thinking": "two and two"},
        {"content": "4", "reasoning_content": "two and two", "reasoning": "two and two"},
        {"content": "<|channel>thought\ntwo and two\n<channel|>4"},
        {"content": [{"type": "thinking", "thinking": "two and two"}, {"type": "text", "text": "4"}]},
    ],
)
def test_thoughts_of_every_spelling_stand_under_one_key(keys):
    assert answer(**keys) == {"role": "assistant", "content": "4", "reasoning": "two and two"}


def test_the_indent_of_an_answer_is_its_own():
    """Code that begins indented completes its question only with its indent."""
    code = "    return 1\n    # done"
    for before in (
        "<think>why</think>\n\n",
        "<think>\nwhy\n</think>\n",
        "why\n</think> \n",
        "<|channel>why<channel|>\n",
    ):
        assert answer(content=before + code)["content"] == code
    assert answer(content="<think>why</think> 4")["content"] == "4"
    assert answer(content=code)["content"] == code


def test_parts_of_an_answer_are_joined_as_they_are():
    texts = ["Here:\n\n", "    code", " and ", "more\n"]
    made = answer(content=[{"type": "text", "text": text} for text in texts])
    assert made["content"] == "".join(texts)


def test_what_only_looks_like_a_thought_stays_text():
    in_code = 'Split it:\n```\ntext.split("\n</think>\n")\n```\nThat is all.'
    for text in ("Close it with </think> then.", "Tags: <think>x</think>", "a <|channel> b", " 4 ", in_code):
        assert answer(content=text) == {"role": "assistant", "content": text}
    assert dropped({"messages": [ASK, {"role": "assistant", "content": "<think>never closed"}]}) == "unclosed_think"


def test_finding_thoughts_is_linear():
    answer(content="<|channel>" * 100_000)  # quadratic ways take minutes
    answer(content="<think></think>" * 50_000 + "4")


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{"function": {"name": "w", "arguments": {"c": "Oslo"}}}]},
        {"tool_calls": [{"type": "function", "function": {"name": "w", "arguments": '{"c": "Oslo"}'}}]},
        {"tool_calls": json.dumps([{"function": {"name": "w", "arguments": {"c": "Oslo"}}}])},
        {"tool_calls": [{"name": "w", "arguments": {"c": "Oslo"}}]},
        {"tool_calls": {"name": "w", "arguments": '"{\\"c\\": \\"Oslo\\"}"'}},
        {"function_call": {"name": "w", "arguments": '{"c": "Oslo"}'}, "content": None},
    ],
)
def test_calls_in_every_spelling(calls):
    assert answer(**calls) == CALL


def test_calls_and_results_of_sharegpt():
    turns = [
        {"from": "human", "value": "add 1 2"},
        {"from": "function_call", "value": '{"name": "w", "arguments": {"c": "Oslo"}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "3"},
    ]
    made, _, notes = read({"conversations": turns, "tools": json.dumps([TOOL["function"]])})
    assert made == Conversation([ASK, CALL, {"role": "tool", "content": "4"}, ANSWER], [TOOL])
    assert notes["bare functions wrapped as tools"] == notes["tools given as a JSON string"] == 1


def test_arguments_that_are_empty_and_results_that_are_objects():
    for nothing in ("", None, {}, "{}"):
        assert answer(tool_calls=[{"id": 7, "function": {"name": "w", "arguments": nothing}}])["tool_calls"] == [
            {"id": "7", "type": "function", "function": {"name": "w", "arguments": {}}}
        ]
    made = read({"messages": [ASK, CALL, {"role": "tool", "tool_call_id": "1", "content": {"t": None}}, ANSWER]})[0]
    assert made.messages[2] == {"role": "tool", "content": '{"t": null}', "tool_call_id": "1"}


def test_nulls_of_tables_go_at_every_depth_and_those_of_json_stay():
    function = {"name": "w", "arguments": {"c": "Oslo", "zone": None}}
    row = {
        "messages": [ASK, {**CALL, "tool_calls": [{"type": "function", "function": function}], "name": None}],
        "tools": None,
    }
    made, _, notes = read(row, columnar=True)
    assert made.messages[1] == CALL
    assert notes == {"nulls in place of absent keys removed": 1}
    made, _, notes = read(row)
    assert made.messages[1]["tool_calls"][0]["function"]["arguments"] == {"c": "Oslo", "zone": None}
    assert notes == {}


@pytest.mark.parametrize(
    ("keys", "train"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"weight": 1, "train": True}, True),
        ({"training": False}, False),
        ({"trainable": False}, False),
        ({"loss": False}, False),
        ({"loss_mask": 1}, True),
    ],
)
def test_loss_by_turn(keys, train):
    assert answer(content="3", **keys)["train"] is train


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({**ANSWER, "weight": 0.5}, "bad_weight"),
        ({**ANSWER, "weight": float("inf")}, "bad_weight"),
        ({**ANSWER, "train": "no"}, "bad_weight"),
        ({**ANSWER, "train": True, "weight": 0}, "bad_weight"),
        ({**ASK, "train": True}, "bad_weight"),
        ({**ANSWER, "mask": True}, "bad_weight"),
        ({**ANSWER, "training_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "bad_weight"),
        ({**ANSWER, "tool_calls": 5}, "bad_tool_call"),
        ({**ANSWER, "tool_calls": [{"name": "w", "parameters": {"c": "Oslo"}}]}, "bad_tool_call"),
        ({**ANSWER, "tool_calls": [{"name": "w", "arguments": "Oslo"}]}, "bad_tool_call"),
        ({**ASK, "tool_calls": CALL["tool_calls"]}, "bad_tool_call"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "bad_content"),
        ({"role": "user"}, "bad_content"),
        ({"role": "wizard", "content": "x"}, "bad_role"),
        (["user", "hi"], "bad_role"),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_understood_are_dropped(turn, reason):
    assert dropped({"messages": [ASK, turn]}) == reason


def test_what_was_done_is_said_in_numbers(write_jsonl, tiny_tokenizer):
    rows = [
        {"id": n, "conversations": [{"from": "human", "value": f"q {n}", "lang": "en"}, {"from": "gpt", "value": "a"}]}
        for n in range(3)
    ]
    data = DataConfig(train=[DataSource(path=write_jsonl(rows))])
    told = build_data(data, tiny_tokenizer).told()
    assert told == [
        "rows read: 3 as sharegpt",
        "role human read as user: 3 rows",
        "key 'lang' of user turns left out: 3 rows",
        "role gpt read as assistant: 3 rows",
        "column 'id' not used: 3 rows",
    ]


# ── whatever JSON puts in the place of what belongs there: an example, or a counted drop ─────────────────────────────
DOCUMENTED = [
    {"messages": [ASK, ANSWER]},
    {"messages": [ASK, {**CALL, "id": "c"}, RESULT, {**ANSWER, "reasoning": "why", "weight": 1}], "tools": [TOOL]},
    {"messages": [{"role": "system", "content": [{"type": "text", "text": "x"}]}, ASK, {**ANSWER, "train": True}]},
    {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "tools": "[]"},
    {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"prompt": "a", "completion": "b"},
    {"prompt": [ASK], "completion": [ANSWER]},
    {"question": "a", "answer": "b"},
    {"text": "a"},
]  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TRICKY = [
    "", "null", "[]", "{}", '{"role": "user"}', "<think>", "<turn|>", "\ud800", '"\\ud800"', 10**400, [[]], {"": {}},
    json.loads('{"a":' * 900 + "1" + "}" * 900), "[" * 2000, '{"a":' * 2000,
]  # fmt: skip
ODD = st.one_of(
    LEAVES,
    st.sampled_from(TRICKY),
    st.sampled_from(DOCUMENTED),
    st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3)),
)


def places(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def changed(value, path, odd):
    if not path:
        return odd
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], odd)
    return copy


MUTANTS = st.sampled_from(DOCUMENTED).flatmap(
    lambda row: st.tuples(st.sampled_from([path for path in places(row) if path]), ODD).map(
        lambda made: changed(row, *made)
    )
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(MUTANTS, min_size=1, max_size=12), st.booleans())
def test_any_value_in_any_place_is_an_example_or_a_counted_drop(tiny_tokenizer, monkeypatch, rows, columnar):
    from gemma4_tpu.data import sources

    def read_file(stream, name):
        return (RawRow(Origin(name, n), row, columnar=columnar) for n, row in enumerate([*DOCUMENTED, *rows], 1))

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_file", read_file)
        data = DataConfig(train=[DataSource(path="embedded:verilog_smoke/train.jsonl.gz")], max_drop_fraction=1.0)
        built = build_data(data, tiny_tokenizer)
    report = built.train_report
    assert report.rows_read == len(DOCUMENTED) + len(rows)
    assert report.rows_read - report.rows_kept == sum(drop.count for drop in report.dropped.values())
    assert "too_slow" not in report.dropped
    assert len(built.train) >= report.rows_kept > 0


def test_every_form_can_be_named():
    from gemma4_tpu.data.checks import CHOICES

    assert {"data.format": ("auto", *FORMS)} == CHOICES
    assert read({"messages": [ASK, ANSWER], "text": "once"}, form="text")[0].text == "once"
    with pytest.raises(UserError, match=r"match no known form \(data\.format=chat\)"):
        read({"prompt": "add 1 2", "completion": "3"}, form="chat")


def test_speakers_of_every_name_are_the_four_roles():
    call = json.dumps(CALL["tool_calls"][0]["function"])
    turns = [("developer", "be brief"), ("prompter", "add 1 2"), ("bot", "3"), ("user", "w?"), ("tool_call", call),
             ("function", "4"), ("chatgpt", "4")]  # fmt: skip
    made = read({"conversations": [{"from": role, "value": text} for role, text in turns]})[0].messages
    assert [turn["role"] for turn in made] == ["system", "user", "assistant", "user", "assistant", "tool", "assistant"]
    assert made[4]["tool_calls"] == CALL["tool_calls"]


NAN = float("nan")
TWO_CALLS = [{"function": {"name": name, "arguments": {}}} for name in ("w", "v")]


def test_what_pandas_writes_for_a_missing_cell_is_absent():
    made, form, notes = read({"instruction": "add 1 2", "input": NAN, "output": "3"})
    assert (made.messages, form) == ([ASK, ANSWER], "alpaca")
    assert "NaN in place of absent columns removed" in notes
    assert dropped({"prompt": "add", "completion": NAN}) == "no_response"
    table = {"messages": [{**ASK, "weight": NAN}, {**ANSWER, "weight": 1.0}]}
    assert read(table, columnar=True)[0].messages == [ASK, {**ANSWER, "train": True}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": {"c": [float("inf")]}}}]}
    assert dropped({"messages": [ASK, call]}) == "bad_tool_call"


@pytest.mark.parametrize("column", ["image", "images", "audio", "videos"])
def test_rows_about_what_the_model_does_not_see_are_dropped(column):
    assert dropped({"messages": [ASK, ANSWER], column: ["a.jpg"]}) == "bad_content"
    assert read({"messages": [ASK, ANSWER], column: []})[0].messages == [ASK, ANSWER]


@pytest.mark.parametrize("ids", [("1", "2"), (None, None)])
@pytest.mark.parametrize("names", [(None, None), ("w", "v"), ("v", "w")])
def test_each_response_is_given_to_its_call(ids, names):
    """Templates find a response's name by id; without ids every response would bear the last call's name."""
    calls = [call | ({"id": i} if i else {}) for call, i in zip(TWO_CALLS, ids, strict=True)]
    given = [{"role": "tool", "content": "4"} | ({"name": name} if name else {}) for name in names]
    turns = read({"messages": [ASK, {"role": "assistant", "tool_calls": calls}, *given, ANSWER]})[0].messages
    name_of = {call["id"]: call["function"]["name"] for call in turns[1]["tool_calls"]}
    assert tuple(name_of[turn["tool_call_id"]] for turn in turns[2:4]) == tuple(
        n or d for n, d in zip(names, "wv", strict=True)
    )


def test_calls_written_as_text_are_named_where_a_response_follows():
    """Hermes's rows: as text, the call would be trained on, and the response lost."""
    said = {"from": "gpt", "value": '<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call>'}
    turns = [{"from": "human", "value": "w?"}, said, {"from": "tool", "value": "4"}, {"from": "gpt", "value": "4."}]
    with pytest.raises(RowDropped, match=r"bad_tool_call: turn 2: .*write <tool_call> as tool_calls"):
        read({"conversations": turns})


def test_a_response_to_a_call_that_is_not_there_is_dropped():
    calls = {"role": "assistant", "tool_calls": [TWO_CALLS[0] | {"id": "1"}]}
    turns = [ASK, calls, {"role": "tool", "tool_call_id": "9", "content": "4"}, ANSWER]
    assert dropped({"messages": turns}) == "bad_tool_call"


def test_responses_in_the_turn_of_their_calls_get_turns_of_their_own():
    native = {
        "role": "assistant", "tool_calls": CALL["tool_calls"], "reasoning": "look",
        "tool_responses": [{"name": "w", "response": "4"}], "content": "3",
    }  # fmt: skip
    made = read({"messages": [ASK, native]})[0].messages
    assert made == [ASK, {**CALL, "reasoning": "look"}, RESULT, ANSWER]
    assert dropped({"messages": [ASK, {**native, "tool_responses": ["4"]}]}) == "bad_tool_call"


@pytest.mark.parametrize(
    "content",
    [
        "if a < b, 3\n</think>\n\n3",
        "<|begin_of_thought|>\nif a < b, 3\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n3\n<|end_of_solution|>",
    ],
)
def test_thoughts_of_other_models_templates_are_no_answers(content):
    made = answer(content=content)
    assert (made["content"].strip(), made["reasoning"]) == ("3", "if a < b, 3")


def test_turns_of_prompt_and_completion_as_json_text():
    made = read({"prompt": json.dumps([ASK]), "completion": json.dumps([ANSWER])})[0]
    assert made.messages == [ASK, ANSWER]
    for text in ("[1, 2]", "[x]", '[{"a": 1}]'):
        assert read({"prompt": text, "completion": "3"})[0].messages[0]["content"] == text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "7", "query": "q", "answers": "a", "tools": "[]"}, "{prompt: query, completion: answers}"),
        ({"id": "7", "data": ["q", "a"]}, "{messages: data}"),
        ({"text": "hi", "role": "user", "message_id": "7"}, "are single turns (of one role)"),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "data.format=prompt_completion"),
    ],
)
def test_what_could_mean_several_things_is_never_guessed(row, words):
    with pytest.raises(UserError, match="rows") as refused:
        read(row)
    assert words in str(refused.value)


def test_a_schema_under_another_name_is_no_tool_without_parameters():
    tool = {"name": "w", "description": "d", "input_schema": {"type": "object"}}
    assert dropped({"messages": [ASK, ANSWER], "tools": [tool]}) == "bad_tool_call"


def test_refused_turns_say_what_they_hold():
    for turn, reason in (({"from": "human", "text": "q"}, "bad_content"), ({"input": "q"}, "bad_role")):
        with pytest.raises(RowDropped, match=f"{reason}.*the keys .*(text|input).*data.columns"):
            read({"conversations": [turn]})


@pytest.mark.parametrize(
    "content", ["so 3</think>3", "Well. <think>so</think> 3", '<tool_call>\n{"name": "w"}\n</tool_call>']
)
def test_markup_that_stays_text_is_told(content):
    made, _, notes = read({"messages": [ASK, {**ANSWER, "content": content}]})
    assert made.messages[1]["content"] == content
    assert "tags of thoughts or calls left in an answer, as text" in notes


def test_what_is_told_of_a_row_can_be_written_to_a_log():
    """Half of a surrogate pair is legal in Python's texts, and in no file."""
    problem = RowDropped("unknown_form", "keys: \ud800")
    assert str(problem).encode() == b"unknown_form: keys: \\ud800"
    done = Normalised()
    done.add("chat", ["key '\udfff' left out"])
    assert "\n".join(done.lines()).encode()


def test_completions_that_are_labelled_bad_are_not_learnt():
    row = {"prompt": "add 1 2", "completion": "3"}
    assert read({**row, "label": True})[0].messages == [ASK, ANSWER]
    assert read({**row, "label": "arithmetic"})[0].messages == [ASK, ANSWER]
    for column in ("label", "kto_tag", "weight", "train"):
        for bad in (False, 0, "False"):
            assert dropped({**row, column: bad}) == "no_target"
            assert dropped({"messages": [ASK, ANSWER], column: bad}) == "no_target"
    assert read({"text": "a film that I did not like", "label": 0})[1] == "text"


def test_a_key_twice_in_json_text_within_a_row_is_found():
    """Python keeps the last one."""
    turns = '[{"role": "user", "content": "add 1 2"}, {"role": "assistant", "content": "3", "content": "4"}]'
    assert dropped({"messages": turns}) == "invalid_json"
    assert dropped({"prompt": "add 1 2", "completion": turns}) == "invalid_json"
    call = {"function": {"name": "w", "arguments": '{"c": "Oslo", "c": "Rome"}'}}
    assert dropped({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}) == "invalid_json"


def test_json_text_of_other_things_than_turns_is_a_text():
    for text in ('[{"from": "Oslo", "to": "Rome"}]', '[{"role": "admin", "id": 1, "id": 1}]', "[1, 2]"):
        assert read({"prompt": text, "completion": "3"})[0].messages[0]["content"] == text


def test_rows_inside_of_a_list_are_refused_with_the_list():
    with pytest.raises(UserError, match=r"of the form prompt_completion\) are inside of data"):
        read({"version": 1, "data": [{"prompt": "add 1 2", "completion": "3"}]})
