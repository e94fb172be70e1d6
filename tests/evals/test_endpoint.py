"""An endpoint that fails, stalls, refuses seeds or keys: what is tried again, what is refused, what is counted."""

import logging
import time

import pytest

from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals import endpoint
from gemma4_tpu.evals.endpoint import Endpoint
from gemma4_tpu.evals.generate import Request
from tests.evals.server import Server, completion


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def asked(count: int = 4) -> list[Request]:
    return [Request(f"p{i}", 0, ({"role": "user", "content": f"problem {i}"},), seed=100 + i) for i in range(count)]


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


@pytest.mark.parametrize(
    "trouble", [(503, {"error": "busy"}), (429, {"error": "slow down"}), (200, b"not json"), (200, {"choices": []})]
)
def test_what_may_pass_is_tried_again(trouble):
    with Server(lambda body, earlier: trouble if earlier < 2 else "fine") as server:
        samples = ask(server)
    assert [s.completion for s in samples] == ["fine"] * 4
    assert len(server.bodies) == 12


def test_a_stalled_answer_is_given_up_and_asked_again():
    def answer(body, earlier):
        if earlier == 0 and body["messages"][0]["content"] == "problem 1":
            time.sleep(3)
        return "fine"

    with Server(answer) as server:
        started = time.perf_counter()
        assert len(ask(server, request_timeout_seconds=0.5)) == 4
        assert time.perf_counter() - started < 2.5


def test_a_sample_that_never_comes_is_logged_and_left_out(caplog):
    def answer(body, _):
        return (500, {"error": "broken"}) if body["messages"][0]["content"] == "problem 2" else "fine"

    with Server(answer) as server, caplog.at_level(logging.WARNING):
        samples = ask(server)
    assert [s.problem for s in samples] == ["p0", "p1", "p3"]
    assert "p2, sample 0 never came: 500" in caplog.text
    assert sum(b["messages"][0]["content"] == "problem 2" for b in server.bodies) == 4  # once, and three retries


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
    assert caplog.text.count("takes no seeds") == 1


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
        with pytest.raises(UserError, match=r"it has a, b; give eval\.endpoint_model"):
            ask(server)
        assert len(ask(server, endpoint_model="b")) == 4
    assert {body["model"] for body in server.bodies} == {"b"}


def test_no_server_is_one_message():
    with pytest.raises(UserError, match="is a server there"):
        Endpoint(EvalConfig(endpoint="http://127.0.0.1:9/v1"))
