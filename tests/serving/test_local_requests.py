"""No request ends or hangs the embedded server: hostile ones are refused in OpenAI's form, the next one is answered."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from gemma4_tpu.serving.local_api import Api
from gemma4_tpu.serving.local_body import BODY_BYTES
from gemma4_tpu.serving.local_engine import READY, LocalEngine
from gemma4_tpu.serving.local_metrics import Metrics
from gemma4_tpu.serving.local_process import WorkRefused
from gemma4_tpu.serving.local_template import TemplateProcess
from gemma4_tpu.templates import arguments
from tests.ports import free_port
from tests.serving import TINY
from tests.serving.local_requests import (
    ASK,
    CHAT,
    LONGEST,
    SPIN,
    called,
    chat,
    completions,
    schema,
    send,
    started,
    tool,
)

VOCABULARY = 512


class Unmodelled(LocalEngine):
    """The engine as it is, with the tiny tokenizer and noise instead of a model's logits."""

    defaults: dict[str, float] = {}  # noqa: RUF012
    vocabulary = VOCABULARY

    def _load(self):
        self._eos = frozenset([1])
        self.take_tokenizer(AutoTokenizer.from_pretrained(TINY))
        self.state = READY

    def _forward(self, tokens, cache, starts, mask, keep=1):
        new = torch.zeros(len(tokens), 1, len(tokens[0]), 1)
        cache.update(new, new, 0)
        return torch.randn(len(tokens), keep or len(tokens[0]), VOCABULARY) * 3


@pytest.fixture(scope="module")
def engine():
    made = started(Unmodelled(TINY, "float32", Metrics("m"), sequences=8, prompt_tokens=32))
    yield made
    made.stop()


@pytest.fixture
def ask(engine):
    return partial(send, engine)


ENDLESS = {"allOf": [{"type": "string", "pattern": f"a.*{number}"} for number in range(40)]}
"""Whether any text fits takes the library hours to find."""


@pytest.mark.parametrize(
    ("request_", "status", "told"),
    [
        (completions(ASK | {"prompt": "a\ud800b"}), 400, "lone surrogate"),
        (chat(CHAT | {"messages": [{"role": "user", "content": "\udfff"}]}), 400, "lone surrogate"),
        (completions(ASK, headers={}), 415, "there is no content-type; send application/json"),
        (completions(ASK, headers={"content-type": "text/plain"}), 415, "content-type is text/plain"),
        (completions(b"[" * 100_000), 400, "not readable JSON"),
        (completions(b'{"prompt": "x", "temperature": NaN}'), 400, "NaN is not a JSON number"),
        (completions(b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}"), 400, "not readable JSON"),
        (completions(b" " * (BODY_BYTES + 1)), 413, "more than"),
        (completions(b"[]"), 400, "body: Input should be a valid dictionary"),
        (completions(ASK | {"stop": ["x"] * 65}), 400, "stop: Input should be a valid string; or: List should have at"),
        (completions(ASK | {"stop": ["x", 1]}), 400, "stop.1: Input should be a valid string"),
        (completions(ASK | {"prompt": {"text": "x"}}), 400, "prompt: Input should be a valid string; or: Input should"),
        (completions(ASK | {"prompt": [[1, "x"]]}), 400, "prompt.0.1: Input should be a valid integer"),
        (completions(ASK | {"prompt": ["x"] * 2, "n": 64}), 400, "2 prompts, n=64: 128 answers; a request can have up"),
        (completions(ASK | {"best_of": 2}), 400, "best_of is not supported by this server; leave it out"),
        (completions(ASK | {"stream_options": {"include_usage": True}}), 400, "stream_options: only with stream: true"),
        (completions(ASK, url="/v1/embeddings"), 404, "POST /v1/embeddings; this server has GET /health, "),
        (chat(CHAT | {"messages": [{"role": "user", "content": 5}]}), 400, "messages.0.content: Input should be"),
        (chat(CHAT | {"chat_template_kwargs": {"return_tensors": "pt"}}), 400, "no argument 'return_tensors'"),
        (chat(CHAT | {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}), 400, "no argument 'chat_template'"),
        (chat(CHAT | {"chat_template_kwargs": {"bos_token": "x"}}), 400, "no argument 'bos_token'"),
        (chat(CHAT | {"tools": [tool(properties=5)]}), 400, "the chat template refuses this"),
        (chat(CHAT | {"messages": [{"role": "assistant", "tool_calls": 5}]}), 400, "tool_calls"),
        (chat(CHAT | {"messages": [called("f", "[1]")]}), 400, "arguments: Input should be a valid dictionary"),
        (chat(CHAT | {"messages": [called("f", "{")]}), 400, "arguments: Expecting property name"),
        (chat(CHAT | {"tools": [tool()], "tool_choice": "required"}), 400, "tool_choice"),
        (chat(CHAT | {"top_logprobs": 3}), 400, "top_logprobs: only with logprobs: true"),
        (completions(ASK | {"logit_bias": {"512": 1}}), 400, "token ids are from 0 to 511"),
        (completions(ASK | {"logit_bias": {"5": 101}}), 400, "logit_bias.5"),
        (completions(ASK | {"max_tokens": 0}), 400, "except with echo"),
        (completions(ASK | {"skip_special_tokens": False}), 400, "skip_special_tokens is not supported"),
        (completions(ASK | {"response_format": schema({"not": {}})}), 400, "cannot be satisfied: Unimplemented keys"),
        (completions(ASK | {"response_format": schema({"type": "string", "pattern": "(a"})}), 400, "unclosed group"),
        (completions(ASK | {"response_format": schema(ENDLESS)}), 400, "it takes more than 2 s"),
        (completions(ASK | {"response_format": {"type": "json_schema"}}), 400, "json_schema is missing"),
    ],
)  # fmt: skip
def test_refusals(ask, request_, status, told):
    (answer,) = ask([request_])
    assert answer.status_code == status, answer.text
    assert told in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("key", ["n", "stream", "stream_options", "echo", "seed", "ignore_eos", "stop", "logprobs"])
def test_null_is_the_default(ask, key):
    (answer,) = ask([completions(ASK | {key: None})])
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 1


def test_a_wrong_key_is_named(ask):
    answers = ask([completions(ASK | {"stop": ["x", 1]}), completions(ASK | {"max_tokens": 0})])
    assert [answer.json()["error"]["param"] for answer in answers] == ["stop.1", "max_tokens"]


def test_a_client_that_leaves_within_its_body_is_no_error_of_the_server(engine):
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send_(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"1000")],
    }  # fmt: skip
    asyncio.run(Api(engine, Metrics("m"), "m", LONGEST, key=None).app()(scope, receive, send_))
    assert sent[0]["status"] == 400


