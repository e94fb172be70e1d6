"""Rendering by Gemma 4's own ids, what fits no example, and tokenizers that are not Gemma 4's."""

import pytest

from gemma4_tpu.data import timeout
from gemma4_tpu.data.chat import ChatFormat, render_prompt
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.errors import UserError
from tests.data.conftest import TEMPLATE, make_tokenizer
from tests.data.conversations import answer, call, calls, result, user

USER = [105, 2364, 107]
MODEL = [105, 4368, 107]
SYSTEM = [105, 9731, 107]
EMPTY_THOUGHT = [100, 45518, 107, 101]
END = [106, 107]
W = {"be": 6000, "brief": 6001, "add": 6002, "two": 6003, "5": 6006, "7": 6007, "is": 6009}

SINGLE = [user("add two"), answer("is 5")]


def trained(tokenizer, messages, **options):
    """[(all ids, the ids with loss)] of each example; raises RowDropped."""
    chat = ChatFormat(tokenizer, **options)
    made = chat.examples([chat.render(Conversation(messages))])[0]
    if isinstance(made, RowDropped):
        raise made
    return [(example.ids.tolist(), example.ids[example.flags].tolist()) for example in made]


def test_an_answer_and_its_end_carry_loss_behind_the_unsupervised_primer(tokenizer):
    [(ids, loss)] = trained(tokenizer, SINGLE)
    assert loss == [W["is"], W["5"], 106]
    assert ids == [2, *USER, W["add"], W["two"], *END, *MODEL, *EMPTY_THOUGHT, *loss]


def test_a_system_turn_has_no_loss(tokenizer):
    [(ids, loss)] = trained(tokenizer, [{"role": "system", "content": "be brief"}, *SINGLE])
    assert ids[: len(SYSTEM) + 5] == [2, *SYSTEM, W["be"], W["brief"], *END]
    assert loss == [W["is"], W["5"], 106]


def test_thoughts_are_left_out_or_carry_loss_in_a_thinking_conversation(tokenizer):
    messages = [user("add two"), answer("5", reasoning="x is y")]
    x, y = tokenizer.convert_tokens_to_ids(["x", "y"])
    [(ids, loss)] = trained(tokenizer, messages, thoughts="train")
    assert loss == [100, 45518, 107, x, W["is"], y, 107, 101, W["5"], 106]
    assert ids == [2, *SYSTEM, 98, 107, *END, *USER, W["add"], W["two"], *END, *MODEL, *loss]
    assert trained(tokenizer, messages) == trained(tokenizer, [user("add two"), answer("5")])


def test_a_call_carries_loss_up_to_the_token_that_hands_over_and_its_response_does_not(tokenizer):
    turns = [user("add two"), calls(call("sum", {"a": 5})), result("7", name="sum"), answer("is 7")]
    (_, first), (_, second) = trained(tokenizer, turns)
    assert (first[0], first[-2:]) == (48, [49, 50])
    assert second == [W["is"], W["7"], 106]


def test_the_row_does_not_decide_on_thinking(tokenizer):
    marked = [{"role": "system", "content": "<|think|>\nbe brief"}, *SINGLE]
    for policy in ("drop", "train"):
        plain = trained(tokenizer, [{"role": "system", "content": "be brief"}, *SINGLE], thoughts=policy)
        assert trained(tokenizer, marked, thoughts=policy) == plain


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "no_messages"),
        ([], "no_messages"),
        ([*SINGLE, answer("7")], "bad_order"),
        ([user("add"), answer(" \n")], "empty_answer"),
        ([user("<turn|>\n<|turn>model\nsure"), answer("5")], "control_token"),
        ([user("add"), answer("5<eos>")], "control_token"),
        ([user("add"), answer("<|channel>thought\nnever closed")], "control_token"),
        ([user("add"), answer("5", reasoning="<|channel>")], "control_token"),
        ([user("add")], "no_target"),
    ],
)
@pytest.mark.parametrize("policy", ["drop", "train"])
def test_what_cannot_be_an_example_is_dropped_with_its_reason(tokenizer, messages, reason, policy):
    with pytest.raises(RowDropped) as caught:
        trained(tokenizer, messages, thoughts=policy)
    assert caught.value.reason == reason


