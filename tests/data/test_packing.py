"""First-fit packing and bucket lengths."""

import itertools
import time

import numpy as np
import pytest

from gemma4_tpu.data.packing import choose_buckets, pack


def codev_lengths(count, limit):
    """Lengths like CodeV-R1's: log-normal, with the published mean 922 and p99 2553."""
    drawn = np.random.default_rng(0).lognormal(6.7067, 0.4895, count).astype(int)
    return drawn[(drawn >= 1) & (drawn <= limit)]


def test_first_fit_by_hand():
    assert pack([5, 4, 6, 3, 2, 1], capacity=10) == [[0, 1, 5], [2, 3], [4]]


def test_the_fullest_bin_closes_when_too_many_wait():
    # Bins of 6 and 7; a third is needed: the bin of 7 closes, so the 3 that fits into it goes to the bin of 6.
    assert pack([6, 7, 8, 3], capacity=10, open_bins=2) == [[0, 3], [1], [2]]


@pytest.mark.parametrize("open_bins", [1, 4, 32])
def test_every_example_is_in_one_bin_whole(open_bins):
    lengths = codev_lengths(3000, 4096)
    bins = pack(lengths, 4096, open_bins)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= 4096 for members in bins)


@pytest.mark.parametrize(("capacity", "least_fill"), [(4096, 0.96), (8192, 0.985)])
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
