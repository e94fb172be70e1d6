"""The embedded server's engine in this process: every kind of Gemma 4, text as it grows, drawing, failing."""

import asyncio
import queue
import shutil
import time
from functools import reduce

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from gemma4_tpu.serving.local_api import Api
from gemma4_tpu.serving.local_engine import FAILED, LOADING, READY, LocalEngine
from gemma4_tpu.serving.local_metrics import Metrics
from gemma4_tpu.serving.local_sampling import ABORT, ERROR, AnswerSampling, GeneratedAnswer, choose, logprob
from gemma4_tpu.serving.local_text import AnswerText, GrowingText, Grown
from tests.models.checkpoints import UNIFIED, load_hf, make_checkpoint
from tests.processes import wait_for
from tests.serving import TINY


@pytest.fixture
def engine():
    made = []

    def make(folder, **more):
        made.append(LocalEngine(folder, "float32", Metrics("m"), **{"sequences": 3, "prompt_tokens": 16} | more))
        made[-1].start()
        while made[-1].state == LOADING:
            time.sleep(0.02)
        assert made[-1].state == READY, made[-1].error
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_an_engine_that_was_never_started_ends(tmp_path):
    LocalEngine(tmp_path, "float32", Metrics("m"), sequences=3, prompt_tokens=16).stop()


class Asked:
    """An answer and what was told of it."""

    def __init__(self, engine, prompt, count, **more):
        self.told = queue.SimpleQueue()
        sampling = AnswerSampling(max_tokens=count, **{"temperature": 0, "ignore_eos": True} | more)
        self.answer = GeneratedAnswer(prompt, sampling, self.told.put)
        engine.submit(self.answer)

    def pieces(self):
        found = [self.told.get(timeout=120)]
        while found[-1].finish is None:
            found.append(self.told.get(timeout=120))
        return found


@pytest.mark.parametrize("kind", ["e2b", UNIFIED])
def test_answers_side_by_side_are_those_that_transformers_gives(kind, engine, tmp_path):
    """KV-shared layers, the multimodal classes; prompts that join late and leave early, beyond the window."""
    folder = tmp_path / kind
    shutil.copytree(make_checkpoint(kind, prefix="multimodal"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    draw, model, made = torch.Generator().manual_seed(1), load_hf(folder), engine(folder)
    prompts = [torch.randint(6, 64, (n,), generator=draw).tolist() for n in (3, 40, 1, 17)]
    asked = [Asked(made, prompt, 4 + 3 * place) for place, prompt in enumerate(prompts)]
    for prompt, one in zip(prompts, asked, strict=True):
        given, count = torch.tensor([prompt]), one.answer.sampling.max_tokens
        with torch.inference_mode():
            wanted = model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, eos_token_id=[]
            )
        assert [token for piece in one.pieces() for token in piece.tokens] == wanted[0, len(prompt) :].tolist()
    wait_for(lambda: made.counts == (0, 0))  # the last piece is told before its answer leaves the batch


def test_an_engine_that_breaks_says_so_and_everyone_hears_it(engine, monkeypatch):
    made = engine(TINY)
    under_way = Asked(made, [5] * 3, 10**6)
    under_way.told.get(timeout=120)

    def broken(*_, **__):
        raise RuntimeError("out of everything")

    monkeypatch.setattr(made, "_forward", broken)
    pieces = under_way.pieces()
    assert (pieces[-1].finish, pieces[-1].error) == (ERROR, "the engine failed: out of everything")
    assert made.state == FAILED
    app = Api(made, Metrics("m"), "m", 100, key="s3cret").app()

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://local") as client:
            health = await client.get("/health")
            key = {"authorization": "Bearer s3cret"}
            answers = [await client.post("/v1/completions", json={"prompt": "x"}, headers=h) for h in (key, {})]
            return health, *answers

    health, answer, stranger = asyncio.run(ask())
    assert (health.status_code, health.json()["status"], health.json()["error"]) == (503, FAILED, "out of everything")
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert stranger.status_code == 401


def test_answers_given_up_make_room_for_those_that_wait(engine):
    made = engine(TINY, sequences=1)
    first, waiting, half_read = (Asked(made, [5] * n, 10**5) for n in (3, 3, 100))
    last = Asked(made, [5], 2)
    for one in (waiting, half_read, first):
        one.answer.aborted = True
    assert [one.pieces()[-1].finish for one in (first, waiting, half_read)] == [ABORT] * 3
    assert len(last.pieces()) == 2


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_text_grows_by_whole_characters_and_stops_before_a_stop_string(tokenizer):
    text = "assign y = a ≥ b; // größer\nendmodule"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    grown = GrowingText(tokenizer, [])
    parts = [grown.add(token) for token in tokens]
    assert "".join(parts) + grown.end() == text
    assert not any("\ufffd" in part for part in parts)
    for stop in ("≥ b", "r\nend", "e"):
        grown, parts = GrowingText(tokenizer, [stop, "never there"]), []
        for token in tokens:
            parts.append(grown.add(token))
            if grown.stopped:
                break
        assert "".join(parts) == text[: text.index(stop)]
        assert grown.end() == ""
    grown = GrowingText(tokenizer, ["endmodule;"])
    assert "".join([*map(grown.add, tokens), grown.end()]) == text  # held back, then told


def test_drawing_keeps_to_top_k_and_top_p_and_to_the_chances():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def shares(**sampling):
        answer = GeneratedAnswer([1], AnswerSampling(max_tokens=1, **sampling), lambda piece: None)
        answer.generator = torch.Generator().manual_seed(0)
        drawn = torch.tensor([choose(logits, answer) for _ in range(2000)])
        return (drawn.bincount(minlength=4) / 2000).tolist()

    near = 0.045  # four standard deviations of a share of 2000 draws, at most 0.0112 each
    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=near)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=near)
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=near)
    assert shares(top_k=3, top_p=0.5) == [1, 0, 0, 0]
    sharp = torch.tensor([0.25, 0.09, 0.0225, 0.0025])  # squared chances
    assert shares(temperature=0.5) == pytest.approx((sharp / sharp.sum()).tolist(), abs=near)
    assert shares(temperature=0) == [1, 0, 0, 0]
    told = logprob(logits, 2, 2)
    assert told.logprob == pytest.approx(float(logits[2]), abs=1e-6)
    assert [token for token, _ in told.top] == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "written", "content", "reasoning"),
    [
        ("", "<|channel>thought\ntwo and two\n<channel|>It is 4.<turn|>", "It is 4.", "two and two"),
        ("<|channel>thought\n", "two and two\n<channel|>It is 4.<turn|>", "It is 4.", "two and two"),
        ("<|channel>thought\n<channel|>", "It is 4.<turn|>", "It is 4.", ""),
        ("", "<|channel>thought\n<channel|>It is 4.", "It is 4.", ""),
        ("", "<|channel>thought\ncut off", "", "cut off"),
        ("", "<|channel>thoughtful words<channel|>It is 4.", "It is 4.", "thoughtful words"),
        ("", "no thought\nat all", "no thought\nat all", ""),
    ],
)
def test_thoughts_are_told_apart_in_a_chat(prompt, written, content, reasoning):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    before, ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"<|turn>model\n{prompt}", written)
    )
    text = AnswerText(tokenizer, [], before)
    assert told(text, ids) == Grown(content, reasoning)
    assert told(AnswerText(tokenizer, []), ids) == Grown(tokenizer.decode(ids, skip_special_tokens=True))


def told(text, ids):
    """All that an answer of these tokens tells."""
    return reduce(Grown.followed_by, [*map(text.add, ids), text.end()])
