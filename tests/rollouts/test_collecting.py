"""Roll-outs of an update: stored as they come, judged once, asked for again where a group teaches nothing."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.rollouts import digest as digests
from gemma4_tpu.rollouts import stored
from gemma4_tpu.rollouts.advantages import is_live
from gemma4_tpu.rollouts.collecting import Collector
from gemma4_tpu.rollouts.digest import digest
from gemma4_tpu.rollouts.on_policy_run import OnPolicyRun
from gemma4_tpu.rollouts.policy_tasks import Task
from gemma4_tpu.rollouts.rewarding import Rewarded
from gemma4_tpu.rollouts.sampler import Drawn, Wanted
from gemma4_tpu.rollouts.stored import StoredUpdate
from gemma4_tpu.tracking.records import ROLLOUTS
from tests.step.test_train_step import mesh_of

POLICY = {"a": np.float32([1.0, 2.0]), "b": np.float32([[3.0]])}
CONFIG = RolloutsConfig(prompts=2, samples=3, resample=2.0)
TASKS = [Task(f"rows:{i}", np.array([7 + i], np.int32), "", "") for i in range(12)]


class Letters:
    """Stands for the sampler: tokens follow from prompt and seed; counts what it draws."""

    drawn_from = ""

    def __init__(self, dies_after: int | None = None):
        self.drawn, self.dies_after = [], dies_after

    def __call__(self, trained, base, prompts, wanted):
        self.drawn_from = digest(trained)
        for one in wanted:
            if len(self.drawn) == self.dies_after:
                raise KeyboardInterrupt
            self.drawn.append((int(prompts[one.prompt][0]), one.sample))
            tokens = np.array([int(prompts[one.prompt][0]), one.sample, 1], np.int32)
            yield Drawn(one, tokens, np.float32([0.1, one.seed % 1000, 1 / 3]) * -1, True)


class Decoder:
    all_special_tokens = ()

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


class Judge:
    """1 for the second sample of prompts with even numbers; counts what it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, answers):
        self.asked += [(answer.task.name, answer.text) for answer in answers]
        return [Rewarded(float(a.text.endswith(" 1") and int(a.text.split()[0]) % 2), "x", "é") for a in answers]


def collect(folder, sampler, judge, tasks=TASKS, policy=POLICY, update=1, config=CONFIG, model=""):
    run = OnPolicyRun(config, folder, 3, model)
    collector = Collector(sampler, judge, Decoder(), lambda group: is_live(group.rewards), run)
    return collector([update], policy, {}, [iter(tasks)], digest(policy))[0]


def contents(collected):
    return [
        (
            group.task.name,
            [(d.tokens.tobytes(), d.logprobs.tobytes(), d.wanted.seed) for d in group.drawn],
            group.rewarded,
        )
        for group in collected.groups
    ]


def test_dead_groups_are_replaced_within_bounds(tmp_path):
    collected = collect(tmp_path, Letters(), Judge())
    live = [is_live(group.rewards) for group in collected.groups]
    assert live == [True, False, True, False]  # a wave of two, then two for the one that is missing
    assert collected.adapters == {digest(POLICY)}
    dead = [TASKS[i] for i in (1, 3, 5, 7, 9, 0, 11)]
    assert [g.task.name for g in collect(tmp_path, Letters(), Judge(), dead, update=2).groups] == [
        t.name for t in dead[:6]
    ]


def test_no_more_prompts_are_asked_than_resample_allows(tmp_path):
    collected = collect(tmp_path, Letters(), Judge(), config=replace(CONFIG, resample=1.5))
    assert [is_live(group.rewards) for group in collected.groups] == [True, False, True]


def test_without_a_single_live_group_the_run_says_why(tmp_path):
    with pytest.raises(UserError, match=r"update 1: none of 6 prompts has .*18 x; 0 of 18 .*Start from a policy"):
        collect(tmp_path, Letters(), Judge(), [TASKS[i] for i in (1, 3, 5, 7, 9, 11)])