def test_temperatures_that_float32_cannot_divide_by_are_greedy(ask, engine, monkeypatch):
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    forward = engine._forward
    monkeypatch.setattr(
        engine, "_forward", lambda tokens, *a: (forward(tokens, *a), logits.expand(len(tokens), 1, -1))[1]
    )
    more = [{"temperature": 0}, {"temperature": 1e-38}, {"temperature": 1e-6}, {"temperature": 1, "top_p": 1e-300}]
    answers = ask([completions(ASK | {"ignore_eos": True} | one) for one in more])
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_what_goes_wrong_with_one_answer_is_its_own(ask, engine, monkeypatch):
    monkeypatch.setattr(
        "gemma4_tpu.serving.local_engine.choose", lambda logits, answer, allowed: 1 // answer.sampling.top_k
    )
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

DEEP = (  # one comparison of 2^60 pairs in C, which no Python handler of a signal interrupts
    "{% set two = namespace(a=[1], b=[1]) %}"
    "{% for i in range(60) %}{% set two.a = [two.a, two.a] %}{% set two.b = [two.b, two.b] %}{% endfor %}"
    "{{ two.a == two.b }}"
)
HUNGRY = "{% for a in range(20) %}{% set x.t = x.t ~ x.t %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "cpu_seconds", "told"),
    [
        ("spin", 0.5, "more than 0.5 s"),
        ("compare", 0.5, "more than 0.5 s"),
        ("eat", 60.0, "more than 512 MiB"),
        ("x" * 200, 60.0, "has 206 characters"),
    ],
)
def test_a_template_that_loops_or_fills_the_memory_is_refused_and_the_next_one_rendered(text, cpu_seconds, told):
    template = (
        "{% set x = namespace(t='x' * 1000000) %}{% set tail = tail | default('?') %}"
        "{% if messages[0].content == 'spin' %}" + SPIN + "{% elif messages[0].content == 'compare' %}" + DEEP
        + "{% elif messages[0].content == 'eat' %}" + HUNGRY
        + "{% set own = 1 %}{% endif %}{{ bos_token }}{{ messages[0].content }}{{ tail }}{{ own }}"
    )  # fmt: skip
    assert arguments(template) == {"tail"}
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})  # as a library may leave it
    process = TemplateProcess(template, {"bos_token": "<bos>"}, cpu_seconds=cpu_seconds)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)

    def render(text, characters=100):
        return process.render([{"role": "user", "content": text}], [], {"tail": "!"}, characters=characters)

    try:
        with pytest.raises(WorkRefused, match=told):
            render(text)
        assert render("hi") == "<bos>hi!"
    finally:
        process.close()
    with pytest.raises(WorkRefused, match="the server is stopped"):
        render("hi")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "loading for long", "rendering"])
def test_sigterm_ends_the_server_while_it_loads_and_while_a_template_loops(moment, tmp_path):
    model, port = tmp_path / "model", free_port()
    shutil.copytree(TINY, model)
    (model / "chat_template.jinja").write_text(SPIN)
    words = ["serving=local", f"run={model}", f"serving.port={port}", f"run_dir={tmp_path / 'record'}"]
    start = ["-c", SLOWLY] if moment == "loading for long" else ["-m", "gemma4_tpu.serve"]
    command = [sys.executable, *start, *words, "serving.probe=false", "serving.max_model_len=64"]
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
        assert process.wait(timeout=120) == (0 if moment == "rendering" else 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()
    result = json.loads((tmp_path / "record" / "result.json").read_text())
    assert result["status"] == ("stopped" if moment == "rendering" else "interrupted")


SLOWLY = """
import time
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained = lambda *a, **k: time.sleep(600)
from gemma4_tpu.errors import leave
from gemma4_tpu.serve import main
leave(main())
"""
"""The server, with a checkpoint that takes minutes to load."""


def _answers(port):
    """HTTP listens, which it does before the checkpoint is loaded."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=120).status_code == 503
    except httpx.ConnectError:
        time.sleep(0.05)
        return False
