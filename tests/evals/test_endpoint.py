"""An endpoint that fails, stalls, refuses seeds or keys: what is tried again, what is refused, what is counted."""

import asyncio
import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals import endpoint
from gemma4_tpu.evals.endpoint import Endpoint
from gemma4_tpu.evals.generate import SampleRequest
from tests.evals.server import Server, completion


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def asked(count: int = 4) -> list[SampleRequest]:
    return [
        SampleRequest(f"p{i}", 0, ({"role": "user", "content": f"problem {i}"},), seed=100 + i) for i in range(count)
    ]


def ask(server: Server, count: int = 4, **settings):
    config = EvalConfig(endpoint=server.url, **{"concurrency": 4, "retries": 3, **settings})
    return sorted(Endpoint(config).generate(asked(count)), key=lambda sample: sample.problem)


def echo(body, _):
    return f"answer to {body['messages'][-1]['content']}"


def test_every_request_has_its_own_seed_and_the_parameters():
    with Server(echo) as server:
        samples = ask(server, temperature=0.3, top_p=0.9, max_new_tokens=99)
    assert [s.completion for s in samples] == [f"answer to problem {i}" for i in range(4)]
    assert [s.seed for s in samples] == [100, 101, 102, 103]
    assert sorted(body["seed"] for body in server.bodies) == [100, 101, 102, 103]
    assert {(b["temperature"], b["top_p"], b["max_tokens"], b["model"]) for b in server.bodies} == {
        (0.3, 0.9, 99, "gemma")
    }


def test_a_cut_off_answer_says_so():
    with Server(lambda *_: (200, completion("half", finish="length", tokens=12))) as server:
        (sample,) = ask(server, 1)
    assert (sample.finish, sample.tokens) == ("length", 12)