@pytest.mark.parametrize("dies_after", [0, 1, 4, 7])
def test_what_is_stored_is_neither_drawn_nor_judged_again(tmp_path, dies_after):
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = contents(collect(tmp_path / "a", Letters(), Judge()))
    first, again, early, late = Letters(dies_after), Letters(), Judge(), Judge()
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "b", first, early)
    assert contents(collect(tmp_path / "b", again, late)) == whole
    assert not {*first.drawn} & {*again.drawn} and len(first.drawn) + len(again.drawn) == 12
    assert not {*early.asked} & {*late.asked} and len(early.asked) + len(late.asked) == 12
    third, judge = Letters(), Judge()
    assert contents(collect(tmp_path / "b", third, judge)) == whole
    assert not third.drawn and not judge.asked


def test_recorded_roll_outs_of_the_very_policy_are_neither_drawn_nor_judged(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    whole, recorded = contents(collect(tmp_path / "a", Letters(), Judge())), replace(CONFIG, recorded=f"{tmp_path}/a")
    sampler, judge = Letters(), Judge()
    assert contents(collect(tmp_path / "b", sampler, judge, config=recorded)) == whole
    assert not sampler.drawn and not judge.asked
    collect(tmp_path / "c", sampler, judge, policy={**POLICY, "b": np.float32([[4.0]])}, config=recorded)
    assert len(sampler.drawn) == 12 and len(judge.asked) == 12


def test_recorded_roll_outs_of_equal_adapters_on_another_model_are_drawn_again(tmp_path):
    """Fresh adapters are equal on any base; the answers are not."""
    for name in "abc":
        (tmp_path / name).mkdir()
    collect(tmp_path / "a", Letters(), Judge(), model="bfloat16")
    recorded = replace(CONFIG, recorded=f"{tmp_path}/a")
    for name, model, drawn in (("b", "bfloat16", 0), ("c", "float32", 12)):
        sampler, judge = Letters(), Judge()
        collect(tmp_path / name, sampler, judge, config=recorded, model=model)
        assert len(sampler.drawn) == len(judge.asked) == drawn


def test_roll_outs_of_another_policy_are_drawn_again(tmp_path):
    collect(tmp_path, Letters(), Judge())
    sampler, other = Letters(), {**POLICY, "b": np.float32([[3.0000002]])}
    assert collect(tmp_path, sampler, Judge(), policy=other).adapters == {digest(other)}
    assert len(sampler.drawn) == 12


def test_killed_while_those_of_another_policy_are_removed_no_verdict_outlives_its_sample(tmp_path, monkeypatch):
    collect(tmp_path, Letters(), Judge())
    sampler, judge, other = Letters(), Judge(), {**POLICY, "b": np.float32([[4.0]])}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path, sampler, judge, policy=other)
    collect(tmp_path, sampler, judge, policy=other)
    assert len(sampler.drawn) == len(judge.asked) == 12


def test_killed_while_recorded_roll_outs_are_copied_their_verdicts_are_taken_over_all_the_same(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    whole, recorded = contents(collect(tmp_path / "a", Letters(), Judge())), replace(CONFIG, recorded=f"{tmp_path}/a")
    sampler, judge = Letters(), Judge()
    with monkeypatch.context() as patched:
        patched.setattr(stored, "write_text", dying(stored.write_text))
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path / "b", sampler, judge, config=recorded)
    assert contents(collect(tmp_path / "b", sampler, judge, config=recorded)) == whole
    assert not sampler.drawn and not judge.asked


def dying(function):
    """The function, which dies the second time it is called."""
    calls = []

    def called(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*given, **named)

    return called


def test_an_answer_takes_the_stored_verdict_of_an_equal_one(tmp_path):
    """A judge that says something else each time; killed after the first of three equal answers was written down."""

    class Alike(Letters):
        def __call__(self, *given):
            yield from (replace(one, tokens=np.int32([one.tokens[0], 0, 1])) for one in super().__call__(*given))

    times = []

    def moody(answers):
        times.append(len(answers))
        return [Rewarded(float(len(times)), "x") for _ in answers]

    def rewards():
        collector = Collector(Alike(), moody, Decoder(), lambda group: True, OnPolicyRun(CONFIG, tmp_path, 3))
        return [list(group.rewards) for group in collector([1], POLICY, {}, [iter(TASKS)], digest(POLICY))[0].groups]

    whole = rewards()
    path = tmp_path / ROLLOUTS / "000001.verdicts.jsonl"
    first = {row["problem"]: line for line in path.read_text().splitlines()[::-1] if (row := json.loads(line))}
    path.write_text("".join(f"{line}\n" for line in first.values()))
    times.clear()
    assert rewards() == whole and not times


