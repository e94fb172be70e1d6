"""Generation against transformers' own, token by token; batches, seeds and meshes against themselves."""

import jax
import numpy as np
import pytest

from gemma4_tpu.models import sharding
from gemma4_tpu.models.decode import Sampling, generate, sample, settle
from tests.models.checkpoints import KINDS, UNIFIED, VOCAB_SIZE, load_hf, make_checkpoint
from tests.models.test_forward import load

NEW = 12
GREEDY = Sampling(temperature=0)


def left_padded(rows: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def prompts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB_SIZE, n, dtype=np.int32) for n in lengths]


def run(model, params, rows, *, width=24, sampling=GREEDY, stop_ids=(), seeds=None):
    tokens, lengths = left_padded(rows, width)
    seeds = np.arange(len(rows), dtype=np.uint32) if seeds is None else np.asarray(seeds, np.uint32)
    made = generate(
        model, params, None, tokens, lengths, seeds, max_new_tokens=NEW, sampling=sampling, stop_ids=stop_ids
    )
    return [np.asarray(x) for x in made]


def hf_greedy(folder, row: np.ndarray) -> list[int]:
    import torch

    model = load_hf(folder)
    ids = torch.tensor(row).long()[None]
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
    return made[0, len(row) :].tolist()


@pytest.mark.parametrize("kind", [*KINDS, UNIFIED])
def test_greedy_tokens_are_those_of_transformers(kind):
    """Prompts shorter and longer than the window of 8, generated past it, padded by different amounts in one batch."""
    rows = prompts(3, 11, 24)
    tokens, counts, stopped = run(*load(kind), rows)
    for row, ours in zip(rows, tokens, strict=True):
        assert ours.tolist() == hf_greedy(make_checkpoint(kind), row)
    assert counts.tolist() == [NEW] * 3
    assert not stopped.any()


def test_a_row_ends_at_a_stop_token_and_the_others_go_on():
    model, params = load("dense")
    rows = prompts(5, 9)
    free, *_ = run(model, params, rows)
    stop = int(free[0][4])
    tokens, counts, stopped = run(model, params, rows, stop_ids=(stop,))
    ends = [row.tolist().index(stop) + 1 if stop in row else NEW for row in free]
    assert counts.tolist() == ends
    assert stopped.tolist() == [stop in row for row in free]
    for ours, whole, end in zip(tokens, free, ends, strict=True):
        assert ours[:end].tolist() == whole[:end].tolist()
        assert not ours[end:].any()


def test_a_sample_depends_on_its_own_seed_only():
    model, params = load("dense")
    sampling = Sampling(temperature=1.0, top_p=0.9)
    rows = prompts(5, 9, 13)
    together, *_ = run(model, params, rows, sampling=sampling, seeds=[7, 8, 9])
    moved, *_ = run(model, params, [rows[2], rows[2], rows[0]], sampling=sampling, seeds=[9, 1, 7])
    assert moved[0].tolist() == together[2].tolist()
    assert moved[2].tolist() == together[0].tolist()
    assert moved[1].tolist() != together[2].tolist()


@pytest.mark.parametrize(("kind", "shape"), [("dense", (2, 2))])
def test_tokens_are_the_same_on_every_mesh(kind, shape):
    rows = prompts(3, 11, 24, 7)
    mesh = sharding.make_mesh(*shape, jax.devices()[: shape[0] * shape[1]])
    assert run(*load(kind, mesh=mesh), rows)[0].tolist() == run(*load(kind), rows)[0].tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(top_p=0.6), [0.625, 0.375, 0, 0]),  # the first two reach 0.6
        (Sampling(top_p=0.4), [1, 0, 0, 0]),  # the likeliest is always kept
        (Sampling(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),  # squares, normalised
        (Sampling(temperature=0), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling, expected):
    n = 4000
    scores = np.log(np.tile(np.float32([0.5, 0.3, 0.15, 0.05]), (n, 1)))
    keys = jax.vmap(jax.random.key)(np.arange(n, dtype=np.uint32))
    drawn = np.bincount(np.asarray(sample(scores, keys, np.int32(3), sampling)), minlength=4) / n
    # standard error of a share of 4000 draws: at most 0.008; five of them
    np.testing.assert_allclose(drawn, expected, atol=0.04)


@pytest.mark.parametrize("slots", [5, 8, 21])  # fewer than the recent tokens, as many, more
@pytest.mark.parametrize("dtype", [np.float32, jax.numpy.bfloat16])
def test_recent_tokens_go_to_their_slots_to_the_bit(slots, dtype):
    rng = np.random.default_rng(0)
    cache = rng.normal(size=(2, 3, 2, slots, 4)).astype(dtype)
    recent = rng.normal(size=(2, 3, 2, 8, 4)).astype(dtype)
    places = np.array([8, 19, 40], np.int32)  # of each row's next token
    expected = cache.copy()
    for b, place in enumerate(places):
        for j in range(8):  # in order: the last one stays
            expected[:, b, :, (place - 8 + j) % slots] = recent[:, b, :, j]
    np.testing.assert_array_equal(np.asarray(jax.jit(settle)(cache, recent, places)), expected)
