"""Packing and bucket lengths."""

import itertools
import time

import numpy as np
import pytest

from gemma4_tpu.data.packing import choose_buckets, pack


def codev_lengths(count, limit):
    """Lengths like CodeV-R1's: log-normal, with the published mean 922 and p99 2553."""
    drawn = np.random.default_rng(0).lognormal(6.7067, 0.4895, count).astype(int)
    return drawn[(drawn >= 1) & (drawn <= limit)]


def test_best_fit_by_hand():
    # 6 and 5 open a bin each; 4 fills up the first, 3 and 2 the second; 1 opens a third.
    assert pack([5, 4, 6, 3, 2, 1], capacity=10) == [[0, 3, 4], [1, 2], [5]]


def test_examples_of_different_windows_share_no_bin():
    assert pack([6, 7, 4, 3], capacity=10, window=2) == [[0], [1], [2, 3]]
    assert pack([6, 7, 4, 3], capacity=10) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("window", [1, 100, 2048])
def test_every_example_is_in_one_bin_whole(window):
    lengths = codev_lengths(3000, 4096)
    bins = pack(lengths, 4096, window)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= 4096 for members in bins)
    windows = [{member // window for member in members} for members in bins]
    assert all(len(one) == 1 for one in windows)
    assert windows == sorted(windows, key=min)


def test_rows_of_many_examples_come_no_earlier_than_others():
    """Else a run would see short examples first, and long ones alone at its end."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation([*rng.integers(100, 400, 5000), *[4000] * 500])
    sizes = np.array([len(members) for members in pack(lengths, 4096)])
    places = np.arange(len(sizes)) / len(sizes)
    # 500 places drawn evenly from 0 to 1 have a mean of 0.5 ± 0.013
    assert abs(places[sizes == 1].mean() - 0.5) < 4 * 0.013


@pytest.mark.parametrize(("capacity", "least_fill"), [(4096, 0.994), (8192, 0.995)])
def test_codev_lengths_fill_rows_in_seconds(capacity, least_fill):
    lengths = codev_lengths(87_000, capacity)
    started = time.process_time()
    bins = pack(lengths, capacity)
    assert lengths.sum() / (len(bins) * capacity) > least_fill
    assert time.process_time() - started < 5  # 0.3 s on an idle laptop core


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_that_cannot_fit_is_refused(length):
    with pytest.raises(ValueError, match=f"length {length} at position 1"):
        pack([5, length], capacity=10)


def test_buckets_waste_the_least():
    lengths = codev_lengths(300, 1024)
    candidates = list(range(128, 1024, 128))

    def slots(buckets):
        return np.array(buckets)[np.searchsorted(buckets, lengths)].sum()

    best = min(slots([*shorter, 1024]) for k in range(4) for shorter in itertools.combinations(candidates, k))
    chosen = choose_buckets(lengths, 1024)
    assert len(chosen) <= 4
    assert chosen[-1] == 1024
    assert slots(chosen) == best


def test_few_lengths_need_few_buckets():
    assert choose_buckets(np.array([100, 120]), 128) == [128]
