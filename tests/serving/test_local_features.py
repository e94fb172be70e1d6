"""What clients of OpenAI and vLLM ask for beyond text, by OpenAI's own client, held against transformers."""

import asyncio
import json
import math

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from gemma4_tpu.data.markup import QUOTE
from gemma4_tpu.serving.local_engine import READY, LocalEngine
from gemma4_tpu.serving.local_metrics import Metrics
from gemma4_tpu.serving.local_process import WorkRefused
from gemma4_tpu.serving.local_sampling import AnswerSampling, GeneratedAnswer, choose
from tests.serving import TINY
from tests.serving.local_requests import application, send, started

LONGEST = 640
PROMPT = "module adder(input [3:0] a, input [3:0] b, output [4:0] y);\n" * 6
GREEDY = {"model": "m", "temperature": 0}
NEAR = 2e-4
"""Of log-probabilities in float32, read in pieces against at once: some hundred roundings of 1e-6."""


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def asked(tiny_engine, call):
    """What `call(client)` gives, by OpenAI's client to the application in this process."""

    async def run():
        async with (
            httpx.AsyncClient(transport=application(tiny_engine, LONGEST)) as http,
            openai.AsyncOpenAI(base_url="http://local/v1", api_key="none", max_retries=0, http_client=http) as client,
        ):
            return await call(client)

    return asyncio.run(run())


def completed(tiny_engine, **body):
    return asked(tiny_engine, lambda client: client.completions.create(**GREEDY | body))


def chatted(tiny_engine, content="Write a module.", **body):
    messages = body.pop("messages", [{"role": "user", "content": content}])
    return asked(tiny_engine, lambda client: client.chat.completions.create(messages=messages, **GREEDY | body))


def streamed(tiny_engine, kind, **body):
    async def run(client):
        place = client.chat.completions if kind == "chat" else client.completions
        return [chunk async for chunk in await place.create(**GREEDY | body, stream=True)]

    return asked(tiny_engine, run)


# ── log-probabilities ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_is_scored_as_transformers_scores_it(tiny_engine, reference):
    """As evaluation harnesses ask for it: echo, no token more, the log-probability of each of the prompt's."""
    ids = tiny_engine.tokenizer(PROMPT)["input_ids"]
    assert len(ids) > 130  # read in two pieces
    with torch.inference_mode():
        scores = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    answer = completed(tiny_engine, prompt=PROMPT, max_tokens=0, echo=True, logprobs=2)
    told = answer.choices[0].logprobs
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (PROMPT, "length")
    assert answer.usage.completion_tokens == 0
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    wanted = [float(scores[place, token]) for place, token in enumerate(ids[1:])]
    assert told.token_logprobs[1:] == pytest.approx(wanted, abs=NEAR)
    for place, top in enumerate(told.top_logprobs[1:]):
        likeliest = scores[place].topk(2).values.tolist()
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(likeliest, abs=NEAR)
        assert len(top) == (2 if wanted[place] >= likeliest[1] - NEAR else 3)  # and the one that is there


