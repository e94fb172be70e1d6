"""Groups: what their answers weigh, and what is left out."""

import numpy as np
import pytest

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.rollouts.advantages import advantages, is_live, penalised, weighed

TOKENS = [np.array(ids, np.int32) for ids in ([5], [5], [6], [7, 8])]
REWARDS = np.array([1.0, 1.0, 0.0, 0.0])


def test_rewards_less_their_mean_or_also_over_their_deviation():
    np.testing.assert_allclose(advantages(REWARDS, "mean"), [0.5, 0.5, -0.5, -0.5])
    np.testing.assert_allclose(advantages(REWARDS, "std"), [1, 1, -1, -1], rtol=1e-5)
    assert is_live(REWARDS) and not is_live(np.full(4, 0.3))


def test_equal_answers_are_one_with_their_number_and_truncated_ones_have_no_part():
    found = weighed(TOKENS, REWARDS, [True, True, True, False], RolloutsConfig())
    assert [(one.sample, one.advantage, one.copies) for one in found] == [(0, 0.5, 2), (2, -0.5, 1)]
    found = weighed(TOKENS, REWARDS, [True] * 3 + [False], RolloutsConfig(mask_truncated=False))
    assert [one.sample for one in found] == [0, 2, 3]


def test_equal_answers_that_were_rewarded_differently_stay_apart():
    found = weighed(TOKENS[:2], np.array([1.0, 0.0]), [True, True], RolloutsConfig())
    assert [(one.sample, one.advantage, one.copies) for one in found] == [(0, 0.5, 1), (1, -0.5, 1)]


@pytest.mark.parametrize(("length", "lost"), [(60, 0.0), (80, 0.0), (90, 0.25), (100, 0.5)])
def test_long_answers_lose_by_tokens_up_to_the_limit(length, lost):
    config = RolloutsConfig(new_tokens=100, overlong_tokens=20, overlong_penalty=0.5)
    assert penalised(np.array([1.0]), np.array([length]), config) == [1.0 - lost]
    assert penalised(np.array([1.0]), np.array([length]), RolloutsConfig(new_tokens=100)) == [1.0]
