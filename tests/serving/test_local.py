"""The embedded server, a process of its own, driven by OpenAI's client: alone, at once, streamed, refused, left."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import partial

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving_load import drive
from gemma4_tpu import Gemma4
from gemma4_tpu.evaluate import main as evaluate
from tests.ports import free_port
from tests.processes import wait_for
from tests.serving import TINY

LONGEST = 320  # the tiny model's window is 128 tokens
PROMPTS = ["module a", "module adder(input [3:0] a, input [3:0] b, output [4:0] y);\n" * 7, "x", "assign y ="]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 24}


get, post = (partial(method, timeout=120) for method in (httpx.get, httpx.post))


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Servers that were started, of which the last may run: three answers at a time, prompts read 50 tokens at a time;
    and what starts another one.
    """
    started = []

    def start():
        folder, port = tmp_path_factory.mktemp("local"), free_port()
        words = ["serving=local", f"run={TINY}", f"serving.port={port}", f"run_dir={folder / 'record'}"]
        words += ["serving.max_num_seqs=3", "serving.max_num_batched_tokens=50", f"serving.max_model_len={LONGEST}"]
        with (folder / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "gemma4_tpu.serve", *words, "name=servings"], stdout=subprocess.PIPE,
                stderr=stderr, text=True,
            )  # fmt: skip
        process.record, process.url, process.log = folder / "record", f"http://127.0.0.1:{port}", folder / "stderr"
        process.told = []
        started.append(process)

    start()
    yield started, start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def server(servers, reference):  # the reference is loaded meanwhile
    """(process, URL) of one that answers: another one after the test that ends it, wherever its worker has that."""
    started, start = servers
    if started[-1].poll() is not None:
        start()
    process = started[-1]
    process.told = process.told or [process.stdout.readline(), process.stdout.readline()]
    assert process.told == [f"endpoint: {process.url}/v1\n", "model: tiny\n"], process.log.read_text()
    return process, process.url


