"""What nothing in a process can interrupt ends it with one message, and leaves neither processes nor files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from gemma4_tpu.assets import ROOT
from gemma4_tpu.data import hard_limit as limits
from gemma4_tpu.data import overseer
from gemma4_tpu.data.chat import ChatFormat
from gemma4_tpu.data.tokenizer import limited_parts, load_tokenizer
from gemma4_tpu.errors import OVERRUN, REFUSED, UserError
from gemma4_tpu.tracking.records import result_of
from tests.data.conftest import chat_row
from tests.evals.server import Server
from tests.ports import free_port
from tests.processes import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

NESTED = "{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
LISTS = "{% set ns = namespace(a=[], b=[]) %}" + NESTED
TEMPLATES = {
    "comparison": LISTS + "{{ ns.a == ns.b }}",
    "hash": "{% set ns = namespace(a=()) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}"
    "{{ {ns.a: 1} }}",
    "json": LISTS + "{{ ns.a | tojson }}",
    "constant": "{% if 9**(9**9) %}{% endif %}",
    "search": "{% set x = 'a' * 200000000 %}{{ (('a' * 1000000) ~ 'b' ~ ('a' * 1000000)) in x }}",
    "sort": "{{ ((range(99999) | list) * 1500) | sort | length }}",
    "regular expression": "{{ ('<' ~ ' a' * 50000) | striptags | length }}{{ ('a' * 100000000) | wordwrap(1) }}",
    "width": "{{ '%1999999999d' % 1 }}{{ 'x'.center(1999999999) }}",
    "text": "{{ ('a' * 50000).replace('a', 'b' * 90000) }}",
}
ENDLESS = ("comparison", "hash", "json")
"""Nothing interrupts these."""
QUICK = ("comparison", "json")
SLOW, FAILING = "(?:a|a){1,22}(?<!a)", "(?:a|a)+(?<!a)"
"""Backtrack 4 million times from each place, and more often than the library permits in one place."""
SOFT, HARD = 1.0, 2.5  # seconds; a template's first use takes a few hundredths, on a busy machine ten times that
KILLED = OVERRUN  # by the signal of this number
RUN = f"""
import sys
from gemma4_tpu.data import timeout, tokenizer
timeout.ROW_SECONDS, tokenizer.SECONDS = {SOFT}, {HARD}
tokenizer.BYTES = 2**30
from gemma4_tpu import evaluate, serve, train
sys.exit({{"train": train, "evaluate": evaluate, "serve": serve}}[sys.argv[1]].main(sys.argv[2:]))
"""


@pytest.fixture
def checkpoint(tmp_path):
    """Makes the tiny checkpoint hostile: what its template does to the word `go`, or what its tokenizer does first."""

    def make(*, template="", normalizers=(), splits=""):
        folder = tmp_path / "downloaded"
        shutil.copytree(ROOT / "tiny", folder, ignore=shutil.ignore_patterns("__*"))
        if template:
            path = folder / "chat_template.jinja"
            path.write_text("{% if 'go' in messages[0].content %}" + template + "{% endif %}" + path.read_text())
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        if normalizers:
            tokenizer["normalizer"] = {"type": "Sequence", "normalizers": list(normalizers)}
        if splits:
            split = {"type": "Split", "pattern": {"Regex": splits}, "behavior": "Isolated", "invert": False}
            tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
        path.write_text(json.dumps(tokenizer))
        return folder

    return make


def replaced(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def run(command, *words, cwd):
    temporary = cwd / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, command, *words],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    try:
        done = subprocess.CompletedProcess(process.args, 0, *process.communicate(timeout=300))
    finally:
        process.kill()
    done.returncode = process.returncode
    print(done.stderr)
    wait_for(lambda: not overseers(process.pid), seconds=10)  # it looks for its parent ten times a second
    assert [one.name for one in temporary.iterdir() if one.name.startswith("gemma4")] == []
    return done


def overseers(parent):
    """Processes that oversee this one: their last argument is its id."""
    found = ((one, one.info["cmdline"] or [""]) for one in psutil.process_iter(["cmdline"]))
    return [one for one, words in found if overseer.__file__ in words and words[-1] == str(parent)]


def preview(folder, path, cwd, *words):
    return run(
        "train", "preview=true", "data=chat_jsonl", f"data.train.0.path={path}", f"model.tokenizer={folder}",
        "data.sequence_length=2048", *words, cwd=cwd,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in TEMPLATES]
)
def test_a_template_that_cannot_be_interrupted_ends_in_one_message(kind, checkpoint, write_jsonl, tmp_path):
    folder = checkpoint(template=TEMPLATES[kind])
    path = write_jsonl([*[chat_row(f"add {i}", "5") for i in range(6)], chat_row("go", "5")])
    done = preview(folder, path, tmp_path, "data.max_drop_fraction=0")
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    if not told:  # the alarm could interrupt it, or memory came to its end: the row is dropped
        assert kind not in ENDLESS and done.returncode == 0
        assert "dropped: 1 (14.3%)" in done.stdout and f"{path}:7 (more than" in done.stdout
    elif kind in ENDLESS:
        whose = f"the chat template of {folder} takes more than {HARD:g} s, and cannot be interrupted; use the original"
        assert done.returncode == KILLED and told == [f"error: {path}:7: {whose} checkpoint's template"]
    else:  # in an expression of constants, which jinja computes before the first row
        assert done.returncode == (KILLED if "the chat template of" in told[0] else REFUSED) and len(told) == 1
        assert "cannot render a single question (too_" in told[0] or "the chat template of" in told[0]


def test_lm_eval_is_not_started_with_a_template_that_cannot_be_interrupted(checkpoint, tmp_path, monkeypatch):
    folder, started = checkpoint(template=TEMPLATES["comparison"]), tmp_path / "started"
    program = tmp_path / "bin/lm_eval"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with Server(lambda *_: "5") as server:
        words = ["eval=lm_eval", "eval.tasks=[toy]", f"model.tokenizer={folder}", f"eval.endpoint={server.url}"]
        done = run("evaluate", *words, "eval.system=go", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == KILLED and len(told) == 1 and not started.exists()
    assert told[0].startswith(f"error: the chat template of {folder} takes more than {HARD:g} s, and cannot be")


def test_a_tokenizer_that_backtracks_for_hours_ends_in_one_message(checkpoint, write_jsonl, tmp_path):
    folder = checkpoint(splits=SLOW)
    path = write_jsonl([chat_row("add", "5"), chat_row("a" * 1000, "5")])
    done = preview(folder, path, tmp_path)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == KILLED and len(told) == 1
    assert told[0].startswith(f"error: {path}:1 to 2: the tokenizer of {folder} takes more than {HARD:g}")
    assert "model.tokenizer=<folder>" in told[0]


def test_a_tokenizer_that_multiplies_a_text_ends_in_one_message(checkpoint, write_jsonl, tmp_path):
    grow = [replaced({"String": "a"}, "a" * 100) for _ in range(5)]
    folder = checkpoint(normalizers=grow)
    done = preview(folder, write_jsonl([chat_row("go aaa", "5")] * 2), tmp_path)
    assert done.returncode == KILLED
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"the tokenizer of {folder} takes more than" in told


def test_a_tokenizer_whose_library_gives_up_is_refused(checkpoint):
    folder = checkpoint(normalizers=[replaced({"Regex": FAILING}, "b")])
    chat = ChatFormat(load_tokenizer(str(folder)))
    for encode in (lambda text: chat.encode([text]), load_tokenizer(str(folder))):
        with pytest.raises(UserError, match=rf"the tokenizer of {folder} fails \(.*retry-limit.*; use the original"):
            encode("a" * 100)


@pytest.mark.parametrize("hostile", [{"template": TEMPLATES["comparison"]}, {"splits": SLOW}], ids=["template", "text"])
def test_evaluation_ends_in_one_message_too(hostile, checkpoint, write_jsonl, tmp_path):
    folder = checkpoint(**hostile)
    rows = write_jsonl([{"prompt": "go " + "a" * 1000, "completion": "5"}])
    done = run(
        "evaluate", f"model.path={folder}", "eval=accuracy", f"eval.problems_path={rows}", "eval.max_new_tokens=2",
        cwd=tmp_path,
    )  # fmt: skip
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == KILLED and ("splits" in hostile or told.startswith("error: problem "))
    assert f"{'tokenizer' if 'splits' in hostile else 'chat template'} of {folder} takes more than {HARD:g}" in told


@pytest.mark.slow
def test_the_embedded_server_ends_in_one_message(checkpoint, tmp_path):
    folder, port = checkpoint(splits=SLOW), free_port()

    def ask():
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while True:
                try:
                    if client.get("/health").status_code == httpx.codes.OK:
                        client.post("/tokenize", json={"prompt": "a" * 1000})
                        return
                except httpx.RemoteProtocolError:  # it has ended
                    return
                except httpx.TransportError:
                    time.sleep(0.1)

    threading.Thread(target=ask, daemon=True).start()
    words = ["serving=local", f"run={folder}", f"serving.port={port}", f"run_dir={tmp_path / 'record'}"]
    done = run("serve", *words, cwd=tmp_path)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == KILLED and len(told) == 1
    assert told[0].startswith(f"error: the tokenizer of {folder} takes more than {HARD:g}")


@pytest.mark.slow
def test_training_ends_in_one_message_and_the_same_command_runs_again(checkpoint, write_jsonl, tmp_path):
    folder = checkpoint(template=TEMPLATES["hash"])
    path = write_jsonl([chat_row("go", "5")] * 4)
    words = [
        "train", "data=chat_jsonl", f"data.train.0.path={path}", f"model.path={folder}", "trainer.max_updates=1",
        f"run_dir={tmp_path / 'run'}", "data.sequence_length=128", "trainer.global_batch_sequences=2",
        "trainer.microbatches=1", "data.heldout_fraction=0",
    ]  # fmt: skip
    for _ in range(2):  # the folder's lock is free
        done = run(*words, cwd=tmp_path)
        shutil.rmtree(tmp_path / "temporary")
        (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == KILLED and told.startswith(f"error: {path}:1: the chat template of {folder}")
        record = result_of(tmp_path / "run")
        assert record.kind == "training" and record.values == {"status": "failed", "error": told[len("error: ") :]}
    shutil.copy(ROOT / "tiny/chat_template.jinja", folder)
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0 and result_of(tmp_path / "run").values["status"] == "finished"


def test_ordinary_pieces_are_never_ended_and_a_stopped_process_does_not_count():
    """Many short pieces take longer together than one may; so does one that was stopped."""
    code = """
