"""The judge as a reward: a process of its own, batches from many threads, canaries, every way to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import psutil
import pytest

from gemma4_tpu.errors import INTERRUPTED, TERMINATED, UserError
from gemma4_tpu.evals.judge_server import Service, graded
from gemma4_tpu.evals.problems import Verdict, VerdictClass
from gemma4_tpu.evals.reward import ANNOUNCEMENT, JudgeProcess
from gemma4_tpu.evals.verilog import canaries
from gemma4_tpu.evals.verilog.mutants import mutants
from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from tests.evals.verilog.designs import fenced, honest, needs_iverilog
from tests.house.scripts import ROOT
from tests.processes import ends

pytestmark = needs_iverilog
PROBLEMS = VerilogSmoke().load()[:4]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return ["eval.max_problems=4", "eval.judge.workers=2", f"eval.judge.cache_dir={tmp_path_factory.mktemp('cache')}"]


@pytest.fixture(scope="module")
def judge(words):
    with JudgeProcess(*words) as judge:
        yield judge


def verdict(kind: VerdictClass, **changes) -> Verdict:
    return Verdict(kind=kind, official=False, **changes)


def test_scores_rise_with_how_far_a_design_comes():
    passed, agreeing, differing = verdict(VerdictClass.PASS), *(
        verdict(VerdictClass.MISMATCH, mismatches=wrong, samples=100) for wrong in (10, 90)
    )  # fmt: skip
    crashing, broken = verdict(VerdictClass.RUNTIME), verdict(VerdictClass.SYNTAX)
    scores = [graded(v) for v in (passed, agreeing, differing, crashing, broken, verdict(VerdictClass.FORBIDDEN))]
    assert scores == sorted(scores, reverse=True) == [1.0, 0.74, 0.26, 0.1, 0.0, 0.0]
    assert graded(verdict(VerdictClass.TIMEOUT, refused_by="build")) == 0  # of the compiler
    assert graded(verdict(VerdictClass.MISMATCH, samples=3)) == 0.2  # ended early: nothing is known to agree


def test_a_batch_comes_back_in_its_order_and_equal_samples_are_judged_once(judge):
    wrong = mutants(reference_as_answer(PROBLEMS[0]))[0]
    batch = [(p.name, honest(p)) for p in PROBLEMS]
    batch += [
        (PROBLEMS[0].name, text) for text in (fenced(wrong), "I don't know.", "thought\nHm.\n" + honest(PROBLEMS[0]))
    ]
    before = judge.health()["judged"]
    rows = judge(batch * 3)
    assert [row["problem"] for row in rows] == [name for name, _ in batch] * 3
    assert [row["kind"] for row in rows[:7]] == ["pass"] * 4 + ["mismatch", "no result", "leaked thought"]
    assert rows[:7] == rows[7:14] == rows[14:]
    assert [row["score"] for row in rows[:4]] == [1.0] * 4 and 0.2 <= rows[4]["score"] < 1 and rows[4]["mismatches"] > 0
    assert judge.health()["judged"] == before + 7
    assert judge([]) == []


def test_the_verdicts_that_the_page_shows(judge):
    page = (ROOT / "docs/concepts/verdict.md").read_text(encoding="utf-8")
    shown = [json.loads(line) for line in re.findall(r'^\{"kind".*', page, re.MULTILINE)]
    right = reference_as_answer(PROBLEMS[1])
    assert "set f to the AND of in2 and u" in PROBLEMS[1].prompt and "set f to the AND of in2 and u" in page
    answers = [right, right.replace("&", "|"), right.replace("assign", 'initial $fopen("x"); assign')]
    rows = judge([(PROBLEMS[1].name, fenced(code)) for code in answers])
    assert [{key: row[key] for key in one} for row, one in zip(rows, shown, strict=True)] == shown


def test_many_clients_at_once_get_their_own_verdicts(judge):
    def ask(number: int) -> list[bool]:
        batch = [(p.name, honest(p) if (number + i) % 2 else fenced(f"// {number}\nmodule x; endmodule"))
                 for i, p in enumerate(PROBLEMS)]  # fmt: skip
        return [row["passed"] for row in judge(batch)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(16)))
    assert answers == [[bool((number + i) % 2) for i in range(4)] for number in range(16)]


def test_what_failed_by_chance_is_judged_again():
    outcomes = [OSError("no space left"), verdict(VerdictClass.PASS)]

    class Judge:
        def submit(self, problem, completion, *, official):
            future, outcome = Future(), outcomes.pop(0)
            future.set_result(outcome) if isinstance(outcome, Verdict) else future.set_exception(outcome)
            return future

    service = Service(PROBLEMS, Judge(), None)
    sample = {"problem": PROBLEMS[0].name, "completion": "module"}
    with pytest.raises(OSError, match="no space left"):
        service.verdicts([sample])
    assert [row["passed"] for row in service.verdicts([sample, sample])] == [True, True]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"no json", "Expecting value"), (b"[" * 100_000, ""), (b"[]", "give {"), (b'{"samples": 3}', "give {"),
        (b'{"samples": [{"problem": "x"}]}', "sample 0: not"),
        (b'{"samples": [{"problem": "x", "completion": ""}]}', "sample 0: no problem 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_message_and_harms_nobody(body, said, judge):
    answer = httpx.post(f"{judge.url}/judge", content=body)
    assert answer.status_code == 400 and said in answer.json()["error"]
    assert judge.health()["status"] == "ok"


def test_other_paths_and_bodies_too_large_are_refused(judge):
    assert httpx.get(f"{judge.url}/").status_code == 404
    for length in ("1" + "0" * 12, "9" * 5000, "-1", "x"):
        connection = HTTPConnection(judge.url.removeprefix("http://"))
        connection.putrequest("POST", "/judge")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()
    with pytest.raises(UserError, match="no problem 'nothing'"):
        judge([("nothing", "")])


SCRIPT = """
import sys
from gemma4_tpu.evals.reward import JudgeProcess
judge = JudgeProcess(*sys.argv[1:])
print(judge._process.pid, flush=True)
print(judge([({name!r}, {completion!r})])[0]["passed"], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGKILL])
def test_it_needs_no_guard_and_leaves_nothing_however_its_caller_ends(number, words, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(name=PROBLEMS[0].name, completion=honest(PROBLEMS[0])))
    caller = subprocess.Popen(
        [sys.executable, script, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(caller.stdout.readline())
    assert caller.stdout.readline() == "True\n"
    pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    assert len(pids) >= 3
    caller.stdin.close() if number is None else caller.send_signal(number)
    caller.wait(60)
    caller.stdout.close()
    assert all(ends(pid, seconds=60) for pid in pids)


def test_a_judge_that_is_killed_is_one_message(words):
    judge = JudgeProcess(*words)
    os.kill(judge._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="has ended"):
        judge([(PROBLEMS[0].name, "")])
    judge.close()


def test_on_the_command_line_it_stops_on_sigterm(words):
    command = [sys.executable, "-m", "gemma4_tpu.judge", *words, "port=0"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    url = process.stdout.readline().removeprefix(ANNOUNCEMENT).strip()
    assert httpx.get(f"{url}/health").json()["problems"] == 4
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED), (signal.SIGUSR2, TERMINATED)],
)  # fmt: skip
def test_stopped_before_it_is_ready_it_says_so(number, code, words, tmp_path):
    started = tmp_path / "started"
    for name in ("iverilog", "vvp"):  # which never answers
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch '{started}'\nexec sleep 300\n")
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, "-m", "gemma4_tpu.judge", *words, "port=0", f"eval.judge.iverilog={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    said, errors = process.communicate(timeout=100)
    assert process.returncode == code and said == "" and "interrupted" in errors and "Traceback" not in errors


