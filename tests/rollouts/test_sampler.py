"""Samples against the trainer's forward pass on the same tokens, and against themselves in other company."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.models.gemma4 import hidden_states, logits
from gemma4_tpu.rollouts.sampler import SEGMENT_TOKENS, Drawn, Sampler, SamplerShapes, Wanted
from tests.step.test_train_step import make

SHAPES = SamplerShapes(slots=3, prompts=2, prompt_tokens=16, new_tokens=40)
PROMPTS = [np.arange(3, 15, dtype=np.int32), np.arange(40, 45, dtype=np.int32)]  # beyond the window of 8, and within it
WANTED = [Wanted(prompt, sample, seed=10 * prompt + sample) for prompt in (0, 1) for sample in range(4)]
STOPS = tuple(range(500, 512))  # of 512 tokens: some samples end early

# float32 rounds logits of up to 30 by 2⁻²⁴ · 30 ≈ 2e-6; a few dozen roundings lie between two orders of summation.
TOLERANCE = 1e-4


def by_key(samples) -> dict[tuple[int, int], Drawn]:
    return {(s.wanted.prompt, s.wanted.sample): s for s in samples}


def trainer_logprobs(step, trained, base, prompt, tokens) -> np.ndarray:
    """By the forward pass of training, the whole sequence at once; padded, so that there is one program for all."""
    ids = np.zeros((1, SHAPES.prompt_tokens + SHAPES.new_tokens), np.int32)
    length = len(prompt) + len(tokens)
    ids[0, :length] = [*prompt, *tokens]
    chances = _all_logprobs(step, trained, base, ids, (np.arange(ids.shape[1]) < length)[None].astype(np.int32))
    return np.asarray(chances)[np.arange(len(prompt) - 1, length - 1), tokens]


@partial(jax.jit, static_argnums=0)
def _all_logprobs(step, trained, base, ids, segments) -> jax.Array:
    params, lora = step.weights(trained, base)
    places = jnp.arange(ids.shape[1])[None]
    scores = logits(step.model, params, hidden_states(step.model, params, lora, ids, segments, places))
    return jax.nn.log_softmax(scores, axis=-1)[0]


@pytest.fixture(scope="module")
def drawn():
    step, base, trained = make()
    return step, base, trained, by_key(Sampler(step, STOPS, SHAPES)(trained, base, PROMPTS, WANTED))


def test_every_sample_ends_at_a_stop_token_or_at_the_limit(drawn):
    *_, samples = drawn
    assert sorted(samples) == [(w.prompt, w.sample) for w in WANTED]
    for sample in samples.values():
        ends = np.flatnonzero(np.isin(sample.tokens, STOPS))
        assert ends.tolist() == ([len(sample.tokens) - 1] if sample.stopped else [])
        assert sample.stopped or len(sample.tokens) == SHAPES.new_tokens
    assert {s.stopped for s in samples.values()} == {True, False}
    assert len({s.tokens.tobytes() for s in samples.values()}) == len(WANTED)


def test_log_probabilities_are_the_trainers(drawn):
    """Across segments, slots that are filled again, and the window of the sliding layers."""
    step, base, trained, samples = drawn
    for sample in samples.values():
        expected = trainer_logprobs(step, trained, base, PROMPTS[sample.wanted.prompt], sample.tokens)
        np.testing.assert_allclose(sample.logprobs, expected, atol=TOLERANCE)


def test_a_sample_is_the_same_to_the_bit_in_any_company(drawn):
    step, base, trained, samples = drawn
    chosen = [WANTED[i] for i in (6, 1)]
    alone = by_key(Sampler(step, STOPS, SHAPES)(trained, base, PROMPTS, chosen))
    for key, sample in alone.items():
        assert sample.tokens.tobytes() == samples[key].tokens.tobytes()
        assert sample.logprobs.tobytes() == samples[key].logprobs.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_moe", "tiny_e2b"])
def test_of_the_other_kinds_too(kind):
    step, base, trained = make(kind)
    wanted = WANTED[2:6]
    for sample in Sampler(step, STOPS, SHAPES)(trained, base, PROMPTS, wanted):
        expected = trainer_logprobs(step, trained, base, PROMPTS[sample.wanted.prompt], sample.tokens)
        np.testing.assert_allclose(sample.logprobs, expected, atol=TOLERANCE)


def test_tokens_have_the_probabilities_that_are_told():
    """Of 1,000 first tokens, the share of each of the likeliest within five standard errors."""
    step, base, trained = make()
    shapes = SamplerShapes(slots=1000, prompts=1, prompt_tokens=16, new_tokens=1)
    wanted = [Wanted(0, i, seed=i) for i in range(1000)]
    samples = list(Sampler(step, STOPS, shapes)(trained, base, PROMPTS[:1], wanted))
    tokens = np.array([s.tokens[0] for s in samples])
    told = {int(t): float(np.exp(s.logprobs[0])) for t, s in zip(tokens, samples, strict=True)}
    for token in sorted(told, key=told.get)[-5:]:
        p = told[token]
        assert abs((tokens == token).mean() - p) < 5 * np.sqrt(p * (1 - p) / len(tokens))


def test_a_sampler_without_the_softcap_is_far_off(drawn):
    """What the certificate looks for is well above the tolerance."""
    step, base, trained, _ = drawn
    layout = step.model.layout
    bare = replace(layout, arch=replace(layout.arch, final_logit_softcap=None))
    base = {**base, "final_norm": {"scale": base["final_norm"]["scale"] * 8}}  # logits as large as real ones
    sampler = Sampler(replace(step, model=replace(step.model, layout=bare)), STOPS, SHAPES)
    off = [
        np.abs(s.logprobs - trainer_logprobs(step, trained, base, PROMPTS[s.wanted.prompt], s.tokens)).max()
        for s in sampler(trained, base, PROMPTS, WANTED)
    ]
    assert max(off) > 100 * TOLERANCE


def test_half_a_segment_is_what_a_sample_wastes(drawn):
    step, base, trained, _ = drawn
    sampler = Sampler(step, STOPS, replace(SHAPES, slots=1))
    used = sum(len(s.tokens) for s in sampler(trained, base, PROMPTS, WANTED))
    assert used <= sampler.decoded_slots < used + len(WANTED) * SEGMENT_TOKENS


@pytest.mark.slow
def test_on_a_mesh_each_chip_holds_its_heads_of_the_cache_and_log_probabilities_are_the_trainers():
    step, base, trained = make(tp=2)
    sampler = Sampler(step, STOPS, SHAPES)
    read = sampler._prompts(trained, base, PROMPTS)
    state = sampler._empty(read)
    sizes = [x.shape[2] // x.sharding.shard_shape(x.shape)[2] for x in jax.tree.leaves(state.cache)]
    assert set(sizes) <= {1, 2} and 2 in sizes  # a single KV head can't be split
    for sample in sampler(trained, base, PROMPTS, WANTED[2:6]):
        expected = trainer_logprobs(step, trained, base, PROMPTS[sample.wanted.prompt], sample.tokens)
        np.testing.assert_allclose(sample.logprobs, expected, atol=TOLERANCE)
