"""A server as a teacher: what it tells of given rows, kept, and learnt from without it."""

import json
import re
from dataclasses import replace

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from gemma4_tpu.config.schema import DataConfig, DataSource, ObjectiveConfig
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.errors import UserError
from gemma4_tpu.rollouts import served_teacher
from gemma4_tpu.rollouts.served_teacher import ServedTeacher
from gemma4_tpu.serving.local_api import Api
from gemma4_tpu.serving.local_metrics import Metrics
from gemma4_tpu.step.distill import TOP_LOGPROBS, TOP_TOKENS
from tests.rollouts.test_distill_runs import SHORT
from tests.rollouts.test_runs import metrics
from tests.serving.conftest import tiny_engine  # noqa: F401 (a fixture)
from tests.training.conftest import cache, shallow  # noqa: F401 (fixtures)

TOP = 8
ADDRESS = "http://local/v1"
ROWS = DataConfig(
    train=[DataSource(path="embedded:verilog_smoke/train.jsonl.gz")], max_rows=12, heldout_fraction=0.3,
    sequence_length=256,
)  # fmt: skip


@pytest.fixture
def teacher(tiny_engine, monkeypatch, tmp_path):  # noqa: F811
    """Behind the embedded server; `teacher.asked` are the paths of requests."""
    asked = []

    def noted():
        made = TestClient(Api(tiny_engine, Metrics("m"), "m", 400, key=None).app(), base_url=ADDRESS)
        made.event_hooks = {"request": [lambda request: asked.append(request.url.path)]}
        return made

    monkeypatch.setattr(served_teacher, "open_client", noted)
    objective = ObjectiveConfig(
        kind="distill_offline", teacher=ADDRESS, teacher_top=TOP, teacher_store=str(tmp_path / "told")
    )
    return ServedTeacher(objective, tiny_engine.tokenizer), asked


@pytest.mark.slow
def test_what_it_tells_is_kept_and_learnt_from_without_it(teacher, tiny_engine, shallow, tmp_path):  # noqa: F811
    served, asked = teacher
    data = build_data(ROWS, tiny_engine.tokenizer)
    told = served.tell(data.train)
    tokens, logprobs = told.beside[TOP_TOKENS], told.beside[TOP_LOGPROBS]
    assert tokens.shape == logprobs.shape == (len(told.tokens), TOP)
    ids, flags = told.example(0)
    place = int(np.flatnonzero(flags)[3])
    body = {"model": "m", "prompt": ids[:place].tolist(), "max_tokens": 1, "temperature": 0, "logprobs": TOP}
    answer = served_teacher.open_client().post("completions", json=body | {"return_tokens_as_token_ids": True}).json()
    next_ = answer["choices"][0]["logprobs"]["top_logprobs"][0]  # of the same place, behind a prompt that ends there
    assert {f"token_id:{token}" for token in tokens[place]} == {*next_}
    np.testing.assert_allclose(logprobs[place], sorted(next_.values(), reverse=True), atol=1e-4)
    assert not logprobs[place - place % len(ids)].any()  # nothing is told of what is no target

    served.tell(data.heldout)
    asked.clear()
    path = next((tmp_path / "told").iterdir())
    path.write_bytes(path.read_bytes()[:-30])  # killed while it was written
    assert served.tell(data.train).fingerprint == told.fingerprint
    assert not [one for one in asked if "completions" in one]
    served.tell(data.heldout)
    assert len([one for one in asked if "completions" in one]) == 1

    run = tmp_path / "run"
    words = [
        "objective=distill_offline", f"objective.teacher={ADDRESS}", f"objective.teacher_top={TOP}",
        f"objective.teacher_store={tmp_path / 'told'}", "objective.teacher_model=m", "data.heldout=[]",
        "data.heldout_fraction=0.3", "data.max_rows=12", "trainer.max_updates=8", f"run_dir={run}",
    ]  # fmt: skip
    shallow(*[word for word in SHORT if "teacher" not in word and "max_rows" not in word], *words, cwd=tmp_path)
    heldout = [row["heldout_loss"] for row in metrics(run) if "heldout_loss" in row]
    assert heldout[-1] < heldout[0] - 0.05


def test_a_server_with_another_vocabulary_or_without_log_probabilities_is_refused(monkeypatch, tmp_path):
    tokenizer = load_tokenizer("embedded:tiny")
    train = build_data(replace(ROWS, heldout_fraction=0.0), tokenizer).train
    objective = ObjectiveConfig(
        kind="distill_offline", teacher=ADDRESS, teacher_top=TOP, teacher_store=str(tmp_path), teacher_model="m"
    )

    def refused(tokenize, complete):
        def answer(request):
            asked = json.loads(request.content)
            return tokenize(asked["prompt"]) if request.url.path == "/tokenize" else complete(asked["prompt"])

        monkeypatch.setattr(
            served_teacher, "open_client", lambda: httpx.Client(transport=httpx.MockTransport(answer))
        )  # fmt: skip
        with pytest.raises(UserError, match=re.escape(f"objective.teacher={ADDRESS}: ")) as found:
            ServedTeacher(objective, tokenizer).tell(train)
        return str(found.value)

    def own(text):
        return httpx.Response(200, json={"tokens": tokenizer(text, add_special_tokens=False)["input_ids"]})

    nothing = httpx.Response(200, json={"choices": [{"text": "a", "logprobs": None}]})
    others = httpx.Response(200, json={"tokens": [1, 2, 3]})
    assert "as the tokens [1, 2, 3]" in refused(lambda _: others, lambda _: nothing)
    assert f"its {TOP} likeliest tokens at every place" in refused(own, lambda _: nothing)
    few = httpx.Response(200, json={"choices": [{"logprobs": {"top_logprobs": [{"token_id:1": -1.0}] * 300}}]})
    assert "smaller objective.teacher_top" in refused(own, lambda _: few)
    impossible = [{f"token_id:{i}": -1.0 if i < 7 else -np.inf for i in range(TOP)}] * 300
    content = json.dumps({"choices": [{"logprobs": {"top_logprobs": impossible}}]}).encode()
    assert "7 tokens of 8 with a finite" in refused(own, lambda _: httpx.Response(200, content=content))
    assert "500" in refused(own, lambda _: httpx.Response(500))
    assert "404" in refused(lambda _: httpx.Response(404), lambda _: nothing)
