"""What prompts are made of: a text, a beginning that all share, sessions that grow."""

import re

import numpy as np
import pytest

from gemma4_tpu.bench import BENCH
from gemma4_tpu.benching.prompts import PromptSource
from gemma4_tpu.config.load import load
from gemma4_tpu.errors import UserError
from tests.benching.conftest import cell


def drawn(source, count=6, warmup=2, input_tokens=12, output_tokens=4, users=1):
    return list(source.prompts(np.random.default_rng(0), count, warmup, input_tokens, output_tokens, users))


def test_random_prompts_share_nothing_but_what_they_are_told_to():
    plain, shared = drawn(PromptSource()), drawn(PromptSource(shared_tokens=5))
    assert {len(prompt) for prompt in plain + shared} == {12}
    assert len({prompt[0] for prompt in plain}) == 8
    assert len({tuple(prompt[:5]) for prompt in shared}) == 1 and len({prompt[5] for prompt in shared}) == 8
    assert min(map(min, plain)) >= 256 and max(map(max, plain)) < 512
    assert max(map(max, drawn(PromptSource(vocabulary=262_144)))) > 100_000


def test_a_session_goes_on_where_its_last_prompt_ended():
    prompts = drawn(PromptSource(turns=3, shared_tokens=2), count=12, users=2)
    assert [len(prompt) for prompt in prompts] == [12, 12, 28, 28, 44, 44] * 2 + [12, 12]
    for user in (0, 1):
        first, second, third, again = prompts[user:8:2]
        assert second[:12] == first and third[:28] == second
        assert again[:2] == first[:2] and again[2] != first[2]
    assert prompts[0][2] != prompts[1][2]


def test_what_the_server_is_sent(played, bench, tmp_path):
    text = tmp_path / "rows.txt"
    text.write_text("".join(chr(300 + place) for place in range(400)))
    server = played(cached=0.5)
    words = [f"bench.prompts={text}", "bench.lengths=[[16,4]]", "bench.rates=[]", "bench.users=[2]"]
    words += ["bench.requests=4", "bench.turns=2", "bench.shared_tokens=6"]
    code, folder, _, _ = bench(server, *words)
    assert code == 0
    found = cell(folder, "in16_out4_users2")
    assert sorted(found["input_lens"]) == [16] * 4 + [36] * 4  # the second turn: 16 + 4 + 16
    assert found["total_input_tokens"] == 4 * 16 + 4 * 36
    assert (found["turns"], found["shared_tokens"], found["prompts"]) == (2, 6, str(text))
    sent = [answer["asked"]["prompt"] for answer in server.answers]
    assert len({tuple(prompt[:6]) for prompt in sent}) == 1
    for prompt in sent:  # pieces of the text, that goes on from its end at its beginning
        steps = np.diff(prompt) % 400
        assert (steps != 1).sum() <= 1 + 2 * (len(prompt) > 16)


def test_a_server_without_tokenize_is_no_server_for_texts(bench, tmp_path, monkeypatch):
    from gemma4_tpu.benching import all_cells
    from gemma4_tpu.benching.client import Target

    async def found(endpoint, name):
        return Target("http://127.0.0.1:1", "m", None)

    monkeypatch.setattr(all_cells, "find_target", found)
    text = tmp_path / "text"
    text.write_text("x")
    words = [f"bench.prompts={text}", "endpoint=http://127.0.0.1:1", "bench.lengths=[[16,4]]"]
    code, _, _, err = bench(None, *words)
    assert code == 2 and "does not tokenize it at /tokenize" in err
    text.write_bytes(b"a\xff")
    code, _, _, err = bench(None, *words, run_dir="b")
    assert code == 2 and "not UTF-8 (byte 1)" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bench.shared_tokens=512"], "bench.shared_tokens=512: a prompt of bench.lengths has 512"),
        (["bench.turns=2"], "bench.turns=2: only with bench.users"),
        (["bench=matrix", "bench.turns=3"], "bench.requests=2: not a multiple of bench.turns=3"),
        (["bench.prompts=nowhere"], "bench.prompts=nowhere: no such file"),
    ],
)
def test_refusals(words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load(["endpoint=http://127.0.0.1:1", *words], BENCH)
