"""pass@k and its uncertainties.

There are two, never mixed: *sampling error*, how much the score changes if samples are redrawn for these problems; and
the *interval over problems*, how much it changes for other problems of the same kind (which includes the former).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
KS = (1, 5, 10)
MOST_SEPARATE = 1000
"""With more problems than this, equal values get their weight in one draw. Gamma variables add up, so the distribution
is the same, and 10,000 separate draws for each of this many problems would take a gigabyte."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k samples drawn from n without replacement is among the c that pass: the unbiased
    estimate of passing within k attempts.

    Raises:
      ValueError: k > n, for which no unbiased estimate exists, or c outside 0…n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@{k} of {c} passes in {n} samples")
    return 1.0 - comb(n - c, k) / comb(n, k)


def sampling_variance(n: int, c: int, k: int) -> float | None:
    """Variance of `pass_at_k` over redrawn samples of this problem, by the delete-one jackknife; for k = 1 that is
    p(1 - p)/(n - 1). None if k = n, which leaves nothing to delete.
    """
    if k >= n:
        return None
    values = [(pass_at_k(n - 1, c - 1, k), c)] if c else []
    values += [(pass_at_k(n - 1, c, k), n - c)] if c < n else []
    mean = sum(value * times for value, times in values) / n
    return (n - 1) / n * sum(times * (value - mean) ** 2 for value, times in values)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Mean pass@k over problems."""

    k: int
    value: float
    low: float
    """Lower end of the 95% interval over problems: see `interval`."""
    high: float
    sampling_error: float | None
    """Standard error for fixed problems, at least the weight of one sample; None: k = n, or one sample each."""
    problems: int

    def __str__(self) -> str:
        error = "" if self.sampling_error is None else f", sampling error {self.sampling_error:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{error}"


def score(counts: Sequence[tuple[int, int]], k: int, seed: int = 0) -> Score:
    """Mean pass@k with its uncertainties.

    Args:
      counts: (n, c) of each problem.
      k: number of attempts, at most the smallest n.
      seed: seed of the interval's draws.
    """
    values = np.array([pass_at_k(n, c, k) for n, c in counts])
    low, high = interval(values, (0.0, 1.0), seed)
    return Score(
        k=k,
        value=float(values.mean()),
        low=low,
        high=high,
        sampling_error=_sampling_error(counts, k),
        problems=len(counts),
    )


def scores(counts: Sequence[tuple[int, int]]) -> list[Score]:
    """`score` for each k of `KS` that the number of samples allows; none without problems."""
    if not counts:
        return []
    return [score(counts, k) for k in KS if k <= min(n for n, _ in counts)]


@dataclass(frozen=True, kw_only=True)
class ScoreDifference:
    """Mean pass@k of A minus B, problem by problem."""

    k: int
    value: float
    low: float
    """Lower end of the 95% interval over problems of the paired differences."""
    high: float
    sampling_error: float | None
    better: int
    """Number of problems with a higher estimate for A."""
    worse: int
    equal: int

    @property
    def beyond_sampling(self) -> bool | None:
        """Whether redrawing the samples is unlikely to undo it (1.96 standard errors); None: unknown."""
        return None if self.sampling_error is None else abs(self.value) > 1.96 * self.sampling_error

    @property
    def beyond_problems(self) -> bool:
        """Whether the interval over problems excludes 0."""
        return self.low > 0 or self.high < 0


def difference(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]], k: int) -> ScoreDifference:
    """A minus B; `a` and `b` are (n, c) of the same problems in the same order."""
    gaps = np.array([pass_at_k(*x, k) - pass_at_k(*y, k) for x, y in zip(a, b, strict=True)])
    low, high = interval(gaps, (-1.0, 1.0))
    errors = [_sampling_error(counts, k) for counts in (a, b)]
    error = None if None in errors else sqrt(sum(e * e for e in errors if e is not None))
    return ScoreDifference(
        k=k, value=float(gaps.mean()), low=low, high=high, sampling_error=error,
        better=int((gaps > 0).sum()), worse=int((gaps < 0).sum()), equal=int((gaps == 0).sum()),
    )  # fmt: skip


def interval(values: np.ndarray, limits: tuple[float, float], seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of `values` [problems] for other problems of the same kind.

    The Bayesian bootstrap (Rubin 1981) with half an observation added at each of the values' `limits`. If all values
    are 0 or 1, that is exactly Jeffreys' interval of a proportion, so for 0 of 40 it ends at 0.060 rather than 0; with
    many problems it approaches the bootstrap's. As usual for Jeffreys' interval, an end is at the limit if every value
    is.
    """
    rng = np.random.default_rng(seed)
    points, shapes = np.array([*values, *limits]), np.array([1.0] * len(values) + [0.5] * len(limits))
    if len(values) > MOST_SEPARATE:
        points, which = np.unique(points, return_inverse=True)
        shapes = np.bincount(which, weights=shapes)
    weights = rng.standard_gamma(shapes, size=(DRAWS, len(points)))
    means = weights @ points / weights.sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return (
        float(limits[0] if (values == limits[0]).all() else low),
        float(limits[1] if (values == limits[1]).all() else high),
    )


def _sampling_error(counts: Sequence[tuple[int, int]], k: int) -> float | None:
    """Standard error of the mean over problems, whose samples are independent.

    The effect of one more pass among n, k/n on one problem, is added once: if every problem has 0 or n passes, the
    jackknife sees no spread, although the true one can be of that size (0 of N: Jeffreys' 95% end is 2.5/N).
    """
    variances = [sampling_variance(n, c, k) for n, c in counts]
    known = [v for v in variances if v is not None]
    if not known or len(known) < len(variances):
        return None
    return sqrt(sum(known) + (k / min(n for n, _ in counts)) ** 2) / len(known)
