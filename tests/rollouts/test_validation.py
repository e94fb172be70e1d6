"""Prompts that are set aside: which, and how far the policy has come on them."""

from dataclasses import replace

import numpy as np
import pytest

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.rollouts.collecting import Collector
from gemma4_tpu.rollouts.on_policy_run import OnPolicyRun
from gemma4_tpu.rollouts.policy_tasks import Task, set_aside
from gemma4_tpu.rollouts.rewarding import Rewarded
from gemma4_tpu.rollouts.validation import Validation
from tests.rollouts.test_collecting import POLICY, TASKS, Decoder, Letters

CONFIG = RolloutsConfig(prompts=2, samples=4, validation_prompts=5, validation_every=10)


def test_equal_prompts_are_on_one_side_and_the_order_of_rows_does_not_matter():
    twice = [*TASKS, *(replace(task, name=f"{task.name} again") for task in TASKS)]
    rest, aside = set_aside(twice, 5)
    assert len(aside) == 5 and len(rest) == 2 * (len(TASKS) - 5)
    assert not {task.ids.tobytes() for task in rest} & {task.ids.tobytes() for task in aside}
    assert {task.ids.tobytes() for task in set_aside(twice[::-1], 5)[1]} == {task.ids.tobytes() for task in aside}
    assert set_aside(TASKS, 0) == (TASKS, [])
    with pytest.raises(UserError, match=r"validation_prompts=12: there are 12 different prompts"):
        set_aside(TASKS, 12)


def test_a_policy_that_gets_better_is_told_with_an_interval_and_what_is_known_is_not_asked_again(tmp_path):
    tasks: list[Task] = TASKS[:5]
    told, sampler, level = [], Letters(), 0.25

    def judge(answers):
        return [Rewarded(float(answer.text.endswith(" 1") or level > 0.3), "x") for answer in answers]

    run = OnPolicyRun(CONFIG, tmp_path, 3)
    collector = Collector(sampler, judge, Decoder(), lambda group: True, run)
    validation = Validation(tasks, 25, run)
    assert [update for update in range(26) if validation.is_due(update)] == [0, 10, 20, 25]
    validation(collector, POLICY, {}, 0, lambda row, update: told.append((update, row)))
    level = 1.0
    better = {**POLICY, "b": np.float32([[4.0]])}
    validation(collector, better, {}, 10, lambda row, update: told.append((update, row)))
    validation.close()
    assert [update for update, _ in told] == [0, 10] and told[0][1] == {"validation_reward": 0.25}
    last = told[1][1]
    assert last["validation_reward"] == 1 and last["validation_difference"] == 0.75
    assert 0.1 < last["validation_low"] < 0.75 <= last["validation_high"] <= 1
    assert len(sampler.drawn) == 2 * 5 * 4

    again = Validation(tasks, 25, replace(run, resume_from=10))
    assert [update for update in range(26) if again.is_due(update)] == [20, 25]
    again.close()
