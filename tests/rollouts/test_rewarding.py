"""Rewards: a Python function, a server, and the judge with its form."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from gemma4_tpu.rollouts.policy_tasks import Task
from gemma4_tpu.rollouts.rewarding import Answer, ByJudge, Rewarded, open_reward
from tests.evals.verilog.designs import fenced, needs_iverilog

NOTHING = np.zeros(1, np.int32)
ANSWERS = [Answer(Task("rows:1", NOTHING, "How many?", "three"), text, True) for text in ("three", "four")]


def by_reference(rows):
    return [(1.0, "right") if row["completion"] == row["reference"] else 0.25 for row in rows]


def too_few(rows):
    return [1.0]


def words(rows):
    return ["good" for _ in rows]


def endless(rows):
    return [float("inf") for _ in rows]


def too_large(rows):
    return [10**400 for _ in rows]


def one_none(rows):
    return [1.0, None]


def failing(rows):
    return [1 / len(row["missing"]) for row in rows]


def leaving(rows):
    raise SystemExit(0)


def reward(name: str, timeout_seconds: float = 600.0):
    return open_reward(RolloutsConfig(reward=name, reward_timeout_seconds=timeout_seconds))


def test_a_function_gets_rows_and_gives_numbers_or_numbers_with_classes():
    with reward(f"{__name__}:by_reference") as judge:
        assert judge(ANSWERS) == [Rewarded(1.0, "right"), Rewarded(0.25, "scored")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:f", "can't be imported"), (f"{__name__}:nothing", "has no function 'nothing' (it has "),
        (f"{__name__}:too_few", "for 2 answers"), (f"{__name__}:words", "returned 'good' for an answer"),
        (f"{__name__}:endless", "finite"), (f"{__name__}:one_none", "returned None for an answer"),
        (f"{__name__}:too_large", "finite"),
        (f"{__name__}:failing", r"raised KeyError('missing') (" + __file__), (f"{__name__}:leaving", "SystemExit(0)"),
    ],
)  # fmt: skip
def test_what_gives_no_rewards_is_one_message(name, said):
    with pytest.raises(UserError, match=r"rollouts\.reward") as refused, reward(name) as judge:
        judge(ANSWERS)
    assert said in str(refused.value)


@contextmanager
def server(answer):
    """A server on loopback; `answer(body)` gives (status, bytes)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            status, data = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/score"
        running.shutdown()


def test_a_server_scores_what_it_is_sent():
    def answer(body):
        rows = [{"score": len(row["completion"]), "kind": row["problem"]} for row in body["samples"]]
        return 200, json.dumps({"verdicts": rows}).encode()

    with server(answer) as url, reward(url) as judge:
        assert judge(ANSWERS) == [Rewarded(5.0, "rows:1"), Rewarded(4.0, "rows:1")]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, b""), "500"),
        ((200, b"[]"), "answered something other than"),
        ((200, b"<p>\xff"), "something other than.*<p>"),
        ((200, b'{"verdicts": []}'), "0 verdicts for 2"), ((200, b'{"verdicts": ["a", "b"]}'), "something other"),
        ((200, b'{"verdicts": [{"score": NaN}, {"score": 1}]}'), "returned .nan, 'scored', ''. for an answer"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_is_one_message(answer, said):
    with server(lambda _: answer) as url, reward(url) as judge, pytest.raises(UserError, match=said):
        judge(ANSWERS)


def test_a_server_that_takes_too_long_or_is_none_is_one_message():
    answered = threading.Event()
    with server(lambda _: (answered.wait(10), (200, b""))[1]) as url:
        told = "timed out; verdicts so far are"
        with reward(url, timeout_seconds=0.2) as judge, pytest.raises(UserError, match=told):
            judge(ANSWERS)
        answered.set()
    for url in ("http://[", "http://a:b/", "http://xn--/"):
        with reward(url) as judge, pytest.raises(UserError, match=rf"rollouts\.reward={re.escape(url)}: .*are kept"):
            judge(ANSWERS)


@needs_iverilog
def test_a_pass_counts_only_where_the_answer_has_ended_and_opens_with_its_fence(tmp_path):
    """And a design that would end the simulation is refused, under a class of its own."""
    from gemma4_tpu.evals.reward import JudgeProcess

    problem = VerilogSmoke().load()[0]
    prose = fenced(reference_as_answer(problem))  # and then the fence
    task, good = Task(problem.name, NOTHING, "", problem.reference), prose[prose.index("```") :]
    asked = [
        Answer(task, good, True), Answer(task, good, False), Answer(task, prose, True),
        Answer(task, good.replace("endmodule", "initial $system(1);\nendmodule"), True), Answer(task, "No.", True),
    ]  # fmt: skip
    with JudgeProcess("eval.max_problems=1", "eval.judge.workers=1", f"eval.judge.cache_dir={tmp_path}") as judge:
        found = ByJudge(judge)(asked)
    assert [one.reward for one in found] == [1, 0, 0, 0, 0]
    assert [one.kind for one in found] == ["pass", "truncated", "no fence", "forbidden construct", "no result"]
    assert [one.well_formed for one in found] == [True, True, False, True, False]
