"""Thousands of hostile requests, and then the embedded server answers as it did before them."""

import json
import random

import pytest

from gemma4_tpu.serving.local_engine import READY
from tests.processes import wait_for
from tests.serving.local_requests import ASK, CHAT, SPIN, called, chat, completions, schema, send, tool

REQUESTS = 2400
VALUES = (
    None, True, False, 0, 1, -1, 2**31, 2**64, 10**30, 0.5, -0.0, 1e-38, 1e-300, 1e38, 1e308, "", "x", "\ud800", "\x00",
    "\ufffd" * 50, "x" * 10_000, [], {}, [[]], [None], [0], [-1], [511], [512], [1e9], ["x"], ["", ""], [[5], [5, 6]],
    [{"role": "user", "content": "hi"}], [{"role": "user"}], [{"role": "tool", "content": None}], [{"content": 5}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"function": None}]}] * 2, {"type": "json_object"},
    {"include_usage": True}, {"continuous_usage_stats": 1}, {"enable_thinking": True}, {"enable_thinking": [[]]},
    {"type": "text"}, schema({"type": "integer"}), schema({"$ref": "#"}), schema({"pattern": "(a*)*b"}), [tool()],
    [tool(type="object", properties={"x": {"type": "string"}})], [{"type": "function"}], [called("f", '{"x": [1]}')],
    [called("f", "{")], {"5": 100}, {"5": -100, "511": 1}, {"512": 1}, {"-1": 1}, "none", "auto", "required",
    {"add_generation_prompt": False}, {"chat_template": SPIN}, {"return_tensors": "pt"}, {"tokenize": False},
)  # fmt: skip
KEYS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n",
    "seed", "stop", "stop_token_ids", "stream", "stream_options", "ignore_eos", "logprobs", "top_logprobs", "echo",
    "return_tokens_as_token_ids", "chat_template_kwargs", "response_format", "tools", "tool_choice",
    "parallel_tool_calls", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "user",
    "\ud8ff",
)  # fmt: skip
TYPES = (
    *["application/json"] * 8, "application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded", "",
)  # fmt: skip


def hostile(draw):
    """One request: a good one in which up to four keys hold anything; some are cut, or no JSON, or go elsewhere."""
    is_chat = draw.random() < 0.4
    body = dict(CHAT if is_chat else ASK)
    for _ in range(draw.randrange(5)):
        body[draw.choice(KEYS)] = draw.choice(VALUES)
    content = json.dumps(body).encode()
    spoiled = draw.random()
    if spoiled < 0.05:
        content = content[: draw.randrange(len(content))]
    elif spoiled < 0.08:
        content = draw.randbytes(200)
    elif spoiled < 0.1:
        content = draw.choice([b"[" * 9999, b'{"prompt":' * 9999, b"-Infinity", b"null", b"9" * 9999, b"\xff\xfe{"])
    kind = draw.choice(TYPES)
    request = (chat if is_chat else completions)(content, headers={"content-type": kind} if kind else {})
    if draw.random() < 0.1:
        request["method"] = draw.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
        request["url"] = draw.choice(
            ["/v1/completions", "/v1/models", "/v1/models/%FF", "/health", "/metrics", "/", "/%00"]
        )
    return request


@pytest.mark.slow
def test_thousands_of_hostile_requests_leave_it_answering_as_before(tiny_engine):
    greedy = {"temperature": 0, "max_tokens": 16}
    good = [
        completions(ASK | greedy | {"logprobs": 2}),
        chat(CHAT | greedy),
        completions(ASK | greedy | {"stream": True}),
    ]
    before = [told(answer) for answer in send(tiny_engine, good)]

    draw = random.Random(20261126)
    answers = send(tiny_engine, [hostile(draw) for _ in range(REQUESTS)], at_once=16)
    for answer in answers:
        assert answer.status_code in (200, 204, 400, 404, 405, 413, 415), answer.text
        if answer.status_code >= 400 and answer.request.method != "HEAD":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    taken = [answer for answer in answers if answer.status_code == 200]
    assert REQUESTS / 8 < len(taken) < REQUESTS * 0.9  # both kinds came
    assert not any(b'"error"' in answer.content for answer in taken)  # of a stream
    assert [told(answer) for answer in send(tiny_engine, good)] == before
    wait_for(lambda: tiny_engine.counts == (0, 0))  # an answer is told before its place is given up
    assert tiny_engine.state == READY


def told(answer):
    """What does not change from one time to the next: neither ids nor times."""
    assert answer.status_code == 200
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [json.loads(line)["choices"] for line in lines if line != "[DONE]"]