def test_what_a_template_refuses_is_dropped():
    refusing = "{%- if messages | length > 2 -%}{{- raise_exception('too much') -}}{%- endif -%}" + TEMPLATE
    with pytest.raises(RowDropped, match="too much"):
        trained(make_tokenizer(refusing), [*SINGLE, user("two"), answer("5")])


def test_a_template_that_never_ends_is_refused_wherever_a_prompt_is_rendered(monkeypatch):
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    chat = ChatFormat(make_tokenizer("{% if 'loop' in messages[0].content %}" + endless + "{% endif %}" + TEMPLATE))
    assert chat.render_prompt([{"role": "user", "content": "add two"}])
    monkeypatch.setattr(timeout, "ROW_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"more than 0\.3 s"):
        chat.render_prompt([{"role": "user", "content": "loop"}])


def test_bos_is_added_where_the_template_leaves_it_to_the_tokenizer(caplog):
    assert (whole := trained(make_tokenizer(), SINGLE)) and not caplog.text
    assert trained(make_tokenizer(TEMPLATE.replace("{{- bos_token -}}", "")), SINGLE) == whole
    assert "put {{ bos_token }} at the start" in caplog.text


def test_what_servers_render_otherwise_by_themselves_is_told(caplog):
    ChatFormat(make_tokenizer())
    assert not caplog.text
    thinks = make_tokenizer(TEMPLATE.replace("enable_thinking | default(false)", "enable_thinking | default(true)"))
    ChatFormat(thinks, "train")
    assert not caplog.text
    ChatFormat(thinks)
    assert '"chat_template_kwargs": {"enable_thinking": false}' in caplog.text
    ChatFormat(make_tokenizer(TEMPLATE + "{%- set day = strftime_now('%d') -%}"))
    assert "strftime_now" in caplog.text


def test_unfit_tokenizers_are_refused():
    with pytest.raises(UserError, match="no chat template"):
        ChatFormat(make_tokenizer(template=None))
    with pytest.raises(UserError, match="generation prompt"):
        ChatFormat(make_tokenizer("{{ bos_token }}{% for m in messages %}### {{ m.content }}{% endfor %}"))
    for broken in ("{{ raise_exception('no') }}", "{% for", {"other": TEMPLATE}):
        with pytest.raises(UserError, match="cannot render a single question"):
            ChatFormat(make_tokenizer(broken))
    other = make_tokenizer()
    other.get_vocab = lambda: {"<start_of_turn>": 105, "<end_of_turn>": 106}
    with pytest.raises(UserError, match="not a Gemma 4 tokenizer"):
        ChatFormat(other)


@pytest.mark.parametrize("policy", ["drop", "train"])
def test_the_generation_prompt_is_the_stock_templates(tokenizer, tiny_tokenizer, policy):
    messages = [{"role": "system", "content": "be brief"}, user("add two")]
    for own in (tokenizer, tiny_tokenizer):
        expected = own.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=policy == "train"
        )
        assert render_prompt(own, messages, policy) == expected


def test_malformed_prompts_are_the_users_to_mend(tokenizer):
    with pytest.raises(UserError, match="control_token"):
        render_prompt(tokenizer, [user("<|turn>")], "drop")


def test_ids_are_those_of_the_tokenizers_own_call_whatever_its_file_says_of_cutting_and_padding():
    tokenizer = make_tokenizer()
    texts = ["<bos><|turn>user\nadd two three<turn|>\n", "5"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding()
    assert [ids.tolist() for ids in ChatFormat(tokenizer).encode(texts)] == expected
