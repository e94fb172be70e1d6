"""Groups: what their answers weigh, and what is left out."""

import numpy as np
import pytest

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.rollouts.advantages import advantages, is_live, penalised, weighed
from gemma4_tpu.rollouts.batch import BatchShape, Placed, assembled, that_fit
from gemma4_tpu.rollouts.collecting import Group
from gemma4_tpu.rollouts.policy_tasks import Task
from gemma4_tpu.rollouts.rewarding import Rewarded
from gemma4_tpu.rollouts.sampler import Drawn, Wanted
from gemma4_tpu.rollouts.selection import by_reward, every_answer

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


TASK = Task("rows:0", np.array([3, 4], np.int32), "", "")


def drawn(tokens, stopped=True):
    return Drawn(Wanted(0, 0, seed=0), np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), stopped)


def test_expert_iteration_takes_distinct_rewarded_answers_and_a_teacher_takes_all():
    answers = [drawn([5]), drawn([5]), drawn([6]), drawn([7, 8], stopped=False)]
    group = Group(TASK, answers, [Rewarded(reward, "x") for reward in (1.0, 1.0, 0.0, 0.5)])
    assert [one.drawn.tokens.tolist() for one in by_reward(RolloutsConfig()).placed(group)] == [[5]]
    placed = every_answer().placed(group)
    assert [(one.drawn.tokens.tolist(), one.copies) for one in placed] == [([5], 2), ([6], 1), ([7, 8], 1)]
    assert not by_reward(RolloutsConfig()).is_live(Group(TASK, answers[:1], [Rewarded(0.0, "x")]))


def test_answers_that_do_not_fit_are_left_out_and_unused_microbatches_are_padding():
    shape = BatchShape(microbatches=2, rows=1, length=8)
    groups = [[Placed(TASK, drawn([5] * size))] for size in (4, 3, 7)]  # 5, 4 and 8 slots
    assert that_fit(groups, shape) == groups[0] + groups[1]
    assert that_fit([[*groups[0], *groups[2], *groups[2]]], shape) == groups[0] + groups[2]  # a group in part
    arrays = assembled(groups[0], shape, 0.0).arrays
    assert arrays["segment_ids"].any((1, 2)).tolist() == [True, False]