import time
from gemma4_tpu.data.hard_limit import hard_limit
until = time.monotonic() + 3
while time.monotonic() < until:
    with hard_limit("who", "remedy", seconds=1.5, most_bytes=2**30):
        time.sleep(0.01)
with hard_limit("who", "remedy", seconds=3, most_bytes=2**30):
    print("ready", flush=True)
    time.sleep(1.5)
print("done", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    both = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    assert len(both) == 2
    for one in both:
        one.suspend()
    time.sleep(4)
    for one in reversed(both):  # the first may end at once, and the other with it
        one.resume()
    assert process.wait(60) == 0 and process.stdout.read() == "done\n"
    _, alive = psutil.wait_procs(both[1:], timeout=10)
    assert alive == []


def test_threads_have_their_own_limits_and_a_signals_exception_frees_the_main_ones():
    import threading

    def piece(results):
        for _ in range(200):
            with limits.hard_limit("who", "remedy", seconds=30, most_bytes=2**30):
                results.append(sum(count % 2 for count in limits._watched.counters))

    found = []
    threads = [threading.Thread(target=piece, args=[found]) for _ in range(2 * overseer.SLOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(found) < overseer.SLOTS and not any(count % 2 for count in limits._watched.counters)
    limits._watched.counters[0] += 1  # as if an exception had arrived before the end
    limits.release()
    assert not any(count % 2 for count in limits._watched.counters)


def test_nothing_but_whole_scratch_folders_is_ever_removed(monkeypatch):
    """Neither a part of a long path, which is another folder, nor what a name pretends to be."""
    made = ["/" + "é" * 600, "/t/" + "b" * 1500, "/t/" + "c" * 1500, os.fsdecode(b"/t/\xff")]
    monkeypatch.setattr(limits.scratch, "made", lambda: made)
    monkeypatch.setattr(limits, "_result", ("training", Path("/" + "r" * 4000)))
    who = limits.shown("problem \0remedy\0/home/" + "語" * 600)
    text = limits._record(f"{who}: {who}: {who}", "remedy")
    assert len(text) <= overseer.RECORD_BYTES - overseer.RECORD.size
    told, remedy, kind, result, *folders = text.split(b"\0")
    assert (remedy, kind, result) == (b"remedy", b"", b"") and told.decode().endswith("語")
    assert folders and set(folders) < set(map(os.fsencode, made)) and folders[-1] == b"/t/\xff"
    assert "\0" not in limits.shown("a\0/home") and limits.shown("a\ud800") == "a\\ud800"


def test_the_result_of_a_finished_run_stays(tmp_path):
    path = tmp_path / "result.json"
    for before, after in (('{"status": "finished"}', "finished"), ("{", "failed"), (None, "failed")):
        path.unlink() if before is None else path.write_text(before)
        overseer.leave_result(str(path), "evaluation", "why")
        assert json.loads(path.read_text())["status"] == after
    assert [one.name for one in tmp_path.iterdir()] == ["result.json"]


def test_process_1_of_a_container_ends_by_its_time():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    overseer.kill(process.pid, is_first=True)
    assert process.wait(30) in (-signal.SIGKILL, -signal.SIGXCPU)


def test_work_goes_on_unwatched_where_no_process_can_be_started(monkeypatch, caplog):
    monkeypatch.setattr(limits, "_watched", None)
    monkeypatch.setattr(limits.sys, "executable", "/nowhere")
    with limits.hard_limit("who", "remedy", seconds=30, most_bytes=2**30):
        assert limits._watched.counters[0] == 1
    limits._watched.close()
    assert "are not watched, since no process can be started: [Errno 2]" in caplog.text


def test_parts_are_consecutive_and_small():
    texts = ["a" * 10, "b" * 750_000, "c" * 750_000, "d" * 2_250_000, "", "e"]
    parts = list(limited_parts(texts))
    assert [text for part in parts for text in part] == texts
    assert [[len(text) for text in part] for part in parts] == [[10, 750_000], [750_000], [2_250_000], [0, 1]]
    assert list(limited_parts([])) == []
