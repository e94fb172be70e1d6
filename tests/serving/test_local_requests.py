"""No request ends or hangs the embedded server: hostile ones are refused in OpenAI's form, the next one is answered."""

import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from gemma4_tpu.serving.local_api import BODY_BYTES, Api
from gemma4_tpu.serving.local_engine import READY, LocalEngine
from gemma4_tpu.serving.local_metrics import Metrics
from gemma4_tpu.serving.local_template import TemplateProcess, TemplateRefused
from gemma4_tpu.templates import arguments
from tests.serving import TINY, free_port

LONGEST, VOCABULARY = 64, 512
ASK = {"model": "m", "prompt": "module a", "max_tokens": 3}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


class Unmodelled(LocalEngine):
    """The engine as it is, with the tiny tokenizer and noise instead of a model's logits."""

    defaults: dict[str, float] = {}  # noqa: RUF012
    vocabulary = VOCABULARY

    def _load(self):
        self._eos = frozenset([1])
        self.take_tokenizer(AutoTokenizer.from_pretrained(TINY))
        self.state = READY

    def _forward(self, tokens, cache, starts, mask):
        new = torch.zeros(len(tokens), 1, len(tokens[0]), 1)
        cache.update(new, new, 0)
        return torch.randn(len(tokens), VOCABULARY) * 3


@pytest.fixture(scope="module")
def engine():
    made = Unmodelled(TINY, "float32", Metrics("m"), sequences=8, prompt_tokens=32)
    made.start()
    while made.state != READY:
        time.sleep(0.01)
    yield made
    made.stop()


@pytest.fixture
def ask(engine):
    """Sends requests, so many at a time, to the application in this process. An error of its own is one of the test."""

    def send(requests, at_once=1):
        async def run():
            app = Api(engine, Metrics("m"), "m", LONGEST, key=None).app()
            turn = asyncio.Semaphore(at_once)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://local") as client:

                async def one(request):
                    async with turn:
                        return await client.request(request.pop("method", "POST"), **request)

                return await asyncio.gather(*(one(dict(request)) for request in requests))

        return asyncio.run(run())

    return send


def completions(body, **more):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {"url": "/v1/completions", "content": content, "headers": {"content-type": "application/json"}} | more


def chat(body, **more):
    return completions(body, **more) | {"url": "/v1/chat/completions"}


@pytest.mark.parametrize(
    ("request_", "status", "told"),
    [
        (completions(ASK | {"prompt": "a\ud800b"}), 400, "lone surrogate"),
        (chat(CHAT | {"messages": [{"role": "user", "content": "\udfff"}]}), 400, "lone surrogate"),
        (completions(ASK, headers={}), 415, "there is no content-type; send application/json"),
        (completions(ASK, headers={"content-type": "text/plain"}), 415, "content-type is text/plain"),
        (completions(b"[" * 100_000), 400, "not JSON"),
        (completions(b'{"prompt": "x", "temperature": NaN}'), 400, "NaN is no number"),
        (completions(b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}"), 400, "not JSON"),
        (completions(b" " * (BODY_BYTES + 1)), 413, "more than"),
        (completions(b"[]"), 400, "body: Input should be a valid dictionary"),
        (completions(ASK | {"stop": ["x"] * 65}), 400, "stop"),
        (chat(CHAT | {"chat_template_kwargs": {"return_tensors": "pt"}}), 400, "no argument 'return_tensors'"),
        (chat(CHAT | {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}), 400, "no argument 'chat_template'"),
        (chat(CHAT | {"chat_template_kwargs": {"bos_token": "x"}}), 400, "no argument 'bos_token'"),
        (chat(CHAT | {"messages": [{"role": "assistant", "tool_calls": 5}]}), 400, "the chat template refuses this"),
    ],
)  # fmt: skip
def test_refusals(ask, request_, status, told):
    (answer,) = ask([request_])
    assert answer.status_code == status, answer.text
    assert told in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_temperatures_that_float32_cannot_divide_by_are_greedy(ask, engine, monkeypatch):
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda tokens, *a: (forward(tokens, *a), logits.expand(len(tokens), -1))[1])
    more = [{"temperature": 0}, {"temperature": 1e-38}, {"temperature": 1e-6}, {"temperature": 1, "top_p": 1e-300}]
    answers = ask([completions(ASK | {"ignore_eos": True} | one) for one in more])
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_what_goes_wrong_with_one_answer_is_its_own(ask, engine, monkeypatch):
    monkeypatch.setattr("gemma4_tpu.serving.local_engine.choose", lambda logits, answer: 1 // answer.sampling.top_k)
    bad, good = ask([completions(ASK), completions(ASK | {"top_k": 1, "stop_token_ids": [1]})], at_once=2)
    assert (bad.status_code, bad.json()["error"]["type"]) == (500, "server_error")
    assert good.status_code == 200 and engine.state == READY


def test_pages_of_other_origins_may_ask(ask):
    origin = {"origin": "http://localhost:3000"}
    asking = origin | {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    before, answer, plain, wrong = ask([
        completions(b"", method="OPTIONS", headers=asking),
        completions(ASK, headers=origin | {"content-type": "application/json"}),
        completions(b"", method="OPTIONS", headers={}),
        completions(b"", method="DELETE"),
    ])  # fmt: skip
    assert before.status_code == 200 and "POST" in before.headers["access-control-allow-methods"]
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"
    assert (plain.status_code, plain.headers["allow"]) == (204, "POST")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST") and "error" in wrong.json()


# ── templates ──────────────────────────────────────────────────────────────────────────────────────────────────────

SPIN = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUNGRY = "{% for a in range(20) %}{% set x.t = x.t ~ x.t %}{% endfor %}"


def test_a_template_that_loops_or_fills_the_memory_is_refused_and_the_next_one_rendered():
    template = (
        "{% set x = namespace(t='x' * 1000000) %}{% set tail = tail | default('?') %}"
        "{% if messages[0].content == 'spin' %}" + SPIN + "{% elif messages[0].content == 'eat' %}" + HUNGRY
        + "{% set own = 1 %}{% endif %}{{ bos_token }}{{ messages[0].content }}{{ tail }}{{ own }}"
    )  # fmt: skip
    assert arguments(template) == {"tail"}
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})  # as a library may leave it
    process = TemplateProcess(template, {"bos_token": "<bos>"}, cpu_seconds=0.5)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)

    def render(text, characters=100):
        return process.render([{"role": "user", "content": text}], {"tail": "!"}, characters=characters)

    try:
        for text, told in (
            ("spin", "more than 0.5 s"),
            ("eat", "more than 512 MiB"),
            ("x" * 200, "has 206 characters"),
        ):
            with pytest.raises(TemplateRefused, match=told):
                render(text)
            assert render("hi") == "<bos>hi!"
    finally:
        process.close()
    with pytest.raises(TemplateRefused, match="the server is stopped"):
        render("hi")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "rendering"])
