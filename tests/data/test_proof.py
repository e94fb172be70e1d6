"""The contract on every example: what is trained is what the row says, behind what a server sends.

The oracle here shares nothing with the code: it asks the template for every prompt and compares decoded runs of ids.
"""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_tpu.assets import ROOT
from gemma4_tpu.data import markup
from gemma4_tpu.data.chat import ChatFormat
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.data.tokenizer import load_tokenizer
from tests.data import conversations as kinds

OWN = (ROOT / "tiny" / "chat_template.jinja").read_text(encoding="utf-8")
NEWEST = kinds.TEMPLATES / "31b_2026-07-09.jinja"
POLICIES = ("drop", "train")


def with_template(template):
    tokenizer = load_tokenizer("embedded:tiny")
    tokenizer.chat_template = template
    return tokenizer


def examples(chat, messages, tools=None, text=None):
    """The proven examples of a conversation; raises RowDropped."""
    made = chat.examples([chat.render(Conversation(messages, tools, text))])[0]
    if isinstance(made, RowDropped):
        raise made
    return made


def runs(example):
    """[(start, stop)] of the ids with loss."""
    edges = [0, *(i for i in range(1, len(example.ids)) if example.flags[i] != example.flags[i - 1]), len(example.ids)]
    return [(a, b) for a, b in itertools.pairwise(edges) if example.flags[a]]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def server_prompt(tokenizer, messages, tools, policy):
    """What a server encodes for these messages."""
    history = [{key: value for key, value in m.items() if key != "train"} for m in messages]
    if policy == "drop":
        history = [{key: value for key, value in m.items() if key != "reasoning"} for m in history]
    return tokenizer.apply_chat_template(
        history, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=policy == "train"
    )


def written(arguments):
    """Arguments as Gemma 4 writes them."""
    if isinstance(arguments, dict):
        items = sorted(arguments.items(), key=lambda item: item[0].lower())
        return "{" + ",".join(f"{key}:{written(value)}" for key, value in items) + "}"
    if isinstance(arguments, list):
        return "[" + ",".join(map(written, arguments)) + "]"
    return f'<|"|>{arguments}<|"|>' if isinstance(arguments, str) else json.dumps(arguments)


def expected_answer(message, policy):
    """An answer as the model has to write it."""
    made = message.get("tool_calls", [])
    blocks = [
        f"<|tool_call>call:{c['function']['name']}{written(c['function']['arguments'])}<tool_call|>" for c in made
    ]
    thought = message.get("reasoning") if policy == "train" else None
    head = f"<|channel>thought\n{thought}\n<channel|>" if thought else ""
    return head + "".join(blocks) + message["content"].strip() + ("<|tool_response>" if made else "<turn|>")


def dropped(tokenizer, name, policy):
    """Why a conversation is dropped; None: it is trained on, as it should be."""
    try:
        check(tokenizer, name, policy)
    except RowDropped as problem:
        return problem
    return None


def check(tokenizer, name, policy):
    """Every answer with loss is there once, behind the server's ids, and nothing else has loss."""
    messages, tools = kinds.ALL[name], kinds.tools_of(name)
    made = examples(ChatFormat(tokenizer, policy), messages, tools)
    wanted = [i for i, m in enumerate(messages) if i and m["role"] == "assistant" and m.get("train", True)]
    found = [(example, run) for example in made for run in runs(example)]
    assert len(found) == len(wanted)
    for number, (example, (start, stop)) in zip(wanted, found, strict=True):
        prompt = server_prompt(tokenizer, messages[:number], tools, policy)
        answer = expected_answer(messages[number], policy)
        opened = prompt.endswith(markup.THOUGHT_HEADER)
        if opened and answer.startswith(markup.THOUGHT_HEADER):
            answer = answer.removeprefix(markup.THOUGHT_HEADER)
        elif opened:
            prompt += markup.CHANNEL_END  # an empty thought, closed without loss
        assert example.ids[:start].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert decoded(tokenizer, example.ids[start:stop]) == answer
    for example in made:
        assert runs(example)[-1][1] == len(example.ids)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", kinds.ALL)
@pytest.mark.parametrize("file", [pytest.param(None, id="tiny"), *kinds.released()])
def test_every_kind_of_conversation_is_trained_as_it_is_served_or_dropped(file, name, policy):
    template = file.read_text(encoding="utf-8") if file else OWN
    may_fail = name in kinds.NO_TEMPLATE_SHOWS or (name in kinds.SOME_TEMPLATES_FAIL and file and "04" in file.stem)
    problem = dropped(with_template(template), name, policy)
    if problem is None:
        assert name not in kinds.NO_TEMPLATE_SHOWS
    else:
        assert may_fail and problem.reason == "bad_rendering", problem
        assert re.search(r"message \d|inside an open|outside of turns", problem.detail)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("file", kinds.released())
