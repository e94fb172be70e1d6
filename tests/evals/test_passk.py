"""pass@k against counting, its uncertainties against repetition and closed forms."""

import itertools
import math

import numpy as np
import pytest

from gemma4_tpu.evals import passk
from gemma4_tpu.evals.passk import difference, interval, pass_at_k, sampling_variance, score, scores


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_what_cannot_be_estimated_is_refused(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased():
    """The mean over all outcomes of n draws is 1 - (1 - p)^k, which is not so for 1 - (1 - c/n)^k."""
    n, p = 8, 0.3
    for k in (1, 3, 8):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_sampling_variance_of_pass_at_1_is_the_binomial_one():
    for c in range(6):
        assert sampling_variance(5, c, 1) == pytest.approx(c / 5 * (1 - c / 5) / 4, abs=1e-12)
    assert sampling_variance(1, 1, 1) is None
    assert sampling_variance(5, 3, 5) is None


@pytest.mark.parametrize("k", [1, 5])
def test_sampling_error_is_what_repeating_shows(k):
    rng = np.random.default_rng(0)
    n, rates = 20, rng.beta(0.5, 0.5, 150)
    runs = [[(n, int(c)) for c in rng.binomial(n, rates)] for _ in range(300)]
    found = np.std([np.mean([pass_at_k(n, c, k) for n, c in run]) for run in runs])
    claimed = np.mean([score(run, k).sampling_error for run in runs[:20]])
    # 300 repetitions know a standard deviation to 4%; the jackknife errs upward by a few per cent for k > 1
    assert claimed == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(
    ("problems", "n", "a", "b"),
    [(156, 20, 0.5, 0.5), (45, 5, 0.1, 3.0), (20, 20, 3.0, 0.1), (200, 2, 0.02, 2.0), (100, 1, 1.0, 1.0)],
    ids=["as verilog-eval", "hardly anything passes", "nearly all passes", "one in a hundred", "one sample each"],
)
def test_the_interval_over_problems_covers_the_truth_about_19_times_in_20(problems, n, a, b, monkeypatch):
    """Problems whose rates are Beta(a, b): their mean is a / (a + b)."""
    monkeypatch.setattr(passk, "DRAWS", 1000)
    rng, trials, covered = np.random.default_rng(1), 200, 0
    for trial in range(trials):
        found = score([(n, int(c)) for c in rng.binomial(n, rng.beta(a, b, problems))], 1, seed=trial)
        covered += found.low <= a / (a + b) <= found.high
    # 190 of 200 expected, standard deviation 3.1; three of these either way, and 0.02 for how discrete few passes are
    assert 190 - 9.3 - 4 <= covered <= 200


def test_nothing_passed_and_everything_passed_have_an_interval():
    """As Jeffreys' interval: the 97.5% quantile of Beta(1/2, 40 + 1/2) is 0.0605 (scipy.stats.beta.ppf)."""
    none, every = score([(20, 0)] * 40, 1), score([(20, 20)] * 40, 1)
    # 10,000 draws know this quantile to 0.0013 (its density there is 1.23)
    assert (none.low, none.high) == (0.0, pytest.approx(0.0605, abs=0.004))
    assert (every.low, every.high) == (pytest.approx(1 - 0.0605, abs=0.004), 1.0)
    assert none.sampling_error == every.sampling_error == pytest.approx(1 / (20 * 40))
    some = score([(1, 1)] * 12 + [(1, 0)] * 28, 1)  # Beta(12.5, 28.5): 0.1756 to 0.4522
    assert (some.low, some.high) == (pytest.approx(0.1756, abs=0.005), pytest.approx(0.4522, abs=0.005))


def test_no_difference_on_few_problems_is_not_known_to_be_none():
    same = difference([(5, 5)] * 30, [(5, 5)] * 30, 1)
    assert same.value == 0
    assert same.low < -0.02 and same.high > 0.02
    assert same.sampling_error is not None and same.sampling_error > 0
    low, high = interval(np.full(30, -1.0), (-1.0, 1.0))
    assert low == -1 and high < -0.8


def test_the_papers_numbers_come_out():
    """156 problems, n = 5, 0.641: the facts give [0.574, 0.706] over problems and 0.009 for sampling."""
    rng = np.random.default_rng(2)
    rates = rng.beta(0.45, 0.25, 156)
    counts = [(5, int(c)) for c in rng.binomial(5, rates)]
    found = score(counts, 1)
    assert found.high - found.low == pytest.approx(0.132, abs=0.02)
    assert found.sampling_error == pytest.approx(0.012, abs=0.004)


def test_only_ks_that_the_samples_allow_are_scored():
    assert [found.k for found in scores([(5, 1), (20, 3)])] == [1, 5]
    assert [found.k for found in scores([(1, 1)])] == [1]
    assert scores([]) == []


def test_a_paired_difference_is_sharper_than_two_separate_intervals():
    rng = np.random.default_rng(3)
    rates = rng.beta(0.5, 0.5, 200)
    b = [(20, int(c)) for c in rng.binomial(20, rates)]
    a = [(20, int(c)) for c in rng.binomial(20, np.minimum(1, rates + 0.08))]
    gap, first, second = difference(a, b, 1), score(a, 1), score(b, 1)
    assert gap.value == pytest.approx(first.value - second.value)
    assert gap.beyond_problems and gap.beyond_sampling
    assert gap.high - gap.low < (first.high - first.low) / 2
    assert gap.better + gap.worse + gap.equal == 200
    same = difference(a, a, 1)
    assert not same.beyond_problems and not same.beyond_sampling