def test_what_does_not_start_is_one_message():
    with pytest.raises(UserError, match=r"eval\.benchmark=nothing: not a choice"):
        JudgeProcess("eval.benchmark=nothing")


def test_a_canary_that_passes_ends_it(monkeypatch, judge_of_tests):
    canaries.try_canaries(judge_of_tests)
    monkeypatch.setitem(canaries.CHEATS, "is right", reference_as_answer(canaries.problem()))
    with pytest.raises(UserError, match="passes a design that is right; it is not fit to serve"):
        canaries.try_canaries(judge_of_tests)


@pytest.fixture
def judge_of_tests(tmp_path):
    from gemma4_tpu.config.tasks import JudgeConfig
    from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge

    with VerilogJudge(JudgeConfig(workers=2, cache_dir=str(tmp_path))) as judge:
        yield judge


@pytest.mark.slow
def test_memory_stays_flat(judge):
    """40,000 verdicts on texts that nobody had before; what is remembered is bounded by `REMEMBERED`."""
    process = psutil.Process(judge._process.pid)

    def rss() -> int:
        return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])

    def ask(start: int, count: int) -> None:
        judge([(PROBLEMS[0].name, json.dumps(number)) for number in range(start, start + count)])

    ask(0, 20_000)  # fills the memory of verdicts
    before = rss()
    for start in range(20_000, 60_000, 5_000):
        ask(start, 5_000)
    assert rss() < before * 1.1 + (20 << 20)