def test_googles_templates_share_examples_and_drop_rows_as_the_page_says(file, policy):
    """The table of docs/data.md: answers in each example, and which revisions lose what."""
    tokenizer = with_template(file.read_text(encoding="utf-8"))
    size, _, revision = file.stem.partition("_")

    def answers(name):
        tools = kinds.tools_of(name)
        return [one.answers for one in examples(ChatFormat(tokenizer, policy), kinds.ALL[name], tools)]

    apart = policy == "drop" and size == "31b"  # the prompt's empty thought is not in earlier turns
    assert answers("several") == ([1, 1, 1] if apart else [3])
    assert answers("one call") == ([1, 1] if apart else [2])
    assert answers("thoughts") == ([2] if policy == "drop" and not apart else [1, 1])
    lost = {name for name in kinds.SOME_TEMPLATES_FAIL if dropped(tokenizer, name, policy)}
    april = {"null arguments"} if revision.startswith("2026-04") else set()
    assert lost == april | ({"system parts"} if revision == "2026-04-13" else set())


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", kinds.ALL)
def test_the_tiny_template_behaves_as_googles_newest(name, thinking):
    if not NEWEST.is_file():
        pytest.skip(kinds.ABSENT)
    ours, theirs = with_template(OWN), with_template(NEWEST.read_text(encoding="utf-8"))
    messages = kinds.ALL[name]
    for stop in range(1, len(messages) + 1):
        for more in ({}, {"add_generation_prompt": True}):
            options = {"tools": kinds.tools_of(name), "tokenize": False, "enable_thinking": thinking, **more}
            one, other = (t.apply_chat_template(messages[:stop], **options) for t in (ours, theirs))
            assert one == other


PAST = "{%- set calls = turn.tool_calls or [] -%}"
PRIMER = "{{- '<|channel>thought\\n<channel|>' if not thinking -}}"
EMPTY_THOUGHT = "{%- if role == 'model' and not at.answering -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("primed", [True, False])
def test_an_empty_thought_that_only_the_past_shows_is_never_trained_on(primed, policy):
    template = OWN.replace(PAST, EMPTY_THOUGHT.replace("at.answering", "at.answering and not thought") + PAST)
    template = template if primed else template.replace(PRIMER, "")
    assert (PRIMER in template) == primed and EMPTY_THOUGHT[:30] in template
    for name in (*kinds.PLAIN, *kinds.WITH_TOOLS):
        check(with_template(template), name, policy)


def test_an_empty_thought_inside_of_an_answer_is_never_trained_on():
    inside = OWN.replace(SAID, "{{- answered ~ ('<|channel>thought\\n<channel|>' if calls else '') ~ said -}}")
    assert inside != OWN
    with pytest.raises(RowDropped, match=r"bad_rendering: message 1 .*its loss would be on"):
        examples(ChatFormat(with_template(inside)), kinds.WITH_TOOLS["ends with words and a call"], kinds.TOOLS)


def test_a_key_that_imitates_the_notation_of_calls_is_never_trained_on():
    chat = ChatFormat(with_template(OWN))
    for arguments in ({"a:1,b": 2}, {"x": [{"y}": 1}]}):
        with pytest.raises(RowDropped, match="bad_rendering"):
            examples(chat, [kinds.user("w?"), kinds.calls(kinds.call("weather", arguments))], kinds.TOOLS)


def test_answers_share_an_example_where_each_prompt_begins_with_all_that_stands_before():
    messages = kinds.PLAIN["several"]
    assert [e.answers for e in examples(ChatFormat(with_template(OWN), "train"), messages)] == [3]
    # The primer stands in the generation prompt only: each answer has a past of its own.
    assert [e.answers for e in examples(ChatFormat(with_template(OWN)), messages)] == [1, 1, 1]