@pytest.mark.parametrize("as_ids", [True, False])
@pytest.mark.parametrize("echo", [True, False])
def test_each_tokens_text_begins_at_its_offset(tiny_engine, as_ids, echo):
    prompt = "assign y = a ≥ b; // größer\n"
    prompt = tiny_engine.tokenizer(prompt)["input_ids"] if as_ids else prompt
    body = {"prompt": prompt, "max_tokens": 12, "echo": echo, "logprobs": 0, "extra_body": {"ignore_eos": True}}
    choice = completed(tiny_engine, **body).choices[0]
    told = choice.logprobs
    for token, start in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith(("<", "bytes:")):  # control tokens and halves of characters have no text
            assert choice.text[start:].startswith(token)
    chunks = [chunk.choices[0] for chunk in streamed(tiny_engine, "text", **body)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    parts = [chunk.logprobs for chunk in chunks if chunk.logprobs]
    assert [token for part in parts for token in part.tokens] == told.tokens
    assert [place for part in parts for place in part.text_offset] == told.text_offset


def test_a_chats_logprobs_are_the_models(tiny_engine, reference):
    choice = chatted(tiny_engine, logprobs=True, top_logprobs=3, max_tokens=10).choices[0]
    messages = [{"role": "user", "content": "Write a module."}]
    ids = tiny_engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    for one in choice.logprobs.content:
        with torch.inference_mode():
            scores = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        values, tokens = scores.topk(3)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(values.tolist(), abs=NEAR)
        assert one.logprob == pytest.approx(float(values[0]), abs=NEAR)  # greedy
        ids = [*ids, int(tokens[0])]
    assert (
        bytes(byte for one in choice.logprobs.content for byte in one.bytes).decode().startswith(choice.message.content)
    )
    chunks = streamed(tiny_engine, "chat", messages=messages, logprobs=True, max_tokens=10)
    parts = [part for chunk in chunks for part in chunk.choices[0].logprobs.content]
    assert [(p.token, p.top_logprobs) for p in parts] == [(one.token, []) for one in choice.logprobs.content]
    assert [p.logprob for p in parts] == pytest.approx([one.logprob for one in choice.logprobs.content], abs=NEAR)


def test_a_texts_tokens_are_told(tiny_engine):
    ask = {"url": "/tokenize", "json": {"model": "m", "prompt": PROMPT, "add_special_tokens": False}}
    (answer,) = send(tiny_engine, [ask])
    assert answer.json()["tokens"] == tiny_engine.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]


def test_a_prompt_may_begin_without_the_start_token(tiny_engine):
    counts = [
        completed(tiny_engine, prompt="module", max_tokens=1, extra_body={"add_special_tokens": start}).usage
        for start in (True, False)
    ]
    assert counts[0].prompt_tokens == counts[1].prompt_tokens + 1


# ── drawing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_repetition_penalty_is_that_of_transformers(tiny_engine, reference):
    ids = tiny_engine.tokenizer(PROMPT[:60])["input_ids"]
    given = torch.tensor([ids])
    wanted = reference.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=24, repetition_penalty=1.3,
        eos_token_id=[],
    )[0, len(ids) :].tolist()  # fmt: skip
    more = {"repetition_penalty": 1.3, "ignore_eos": True, "return_tokens_as_token_ids": True}
    choice = completed(tiny_engine, prompt=PROMPT[:60], max_tokens=24, logprobs=0, extra_body=more).choices[0]
    assert [int(name.removeprefix("token_id:")) for name in choice.logprobs.tokens] == wanted


def drawn(logits, tokens=(), prompt=(0,), count=2000, **sampling):
    answer = GeneratedAnswer(list(prompt), AnswerSampling(max_tokens=1, **sampling), print, tokens=list(tokens))
    answer.generator = torch.Generator().manual_seed(0)
    found = torch.tensor([choose(logits, answer) for _ in range(count)]).bincount(minlength=len(logits))
    return (found / count).tolist()


def test_penalties_and_bias_are_those_of_openais_formula():
    logits = torch.tensor([1.0, -0.5, 0.25, 0.0])
    near = 0.045  # four standard deviations of a share of 2000 draws
    tokens = [0, 0, 2]  # the prompt's own token 1 counts for repetition alone
    for sampling, shift in (
        ({"frequency_penalty": 0.5}, [-1.0, 0, -0.5, 0]),
        ({"presence_penalty": 0.5}, [-0.5, 0, -0.5, 0]),
        ({"frequency_penalty": -0.5, "presence_penalty": 1.0}, [0.0, 0, -0.5, 0]),
        ({"logit_bias": {3: 2.0, 1: -100.0}}, [0, -100.0, 0, 2.0]),
    ):
        wanted = (logits + torch.tensor(shift)).softmax(-1).tolist()
        assert drawn(logits, tokens, [1], **sampling) == pytest.approx(wanted, abs=near), sampling
    theirs = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[1, *tokens]]), logits[None])[0]
    assert drawn(logits, tokens, [1], repetition_penalty=1.5) == pytest.approx(theirs.softmax(-1).tolist(), abs=near)
    theirs = MinPLogitsWarper(0.4)(None, logits[None] / 0.7)[0]  # of the chances at this temperature
    assert drawn(logits, min_p=0.4, temperature=0.7) == pytest.approx(theirs.softmax(-1).tolist(), abs=near)
    assert drawn(logits, tokens, temperature=0, frequency_penalty=2, count=1) == [0, 0, 0, 1]