@pytest.fixture
def url(server):
    return server[1]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def reference(servers):
    """transformers' own greedy tokens for a prompt's tokens."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    model.tokenizer = AutoTokenizer.from_pretrained(TINY)

    def tokens(prompt, count, **more):
        given = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": count, **more}
        return model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(prompt) :].tolist()

    tokens.tokenizer = model.tokenizer
    return tokens


def ids(choice):
    return [int(name.removeprefix("token_id:")) for name in choice.logprobs.tokens]


WITH_IDS = {"logprobs": 1, "extra_body": {"return_tokens_as_token_ids": True, "ignore_eos": True}}


def test_greedy_tokens_are_those_of_transformers_alone_and_among_others(client, url, reference):
    encoded = [reference.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert max(map(len, encoded)) > 150  # longer than window and than a step's budget
    wanted = [reference(prompt, 24, eos_token_id=[]) for prompt in encoded]
    alone = [ids(client.completions.create(prompt=one, **GREEDY, **WITH_IDS).choices[0]) for one in PROMPTS]
    assert alone == wanted

    async def at_once():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as many:
            given = [*PROMPTS, *encoded] * 2  # tokens stand for the text that they are of
            asked = [
                many.completions.create(prompt=p, **GREEDY | {"max_tokens": 24 - i}, **WITH_IDS)
                for i, p in enumerate(given)
            ]
            return [ids(answer.choices[0]) for answer in await asyncio.gather(*asked)]

    assert asyncio.run(at_once()) == [tokens[: 24 - i] for i, tokens in enumerate(wanted * 4)]
    several = client.completions.create(prompt=PROMPTS, **GREEDY, **WITH_IDS)
    assert [ids(choice) for choice in several.choices] == wanted
    assert several.usage.prompt_tokens == sum(map(len, encoded))
    assert several.usage.completion_tokens == 24 * len(PROMPTS)


def test_chat_renders_the_template_and_ends_where_the_model_ends(client, reference):
    turns = [{"role": "user", "content": [{"type": "text", "text": "Write a module."}]}]
    given = reference.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write a module."}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    wanted = reference(given, LONGEST - len(given))
    answer = client.chat.completions.create(messages=turns, model="tiny", temperature=0)
    assert answer.choices[0].message.content == reference.tokenizer.decode(wanted, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == len(given)
    assert answer.usage.completion_tokens == len(wanted)
    assert answer.choices[0].finish_reason == ("stop" if len(wanted) < LONGEST - len(given) else "length")


def test_a_stream_is_the_same_answer_in_a_chunk_per_token(client, url):
    whole = client.completions.create(prompt="module a", **GREEDY)
    usage = {"include_usage": True}
    chunks = list(client.completions.create(prompt="module a", **GREEDY, stream=True, stream_options=usage))
    *parts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == whole.choices[0].text
    assert len(parts) == whole.usage.completion_tokens == last.usage.completion_tokens
    assert last.choices == []
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
    raw = post(f"{url}/v1/chat/completions", json=body).text
    assert raw.endswith("data: [DONE]\n\n")
    first = json.loads(raw.splitlines()[0].removeprefix("data: "))
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "usage" not in first


def test_stop_strings_end_the_text_before_them(client):
    text = client.completions.create(prompt="module a", **GREEDY).choices[0].text
    stop = text[8:11]
    for stream in (False, True):
        answer = client.completions.create(prompt="module a", **GREEDY, stop=[stop, "never"], stream=stream)
        parts = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(part.text for part in parts) == text[: text.index(stop)]
        assert parts[-1].finish_reason == "stop"


def test_seeds_draw_the_same_again_and_choices_differ(client):
    ask = {"model": "tiny", "prompt": "module a", "temperature": 1.5, "max_tokens": 16, "n": 3}
    first, again = (client.completions.create(**ask, seed=7) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert texts[1] == client.completions.create(**ask | {"n": 1}, seed=8).choices[0].text
    assert texts != [choice.text for choice in client.completions.create(**ask, seed=70).choices]
    likeliest = client.completions.create(prompt="module a", **GREEDY).choices[0].text
    surely = client.completions.create(prompt="module a", **GREEDY | {"temperature": 2, "top_p": 1e-6}).choices[0].text
    assert surely == likeliest


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"model": "gpt-4"}, 404, "'gpt-4' does not exist; this server has 'tiny'"),
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": []}, 400, "prompt is empty"),
        ({"prompt": [5, 512]}, 400, "token ids are from 0 to 511"),
        ({"prompt": [5] * (LONGEST + 1)}, 400, f"maximum context length is {LONGEST} tokens"),
        ({"prompt": [5] * 300, "max_tokens": 21}, 400, "has 300 and 21 more"),
        ({"prompt": "x" * 10**6}, 400, "has 1000000 characters"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater"),
        ({"temperature": -1}, 400, "temperature:"),
        ({"best_of": 2}, 400, "best_of is not supported"),
        ({"stop": 5}, 400, "stop"),
    ],
)
def test_refusals_are_openais(url, changes, status, told):
    answer = post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x"} | changes)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert told in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_what_is_no_request_is_refused(url, client):
    bad = post(f"{url}/v1/completions", content=b'{"prompt": ', headers={"content-type": "application/json"})
    assert (bad.status_code, bad.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "not readable JSON" in bad.json()["error"]["message"]
    assert get(f"{url}/v1/nothing").status_code == 404
    assert get(f"{url}/v1/completions").status_code == 405
    with pytest.raises(openai.BadRequestError, match="reads text only"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        )
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_health_and_metrics_count(url, client):
    before = counted(url)
    client.completions.create(prompt="module a", **GREEDY, extra_body={"ignore_eos": True})
    after = counted(url)
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 24
    assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == 3
    # an answer is told before its place is given up
    wait_for(lambda: get(f"{url}/health").json() == {"status": "ready", "running": 0, "waiting": 0})


def counted(url):
    """Each metric's name and value; those with several labels are summed."""
    found = Counter()
    for line in get(f"{url}/metrics").text.splitlines():
        if "{" in line:
            found[line.split("{")[0]] += float(line.split()[-1])
    return found