def test_loss_on_all_answers_on_some_or_on_the_last():
    tokenizer, messages = with_template(OWN), kinds.PLAIN["ends with a question"]

    def texts(chat, turns):
        return [decoded(tokenizer, e.ids[a:b]) for e in examples(chat, turns) for a, b in runs(e)]

    several = kinds.PLAIN["several"]
    assert texts(ChatFormat(tokenizer), several) == ["hello<turn|>", "4<turn|>", "yes, 4<turn|>"]
    assert texts(ChatFormat(tokenizer, train_on="last"), several) == ["yes, 4<turn|>"]
    assert texts(ChatFormat(tokenizer, train_on="last"), messages) == ["hello<turn|>"]
    assert texts(ChatFormat(tokenizer), kinds.PLAIN["some loss"]) == ["good<turn|>"]
    for turns in ([kinds.user("hi")], [kinds.user("hi"), kinds.answer("no", train=False)]):
        with pytest.raises(RowDropped, match="no_target"):
            examples(ChatFormat(tokenizer), turns)


def test_plain_text_carries_loss_from_its_first_token_to_the_end_of_the_document():
    tokenizer = with_template(OWN)
    [example] = examples(ChatFormat(tokenizer), [], text=" Once upon\n a time.\n")
    assert decoded(tokenizer, example.ids) == "<bos> Once upon\n a time.\n<eos>"
    assert example.flags.tolist() == [False, *[True] * (len(example.ids) - 1)]
    with pytest.raises(RowDropped, match="control_token"):
        examples(ChatFormat(tokenizer), [], text="a<turn|>b")


@pytest.mark.parametrize(
    "token", ["<|turn>", "<turn|>", "<bos>", '<|"|>', "<|channel>", "<channel|>", "<|tool_response>"]
)
def test_control_tokens_are_found_wherever_they_reach_the_template(token):
    chat = ChatFormat(with_template(OWN))
    base = {
        "messages": [*kinds.WITH_TOOLS["one call"], kinds.user(kinds.parts("a"))], "tools": kinds.TOOLS,
    }  # fmt: skip
    places = list(spots(base))
    assert len(places) > 50
    for place in places:
        given = planted(base, place, f"x{token}y")
        with pytest.raises(RowDropped, match="control_token"):
            examples(chat, given["messages"], given["tools"])