def test_a_bias_of_100_writes_the_answer(tiny_engine):
    token = tiny_engine.tokenizer("x", add_special_tokens=False)["input_ids"][0]
    for body in ({"prompt": "module"}, {"prompt": "module", "temperature": 1, "seed": 3}):
        assert completed(tiny_engine, max_tokens=3, logit_bias={str(token): 100}, **body).choices[0].text == "xxx"


def test_what_a_request_leaves_out_is_the_checkpoints(tiny_engine, monkeypatch):
    """Of `generation_config.json`."""
    likeliest = completed(tiny_engine, prompt="module", max_tokens=8).choices[0].text
    monkeypatch.setattr(tiny_engine._model.generation_config, "top_k", 1)
    warm = {"prompt": "module", "max_tokens": 8, "temperature": 2, "seed": 1}
    assert completed(tiny_engine, **warm).choices[0].text == likeliest
    assert completed(tiny_engine, **warm, extra_body={"top_k": 0}).choices[0].text != likeliest


# ── answers of a form ──────────────────────────────────────────────────────────────────────────────────────────────

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "ports", "clocked"],
    "properties": {
        "name": {"enum": ["adder", "größer"]}, "clocked": {"type": "boolean"},
        "ports": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_keeps_its_schema(tiny_engine, seed):
    form = {"type": "json_schema", "json_schema": {"name": "module", "schema": SCHEMA, "strict": True}}
    body = {"response_format": form, "temperature": 1.5, "seed": seed, "max_tokens": 400}
    answer = chatted(tiny_engine, extra_body={"ignore_eos": seed % 2 == 0}, **body, n=2)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content)
        assert found.keys() == SCHEMA["properties"].keys()
        assert found["name"] in ("adder", "größer") and isinstance(found["clocked"], bool)
        assert len(found["ports"]) <= 2 and all(0 <= port <= 9 for port in found["ports"])


@pytest.mark.parametrize(
    ("between", "allowed"), [("", True), (" ", True), ("\n\t", True), ("\n    ", True), ("  ", False), ("\n\n", False)]
)
def test_white_space_in_an_answer_is_bounded(tiny_engine, between, allowed):
    grammar, tokens = tiny_engine.grammar({"type": "object"}), tiny_engine.tokenizer(f'{{"a":{between}1}}')["input_ids"]
    try:
        for token in tokens[tokens[0] == tiny_engine.tokenizer.bos_token_id :]:
            assert allowed is False or grammar.allowed()[token]
            grammar.take(token)
        assert allowed and grammar.is_over
    except WorkRefused:
        assert not allowed


def test_an_answer_that_ends_is_an_object(tiny_engine):
    bias = {str(tiny_engine.tokenizer("}", add_special_tokens=False)["input_ids"][0]): 100}
    answer = completed(
        tiny_engine, prompt="x", max_tokens=50, extra_body={"response_format": {"type": "json_object"}}, logit_bias=bias
    )
    assert json.loads(answer.choices[0].text) == {}


def test_without_the_library_a_schema_is_refused_in_one_message(tiny_engine, monkeypatch):
    monkeypatch.setattr("gemma4_tpu.serving.local_grammar.find_spec", lambda name: None)
    with pytest.raises(openai.BadRequestError, match=r"needs llguidance: pip install 'gemma4-tpu\[local-serving\]'"):
        chatted(tiny_engine, response_format={"type": "json_object"}, max_tokens=5)


# ── tools ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Scripted(LocalEngine):
    """The engine with the tiny tokenizer, whose model says what a script says."""

    defaults: dict[str, float] = {}  # noqa: RUF012
    vocabulary = 512
    prompt = ""
    """What was asked last."""

    def say(self, text):
        self._script = iter([*self.tokenizer(text, add_special_tokens=False)["input_ids"], 1])

    def _load(self):
        from transformers import AutoTokenizer

        self._eos = frozenset([1])
        self.take_tokenizer(AutoTokenizer.from_pretrained(TINY))
        self.state = READY

    def _forward(self, tokens, cache, starts, mask, keep=1):
        if starts == [0]:
            self.prompt = self.tokenizer.decode(tokens[0])
        new = torch.zeros(1, 1, len(tokens[0]), 1)
        cache.update(new, new, 0)
        logits = torch.zeros(1, 1, self.vocabulary)
        logits[0, 0, next(self._script, 1)] = 9
        return logits