def test_a_client_that_leaves_ends_its_answer(url):
    body = {"prompt": [5], "max_tokens": LONGEST - 1, "temperature": 0, "ignore_eos": True, "n": 40}
    before = counted(url)["vllm:generation_tokens_total"]
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.3)
    wait_for(lambda: not any(get(f"{url}/health").json()[key] for key in ("running", "waiting")))
    assert counted(url)["vllm:generation_tokens_total"] - before < 40 * (LONGEST - 1)  # of twice as many


@pytest.mark.slow  # loads and compiles the model in this process, too
def test_choices_are_as_likely_here_as_in_process_and_by_logits(url, tmp_path):
    """`eval=accuracy` by likelihoods."""
    choices = ["module a; endmodule", "assign y = a & b;", "assign y = a"]
    rows = [{"question": text, "choices": choices, "answer": choices[1]} for text in ("Write an and gate.", "And?")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval=accuracy", f"eval.problems_path={path}", "eval.answers.choices=choices"]
    words += ["eval.answers.choose=logprob", "eval.batch_size=4"]
    subjects = {
        "here": ["model.path=embedded:tiny"],
        "there": [f"eval.endpoint={url}/v1", "model.tokenizer=embedded:tiny"],
    }
    stored = {}
    for name, subject in subjects.items():
        assert evaluate([*words, *subject, f"run_dir={tmp_path / name}"]) == 0
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        stored[name] = {row["problem"]: row for row in map(json.loads, lines)}
    assert len(stored["here"]) == 2 and stored["here"].keys() == stored["there"].keys()
    model = Gemma4.load("embedded:tiny")
    for problem, row in stored["here"].items():
        asked = [{"role": "user", "content": rows[int(problem.split("-")[0]) - 1]["question"]}]
        prompt = model.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        before = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for choice, own, other in zip(choices, row["choices"], stored["there"][problem]["choices"], strict=True):
            answer = model.tokenizer(f"{choice}<turn|>", add_special_tokens=False)["input_ids"]
            (logits,) = model.logits([before + answer])
            scores = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            expected = sum(scores[len(before) - 1 + i, token] for i, token in enumerate(answer))
            assert own["tokens"] == other["tokens"] == len(answer)
            # Float32 sums of some 20 terms of about 5, each of logits that transformers' agree with to 3e-4.
            assert own["logprob"] == pytest.approx(expected, abs=2e-3)
            assert other["logprob"] == pytest.approx(expected, abs=2e-3)
        assert row["completion"] == max(zip(row["choices"], choices, strict=True), key=lambda p: p[0]["logprob"])[1]


def test_many_users_at_once_and_nothing_of_them_stays(server):
    """A short form of benchmarks/serving_load.py: too short to tell a leak of memory from a pool that fills."""
    process, url = server
    before = counted(url)
    load = drive(url, process.pid, users=24, seconds=4, growth_mib=500)
    assert load.leaks == []
    assert load.ended["failed"] == 0, load.failures
    assert sum(load.ended.values()) >= 24 and all(load.ended[how] for how in ("completed", "left", "refused"))
    after = counted(url)
    ended = after["vllm:request_success_total"] - before["vllm:request_success_total"]
    assert ended == load.ended["completed"] + load.ended["left"]
    assert {after[f"vllm:prefix_cache_{kind}_total"] for kind in ("hits", "queries")} == {0}  # there is none


def test_sigterm_ends_streams_and_server_within_seconds(server):
    process, url = server
    body = {"prompt": [5], "max_tokens": LONGEST - 1, "ignore_eos": True, "n": 40, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        threading.Timer(0.1, process.send_signal, [signal.SIGTERM]).start()
        rest = [line for line in lines if line]
    assert "the server is stopped" in rest[-1]
    assert process.wait(timeout=60) == 0  # all that was asked for takes minutes
    result = json.loads((process.record / "result.json").read_text())
    assert (result["status"], result["slice"], result["model"]) == ("stopped", "local", "tiny")