def spots(value, at=()):
    """Every place of a text in a JSON value: (path, whether it is a key)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if at and key not in ("role", "content", "tool_calls", "function", "name", "arguments", "type"):
                yield (*at, key), True
            if key != "role":
                yield from spots(item, (*at, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from spots(item, (*at, number))
    elif isinstance(value, str):
        yield at, False


def planted(value, place, text):
    """The value with `text` in one place."""
    (first, *rest), is_key = place
    made = dict(value) if isinstance(value, dict) else list(value)
    if not rest and is_key:
        made[text] = made.pop(first)
    else:
        made[first] = planted(made[first], (rest, is_key), text) if rest else text
    return made


SAID = "{{- answered ~ said -}}"
TURNS = "{%- for turn in turns -%}"
END = "{{- '<turn|>\\n' -}}\n    {%- endif -%}\n  {%- endif -%}"
TOOLS_DECLARED = "{%- for tool in tools or [] -%}{{- '<|tool>'"
BREAKAGE = {
    "adds words to answers": (SAID, "{{- answered ~ said ~ (' Sure!' if said else '') -}}"),
    "adds words to questions": (SAID, "{{- answered ~ said ~ (turns | length if turn.role == 'user' else '') -}}"),
    "says everything twice": (SAID, "{{- answered ~ said ~ said -}}"),
    "loses questions": (SAID, "{{- answered ~ (said if turn.role != 'user') -}}"),
    "loses answers": (SAID, "{{- answered ~ (said if turn.role == 'user') -}}"),
    "shortens": (SAID, "{{- answered ~ said[:3] -}}"),
    "changes letters": (SAID, "{{- answered ~ (said | upper) -}}"),
    "forges a turn": ("{{- bos_token -}}", "{{- bos_token ~ '<|turn>user\\nobey<turn|>\\n' -}}"),
    "forges an answer": (TURNS, "{{- '<|turn>model\\nof course<turn|>\\n' -}}" + TURNS),
    "ends no turn": (END, "{%- endif -%}\n  {%- endif -%}"),
    "begins twice": ("{{- bos_token -}}", "{{- bos_token ~ bos_token -}}"),
    "writes outside of turns": (TURNS, "{{- 'hello' -}}" + TURNS),
    "loses the system's words": ("{{- messages[0].content | trim -}}", ""),
    "loses a tool": (TOOLS_DECLARED, TOOLS_DECLARED.replace("tools or []", "(tools or [])[1:]")),
    "loses arguments": ("fields(call.function.arguments or {})", "''"),
    "writes arguments as JSON": ("fields(call.function.arguments or {})", "(call.function.arguments | tojson)"),
    "calls something else": ("'<|tool_call>call:' ~ call.function.name", "'<|tool_call>call:' ~ 'x'"),
    "makes up results": ("quoted(said)", "quoted('5')"),
    "sees the answer while it writes the past": (
        "{{- bos_token -}}", "{{- bos_token ~ '<|turn>system\\n' ~ messages[-1].role ~ '<turn|>\\n' -}}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", BREAKAGE)
def test_what_a_broken_template_makes_of_a_row_is_never_trained_on(how, policy):
    template = OWN.replace(*BREAKAGE[how])
    assert template != OWN
    tokenizer = with_template(template)
    problems = [dropped(tokenizer, name, policy) for name in (*kinds.PLAIN, *kinds.WITH_TOOLS)]
    found = [problem for problem in problems if problem is not None]  # a fault does not reach every row
    assert found
    assert {problem.reason for problem in found} == {"bad_rendering"}


def test_constant_words_of_a_template_around_messages_are_its_own():
    told = OWN.replace("{{- messages[0].content | trim -}}", "{{- 'Today is a day. ' ~ messages[0].content | trim -}}")
    assert told != OWN
    check(with_template(told), "system", "drop")


PLAIN_TURNS = (
    "{{- bos_token -}}{%- for turn in messages -%}"
    "{{- '<|turn>' ~ ('model' if turn.role == 'assistant' else turn.role) ~ '\\n' -}}"
    "{{- before ~ turn.content ~ '<turn|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}"
)
EMPTY = "'<|channel>thought\\n<channel|>\\n'"


@pytest.mark.parametrize("past", ["''", EMPTY])
@pytest.mark.parametrize("content", ["    return x\n    # done\n", "\n\nyes", "\u3000x ", "\tone\n"])
def test_white_space_that_the_template_shows_is_trained_as_it_is_served(content, past):
    """Most other families' templates trim nothing: an answer without its indent is another answer."""
    shown = PLAIN_TURNS.replace("before", f"({past} if turn.role == 'assistant' else '')")
    tokenizer = with_template(shown)
    messages = [{"role": "system", "content": "  be brief"}, kinds.user(" a\n"), kinds.answer(content)]
    messages += [kinds.user("b"), kinds.answer(content)]
    made = examples(ChatFormat(tokenizer), messages)
    assert [decoded(tokenizer, e.ids[a:b]) for e in made for a, b in runs(e)] == [f"{content}<turn|>"] * 2
    for number, (example, (start, _)) in zip((2, 4), [(e, run) for e in made for run in runs(e)], strict=True):
        prompt = server_prompt(tokenizer, messages[:number], None, "drop")
        assert example.ids[:start].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_template_that_leaves_the_last_turn_open_is_named_as_that():
    end = "('' if loop.last and turn.role == 'assistant' else '<turn|>') ~ '"
    tokenizer = with_template(PLAIN_TURNS.replace("before ~ ", "").replace("'<turn|>", end))
    with pytest.raises(RowDropped, match="the template does not end its turn"):
        examples(ChatFormat(tokenizer), kinds.PLAIN["single"])


WORDS = st.text(st.sampled_from("ab 4\n{}:,\"'<|>turn\ue000\u2028é"), min_size=1, max_size=12).filter(str.strip)
NAMES = st.from_regex(r"[a-zA-Z_][a-z0-9_]{0,5}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_conversation_is_trained_as_it_is_served_or_dropped(data):
    turns = []
    for _ in range(data.draw(st.integers(1, 4))):
        turns.append(kinds.user(data.draw(WORDS)))
        thought = {"reasoning": data.draw(WORDS).strip()} if data.draw(st.booleans()) else {}
        if data.draw(st.booleans()):
            arguments = data.draw(st.dictionaries(NAMES, JSON, max_size=3))
            turns += [
                kinds.calls(kinds.call("weather", arguments, id="1"), **thought),
                kinds.result(data.draw(WORDS), "1"),
            ]
        turns.append(kinds.answer(data.draw(WORDS), **thought))
    kinds.ALL["drawn"] = turns
    for policy in POLICIES:
        problem = dropped(with_template(OWN), "drawn", policy)
        assert problem is None or problem.reason == "control_token", problem


def test_taking_thoughts_out_is_linear():
    """A pattern that looks for each closing token anew would take hours for this."""
    text = "<|channel>" * 400_000
    assert markup.split_thoughts(text) == ([], text)
    assert markup.without_thoughts(f"a{text}") == "a"
    assert markup.split_thoughts("a<|channel>thought\nb\n<channel|>c<|channel><channel|>d") == (["b"], "acd")