@pytest.fixture(scope="module")
def scripted():
    made = started(Scripted(TINY, "float32", Metrics("m"), sequences=1, prompt_tokens=4096))
    yield made
    made.stop()


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Says what it is like.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}  # fmt: skip
ASKED = [{"role": "user", "content": "Is it raining?"}]
CALL = f"<|tool_call>call:weather{{city:{QUOTE}Zürich, {{CH}}{QUOTE},days:2}}<tool_call|>"
SECOND = f"<|tool_call>call:weather{{city:{QUOTE}Rom{QUOTE}}}<tool_call|>"


@pytest.mark.parametrize(
    ("written", "content", "calls", "why"),
    [
        (CALL, None, [{"city": "Zürich, {CH}", "days": 2}], "tool_calls"),
        (f"Aha.{CALL}{SECOND}", "Aha.", [{"city": "Zürich, {CH}", "days": 2}, {"city": "Rom"}], "tool_calls"),
        (f"{CALL}<|tool_response>response:weather", None, [{"city": "Zürich, {CH}", "days": 2}], "tool_calls"),
        ("It is.", "It is.", [], "stop"),
        (f"<|tool_call>weather({QUOTE}x", f"<|tool_call>weather({QUOTE}x", [], "stop"),
    ],
)  # fmt: skip
def test_calls_are_read_whole_and_in_a_stream(scripted, written, content, calls, why):
    scripted.say(written)
    choice = chatted(scripted, messages=ASKED, tools=[WEATHER]).choices[0]
    assert "<|tool>declaration:weather{" in scripted.prompt
    made = choice.message.tool_calls or []
    assert (choice.message.content, choice.finish_reason) == (content, why)
    assert [(one.function.name, json.loads(one.function.arguments)) for one in made] == [("weather", c) for c in calls]
    assert len({one.id for one in made}) == len(made)

    scripted.say(written)
    deltas = [chunk.choices[0] for chunk in streamed(scripted, "chat", messages=ASKED, tools=[WEATHER])]
    assert "".join(one.delta.content or "" for one in deltas) == (content or "")
    told = [call for one in deltas for call in one.delta.tool_calls or []]
    assert [call.index for call in told] == list(range(len(calls)))
    assert [json.loads(call.function.arguments) for call in told] == calls
    assert deltas[-1].finish_reason == why


def test_one_call_at_a_time_ends_with_the_first(scripted):
    scripted.say(CALL + SECOND)
    choice = chatted(scripted, messages=ASKED, tools=[WEATHER], parallel_tool_calls=False).choices[0]
    assert (len(choice.message.tool_calls), choice.finish_reason) == (1, "tool_calls")


def test_results_of_calls_go_back_and_choice_none_hides_the_tools(scripted):
    scripted.say(f"<|channel>thought\nwhich city?<channel|>{CALL}")
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    message = chatted(scripted, messages=ASKED, tools=[WEATHER], extra_body=thinking).choices[0].message
    assert message.reasoning == "which city?"
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    scripted.say("No.")
    turns = [*ASKED, message.model_dump(), result]
    assert chatted(scripted, messages=turns, tools=[WEATHER]).choices[0].message.content == "No."
    assert f"<channel|>{CALL}<|tool_response>response:weather{{value:{QUOTE}sunny{QUOTE}}}" in scripted.prompt
    scripted.say(CALL)
    choice = chatted(scripted, messages=ASKED, tools=[WEATHER], tool_choice="none").choices[0]
    assert "<|tool>" not in scripted.prompt
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


def test_a_form_is_for_the_answer_not_for_thoughts_and_calls(scripted):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    scripted.say("<|channel>thought\nhm, {<channel|>42")
    message = chatted(scripted, response_format=form, extra_body=thinking, max_tokens=40).choices[0].message
    assert (message.reasoning, message.content) == ("hm, {", "42")
    scripted.say(CALL)
    choice = chatted(scripted, messages=ASKED, response_format=form, tools=[WEATHER]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    scripted.say("hello")  # nothing of which may come
    content = chatted(scripted, response_format=form, max_tokens=2).choices[0].message.content
    assert math.isfinite(float(content or "0"))