def test_answers_drawn_ahead_are_judged_while_others_are_drawn(tmp_path):
    """A judge that takes as long as it takes until everything is drawn."""
    sampler, drawn_all = Letters(), threading.Event()

    def ahead(trained, base, prompts, wanted):
        yield from sampler(trained, base, prompts, wanted)
        if len(sampler.drawn) == 12:
            drawn_all.set()

    ahead.drawn_from = digest(POLICY)

    def judge(answers):
        assert drawn_all.wait(60)
        return Judge()(answers)

    collector = Collector(ahead, judge, Decoder(), lambda group: True, OnPolicyRun(CONFIG, tmp_path, 3))
    tasks = [iter(TASKS[:6]), iter(TASKS[6:])]
    both = collector([1, 2], POLICY, {}, tasks, digest(POLICY))
    assert [[group.task.name for group in one.groups] for one in both] == [["rows:0", "rows:1"], ["rows:6", "rows:7"]]
    assert all(one.adapters == {digest(POLICY)} for one in both)


def test_what_an_earlier_policy_answered_is_read_and_not_drawn(tmp_path):
    collector = Collector(Letters(), Judge(), Decoder(), lambda group: True, OnPolicyRun(CONFIG, tmp_path, 3))
    whole = collector([2], POLICY, {}, [iter(TASKS)], digest(POLICY))[0]
    later = {**POLICY, "b": np.float32([[4.0]])}
    again = collector([2], later, {}, [iter(TASKS)], digest(POLICY))[0]
    assert contents(again) == contents(whole) and again.adapters == {digest(POLICY)}
    (tmp_path / ROLLOUTS / "000002.samples.jsonl").unlink()
    with pytest.raises(UserError, match="update 2: 6 of its answers, which an earlier policy gave, are missing in"):
        collector([2], later, {}, [iter(TASKS)], digest(POLICY))


def test_a_torn_line_is_drawn_again(tmp_path):
    whole = contents(collect(tmp_path, Letters(), Judge()))
    path = tmp_path / ROLLOUTS / "000001.samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    sampler = Letters()
    assert contents(collect(tmp_path, sampler, Judge())) == whole
    assert len(sampler.drawn) == 1


def test_log_probabilities_come_back_to_the_bit(tmp_path):
    bits = np.float32([-1 / 3, -1e-30, -0.0, -23.456789])
    with StoredUpdate(OnPolicyRun(CONFIG, tmp_path, 3), 1, "x") as store:
        store.add_drawn(("p", 0), Drawn(Wanted(0, 0, 5), np.arange(4, dtype=np.int32), bits, False))
    with StoredUpdate(OnPolicyRun(CONFIG, tmp_path, 3), 1, "x") as store:
        assert store.drawn(("p", 0), None).logprobs.tobytes() == bits.tobytes()


def test_a_digest_is_the_same_on_any_mesh_and_gathers_nothing():
    values = np.random.default_rng(0).normal(size=(3, 8, 2, 5)).astype(np.float32)
    mesh = mesh_of(fsdp=2, tp=2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tp"))
    split = {"a": jax.device_put(values, place), "b": jax.numpy.float32(1)}
    assert digest(split) == digest({"a": values, "b": np.float32(1)})
    assert "all-gather" not in jax.jit(digests._sums).lower(split).compile().as_text()


def test_a_digest_tells_values_by_every_bit_and_place():
    values = {"a": np.arange(1000, dtype=np.float32), "b": np.float32([1, 2])}
    others = [
        {**values, "b": np.float32([2, 1])}, {**values, "b": np.float32([1, np.nextafter(np.float32(2), 3)])},
        {"a": values["a"][::-1], "b": values["b"]}, {"a": values["a"] + 0.0, "b": -values["b"]},
    ]  # fmt: skip
    assert len({digest(v) for v in (values, *others)}) == 5
    assert digest({"a": values["a"].copy(), "b": values["b"]}) == digest(values)