def test_sigterm_ends_the_server_while_it_loads_and_while_a_template_loops(moment, tmp_path):
    model, port = tmp_path / "model", free_port()
    shutil.copytree(TINY, model)
    (model / "chat_template.jinja").write_text(SPIN)
    words = ["serving=local", f"run={model}", f"serving.port={port}", f"run_dir={tmp_path / 'record'}"]
    command = [sys.executable, "-m", "gemma4_tpu.serve", *words, "serving.probe=false", "serving.max_model_len=64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if moment == "rendering":
            assert process.stdout.readline().startswith("endpoint:"), process.stderr.read()
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=CHAT | {"model": "model"}, timeout=0.5)
        else:
            while not _answers(port):
                assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == (0 if moment == "rendering" else 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()
    result = json.loads((tmp_path / "record" / "result.json").read_text())
    assert result["status"] == ("stopped" if moment == "rendering" else "interrupted")


def _answers(port):
    """HTTP listens, which it does before the checkpoint is loaded."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
    except httpx.ConnectError:
        time.sleep(0.05)
        return False


# ── anything ───────────────────────────────────────────────────────────────────────────────────────────────────────

REQUESTS = 2400
VALUES = (
    None, True, False, 0, 1, -1, 2**31, 2**64, 10**30, 0.5, -0.0, 1e-38, 1e-300, 1e38, 1e308, "", "x", "\ud800", "\x00",
    "\ufffd" * 50, "x" * 10_000, [], {}, [[]], [None], [0], [-1], [511], [512], [1e9], ["x"], ["", ""], [[5], [5, 6]],
    [{"role": "user", "content": "hi"}], [{"role": "user"}], [{"role": "tool", "content": None}], [{"content": 5}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"function": None}]}] * 2, {"type": "json_object"},
    {"include_usage": True}, {"continuous_usage_stats": 1}, {"enable_thinking": True}, {"enable_thinking": [[]]},
    {"add_generation_prompt": False}, {"chat_template": SPIN}, {"return_tensors": "pt"}, {"tokenize": False},
)  # fmt: skip
KEYS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n",
    "seed", "stop", "stop_token_ids", "stream", "stream_options", "ignore_eos", "logprobs", "top_logprobs", "echo",
    "return_tokens_as_token_ids", "chat_template_kwargs", "response_format", "tools", "user", "\ud8ff",
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


def test_thousands_of_hostile_requests_leave_it_answering(ask, engine):
    draw = random.Random(20261126)
    answers = ask([hostile(draw) for _ in range(REQUESTS)], at_once=16)
    for answer in answers:
        assert answer.status_code in (200, 204, 400, 404, 405, 413, 415), answer.text
        if answer.status_code >= 400 and answer.request.method != "HEAD":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    good = [answer for answer in answers if answer.status_code == 200]
    assert REQUESTS / 8 < len(good) < REQUESTS * 0.9  # both kinds came
    assert not any(b'"error"' in answer.content for answer in good)  # of a stream
    again = ask([completions(ASK), chat(CHAT), completions(ASK | {"stream": True})])
    assert [answer.status_code for answer in again] == [200] * 3
    assert (engine.state, engine.counts) == (READY, (0, 0))