TROUBLES = {
    "busy": (503, {"error": "busy"}), "too many": (429, {"error": "slow down"}), "no JSON": (200, b"not json"),
    "no UTF-8": (200, b'{"choices": "\xff'), "empty": (200, b""), "nested beyond measure": (200, b"[" * 100_000),
    "a number": (200, 7), "null": (200, None), "an error with 200": (200, {"error": {"message": "overloaded"}}),
    "no choices": (200, {"choices": []}), "choices are no list": (200, {"choices": {"0": {}}}),
    "choice is null": (200, {"choices": [None]}), "message is text": (200, {"choices": [{"message": "text"}]}),
    "no message": (200, {"choices": [{"text": "a completion"}]}),
    "content is a number": (200, {"choices": [{"message": {"content": 3}}]}),
    "content is a list": (200, {"choices": [{"message": {"content": [{"type": "text"}]}}]}), "no content": (204, b""),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_what_may_pass_is_tried_again(trouble):
    with Server(lambda body, earlier: trouble if earlier < 2 else "fine") as server:
        samples = ask(server, 2)
    assert [s.completion for s in samples] == ["fine"] * 2
    assert len(server.bodies) == 6


def test_malformed_answers_without_end_are_a_missing_sample(caplog):
    with Server(lambda *_: (200, {"choices": [{"message": "text"}]})) as server, caplog.at_level(logging.WARNING):
        assert ask(server, 1, retries=1) == []
    assert "p0, sample 0 never arrived: 200 without choices[0].message.content" in caplog.text


@pytest.mark.parametrize("usage", [None, [], "7", {"completion_tokens": "7"}, {"completion_tokens": None}])
def test_an_odd_count_of_tokens_loses_no_answer(usage):
    with Server(lambda *_: (200, {**completion("fine"), "usage": usage})) as server:
        (sample,) = ask(server, 1)
    assert (sample.completion, sample.tokens) == ("fine", None)


def test_an_answer_of_thoughts_alone_is_empty():
    with Server(lambda *_: (200, completion(None, finish="length"))) as server:
        (sample,) = ask(server, 1)
    assert (sample.completion, sample.finish) == ("", "length")


def test_a_server_is_waited_for_as_long_as_it_asks(monkeypatch):
    sleep, waited = asyncio.sleep, []

    async def noted(seconds, *more):
        waited.append(seconds)
        await sleep(min(seconds, 1.0), *more)

    monkeypatch.setattr(endpoint.asyncio, "sleep", noted)
    longest = endpoint.LONGEST_RETRY_AFTER_SECONDS
    for header, least, most in (("1", 1.0, 1.0), ("86400", longest, longest), ("-5", 0.0, 0.01), ("soon", 0.0, 0.01)):
        waited.clear()
        busy = (429, {"error": "slow down"}, {"Retry-After": header})
        with Server(lambda body, earlier, busy=busy: busy if earlier < 1 else "fine") as server:
            started = time.perf_counter()
            assert [s.completion for s in ask(server, 1)] == ["fine"]
            assert time.perf_counter() - started >= min(least, 1.0) and least <= max(waited) <= most, (header, waited)


def test_a_server_may_ask_to_wait_until_a_date():
    response = httpx.Response(503, headers={"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=40))})
    request = httpx.Request("POST", "http://localhost")
    error = httpx.HTTPStatusError("busy", request=request, response=response)
    assert 35 < endpoint._retry_after_seconds(error) <= 40
    response.headers["Retry-After"] = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert endpoint._retry_after_seconds(error) == 0
    response.headers["Retry-After"] = "Wed, 21 Oct 2099 07:28:00 GMT"
    assert endpoint._retry_after_seconds(error) == endpoint.LONGEST_RETRY_AFTER_SECONDS


def test_a_stalled_answer_is_given_up_and_asked_again():
    over = threading.Event()

    def answer(body, earlier):
        if earlier == 0 and body["messages"][0]["content"] == "problem 1":
            over.wait(300)
        return "fine"

    with Server(answer) as server:
        started = time.perf_counter()
        assert len(ask(server, request_timeout_seconds=1.0)) == 4
        assert time.perf_counter() - started < 100  # it would take three times as long
        over.set()


def test_a_sample_that_never_comes_is_logged_and_left_out(caplog):
    def answer(body, _):
        return (500, {"error": "broken"}) if body["messages"][0]["content"] == "problem 2" else "fine"

    with Server(answer) as server, caplog.at_level(logging.WARNING):
        samples = ask(server)
    assert [s.problem for s in samples] == ["p0", "p1", "p3"]
    assert "p2, sample 0 never arrived: 500" in caplog.text
    assert sum(b["messages"][0]["content"] == "problem 2" for b in server.bodies) == 4  # once, and three retries


def test_the_same_reason_is_logged_once_and_counted(caplog):
    with Server(lambda *_: (400, {"error": "no pictures here"})) as server, caplog.at_level(logging.WARNING):
        assert ask(server) == []
    told = [record.getMessage() for record in caplog.records if "no pictures here" in record.getMessage()]
    assert len(told) == 2 and told[1].startswith("4 samples in all never arrived: 400"), told


def test_a_request_that_the_server_refuses_for_good_is_not_repeated():
    with Server(lambda *_: (400, {"error": "prompt too long"})) as server:
        assert ask(server, 1) == []
    assert len(server.bodies) == 1


def test_no_seeds_are_sent_to_a_server_that_refuses_them(caplog):
    def answer(body, _):
        return (400, {"error": "unknown parameter: seed"}) if "seed" in body else "fine"

    with Server(answer) as server, caplog.at_level(logging.WARNING):
        samples = ask(server, 8, concurrency=2)
    assert [s.completion for s in samples] == ["fine"] * 8
    assert {s.seed for s in samples} == {None}
    assert sum("seed" in body for body in server.bodies) <= 2  # those under way when the first was refused
    assert caplog.text.count("refuses seeds") == 1


def test_concurrency_is_bounded():
    with Server(echo, delay_seconds=0.05) as server:
        ask(server, 20, concurrency=3)
    assert 2 <= server.most_at_once <= 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_everyone_ends_the_evaluation(status, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with Server(lambda *_: (status, {"error": "no"})) as server, pytest.raises(UserError) as caught:
        ask(server)
    assert str(status) in str(caught.value)
    assert "very-secret" not in str(caught.value) + caplog.text


def test_the_key_goes_into_the_header_only(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with Server(echo) as server, caplog.at_level(logging.DEBUG):
        made = Endpoint(EvalConfig(endpoint=server.url))
        list(made.generate(asked(1)))
        assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "very-secret" not in caplog.text + str(made.description)


def test_the_model_has_to_be_named_where_there_are_several():
    with Server(echo, models=("a", "b")) as server:
        with pytest.raises(UserError, match=r"serves a, b; give eval\.endpoint_model"):
            ask(server)
        assert len(ask(server, endpoint_model="b")) == 4
    assert {body["model"] for body in server.bodies} == {"b"}


def test_no_server_is_one_message():
    with pytest.raises(UserError, match="is a server running there"):
        Endpoint(EvalConfig(endpoint="http://127.0.0.1:9/v1"))
