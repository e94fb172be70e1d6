"""On-policy runs of a small model, honest ones and one with each known fault: the certificate tells them apart."""

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

import jax
import numpy as np
import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.config.schema import LoraConfig, TrainerConfig
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.models.decode import Sampling, draw, shaped
from gemma4_tpu.reporting.found import Records
from gemma4_tpu.reporting.on_policy import on_policy
from gemma4_tpu.rollouts import slots
from gemma4_tpu.rollouts.batch import BatchShape
from gemma4_tpu.rollouts.certificate import Agreement, Certificate, Drifted, NotOnPolicy, summed_up
from gemma4_tpu.rollouts.collecting import Collected, Collector, Group
from gemma4_tpu.rollouts.digest import digest
from gemma4_tpu.rollouts.on_policy_run import OnPolicyRun
from gemma4_tpu.rollouts.policy_tasks import Task
from gemma4_tpu.rollouts.rewarding import Rewarded
from gemma4_tpu.rollouts.sampler import Drawn, Sampler, SamplerShapes, Wanted
from gemma4_tpu.rollouts.scoring import Scorer
from gemma4_tpu.rollouts.selection import by_advantage
from gemma4_tpu.rollouts.source import Making, OnPolicySource
from gemma4_tpu.rollouts.validation import Validation
from gemma4_tpu.step.grpo import COPIES, Grpo
from gemma4_tpu.step.train_step import Step
from gemma4_tpu.tracking.records import write_record
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.start import open_start
from tests.rollouts.test_collecting import Decoder
from tests.step.test_train_step import make, started

CONFIG = RolloutsConfig(
    prompts=4, samples=8, prompt_tokens=8, new_tokens=24, slots=16, check_every=100, max_kl=None, mask_truncated=False
)
TASKS = [Task(f"rows:{i}", np.array([3, 10 + i, 40 + i], np.int32), "", "") for i in range(20)]
STOPS = tuple(range(480, 512))
SHAPE = BatchShape(microbatches=3, rows=4, length=64)
OBJECTIVE = Grpo(0.2, 0.28, 9.0)


@dataclass(frozen=True)
class Small:
    """A model of two layers that is about as sure of itself as a real one, and what is compiled for it."""

    step: Step
    base: dict
    trained: dict
    sampler: Sampler
    scorer: Scorer


@cache
def small() -> Small:
    step, base, trained = make(rate=1e-2)
    step = replace(step, objective=OBJECTIVE)
    base = {**base, "final_norm": {"scale": base["final_norm"]["scale"] * 2}}
    return Small(step, base, trained, sampler_of(step), Scorer(step))


def sampler_of(step: Step) -> Sampler:
    return Sampler(step, STOPS, SamplerShapes(CONFIG.slots, CONFIG.prompts, CONFIG.prompt_tokens, CONFIG.new_tokens))


def even_tokens(answers):
    """How many of the tokens are even: something that a policy can learn."""
    ids = [[int(word) for word in answer.text.split()] for answer in answers]
    return [Rewarded(float(np.mean([i % 2 == 0 for i in some] or [0])), "scored") for some in ids]


def run(folder, *, updates=3, sampler=None, objective=OBJECTIVE, reward=even_tokens, config=CONFIG):
    """Trains, and hands back the record and the rewards of each update."""
    it = small()
    selection = by_advantage(config, OBJECTIVE.fields)
    source = OnPolicySource(TASKS, config, TrainerConfig(max_updates=updates), SHAPE, selection)
    its_run = OnPolicyRun(config, folder, 0)
    collector = Collector(sampler or it.sampler, reward, Decoder(), selection.is_live, its_run)
    certificate = Certificate(its_run, "float32")
    validation = Validation((), updates, its_run)
    nobody = lambda *told: None  # noqa: E731
    making = Making(collector, it.scorer, certificate, validation, it.base, nobody, nobody, ExitStack())
    source.begin(making)
    step = it.step if objective is OBJECTIVE else replace(it.step, objective=objective)
    states, train, rewards = [started(step, it.trained)], _train(step), []
    for number, update in enumerate(source.updates(lambda: states[-1].trained), start=1):
        state, metrics = train(states[-1], it.base, update.arrays)
        states.append(state)
        source.landed(number, float(metrics.loss))
        rewards.append(update.figures["reward"])
    source.ready_to_save(states[-1].trained, updates)
    certificate.close()
    return json.loads((folder / "certificate.json").read_text()), rewards


@cache
def _train(step: Step):
    return jax.jit(step.train)


@pytest.mark.slow
def test_an_honest_run_holds_and_learns(tmp_path):
    record, rewards = run(tmp_path, updates=10)
    assert record["kind"] == "certificate" and record["holds"] and not record["broken"]
    assert record["updates"] == record["adapters"] == 10
    assert record["compared"]["updates"] == [1, 2] and record["compared"]["tokens"] > 900
    assert record["compared"]["max_difference"] < 1e-3 and abs(record["compared"]["surprise_z"]) < 5
    assert record["max_loss_error"] < 1e-4
    assert record["groups"]["live"] >= 30 and record["answers"]["answers"] >= 320
    assert 0 < record["kl"]["mean"] < record["kl"]["max"] < 1
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.05  # of 0.5; a mean of 64 answers of 15 tokens errs by 0.02


class Frozen:
    """Gets the adapters once."""

    def __init__(self, sampler):
        self._sampler, self._first = sampler, None

    @property
    def drawn_from(self):
        return self._sampler.drawn_from

    def __call__(self, trained, *more):
        self._first = trained if self._first is None else self._first
        return self._sampler(self._first, *more)


class FrozenAndLying(Frozen):
    """And says that it has the later ones."""

    def __call__(self, trained, *more):
        self._told = digest(trained)
        return super().__call__(trained, *more)

    @property
    def drawn_from(self):
        return self._told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"), [(Frozen, "not drawn with the values being trained"), (FrozenAndLying, "off the trainer's")]
)
def test_adapters_that_never_reach_the_sampler(tmp_path, kind, said):
    with pytest.raises(NotOnPolicy, match="update 2: .*" + said):
        run(tmp_path, sampler=kind(small().sampler))


@pytest.mark.slow
def test_a_sampler_without_the_softcap(tmp_path):
    step = small().step
    arch = replace(step.model.layout.arch, final_logit_softcap=None)
    bare = replace(step, model=replace(step.model, layout=replace(step.model.layout, arch=arch)))
    with pytest.raises(NotOnPolicy, match=r"update 1: .*off the trainer's"):
        run(tmp_path, sampler=sampler_of(bare))


@pytest.mark.slow
def test_log_probabilities_of_the_whole_distribution_beside_draws_from_a_part(tmp_path, monkeypatch):
    """Token by token they agree with the trainer's; the tokens are too good to be true."""
    nucleus = Sampling(temperature=1.0, top_p=0.7)
    monkeypatch.setattr(slots, "draw", lambda scores, *more: draw(shaped(scores, nucleus), *more))
    with pytest.raises(NotOnPolicy, match=r"update [12]: .*less surprising than its entropy, by \d+") as found:
        run(tmp_path, sampler=sampler_of(small().step))
    assert "off the trainer's" not in str(found.value)


class MeanOfMeans(Grpo):
    """Each microbatch divided by its own tokens."""

    def loss(self, nll, rows):
        total, stats = super().loss(nll, rows)
        return total / jax.numpy.maximum((rows["target_mask"] * rows[COPIES]).sum(), 1), stats

    def denominator(self, batch):
        return batch["target_mask"].any((1, 2)).sum()


@pytest.mark.slow
def test_a_mean_of_the_microbatches_means(tmp_path):
    with pytest.raises(NotOnPolicy, match=r"update \d: the step's loss is .* divided once"):
        run(tmp_path, objective=MeanOfMeans(0.2, 0.28, 9.0))
    assert json.loads((tmp_path / "certificate.json").read_text())["holds"] is False


@pytest.mark.slow
class OneNumber:
    """A policy of one number, which the token 5 is less likely by than at first; answers as a sampler draws them."""

    def logprobs(self, trained, base, arrays):
        return np.where(arrays["targets"] == 5, -1 - trained["x"], -1) * arrays["target_mask"]

    def spread(self, trained, base, arrays):
        return -self.logprobs(trained, base, arrays), np.ones(arrays["targets"].shape)

    def text(self, drawn):
        return str(drawn.tokens)

    def __call__(self, updates, trained, base, tasks, adapter):
        return [Collected([self.group(next(asked), trained["x"])], frozenset([adapter])) for asked in tasks]

    def group(self, task, x):
        tokens = [np.array([token], np.int32) for token in (5, 5, 5, 6)]
        drawn = [Drawn(Wanted(0, i, i), t, np.float32([-1 - x * (t[0] == 5)]), True) for i, t in enumerate(tokens)]
        return Group(task, drawn, [Rewarded(float(one.tokens[0] == 5), "scored") for one in drawn])


def test_each_update_is_measured_by_itself_and_equal_answers_count_each(tmp_path):
    """Two updates on answers that were drawn ahead, of which the second changes nothing."""
    config = replace(CONFIG, prompts=1, samples=4, off_policy=1)
    selection, its_run = by_advantage(config, OBJECTIVE.fields), OnPolicyRun(config, tmp_path, 0)
    source = OnPolicySource(TASKS, config, TrainerConfig(max_updates=2), SHAPE, selection)
    policy, moved, nobody = OneNumber(), [], lambda *told: None
    certificate, validation = Certificate(its_run, "float32"), Validation((), 2, its_run)
    report = lambda told, update: moved.append(told["kl"])  # noqa: E731
    source.begin(Making(policy, policy, certificate, validation, {}, report, nobody, ExitStack()))
    values = [{"x": np.float32(x)} for x in (0.0, 0.1, 0.1)]
    made = source.updates(lambda: values[source.get_state()["update"]])
    assert [bool(next(made)) for _ in range(2)] == [True, True]
    source.ready_to_save(values[2], 2)
    certificate.close()
    assert moved == pytest.approx([3 / 4 * (np.expm1(-0.1) + 0.1), 0.0], rel=1e-5)


def test_an_update_that_goes_too_far_ends_the_run_before_it_is_saved(tmp_path):
    said = r"update 1 moved the policy by .* rollouts\.max_kl=1e-05.*only the start is from before"
    with pytest.raises(Drifted, match=said):
        run(tmp_path, config=replace(CONFIG, max_kl=1e-5))


@pytest.mark.slow
def test_answers_that_lose_their_form_end_the_run(tmp_path):
    """As of a policy that finds out that the judge reads code wherever it stands."""
    asked = 0

    def drifting(answers):
        nonlocal asked
        asked += len(answers)
        found = even_tokens(answers)
        return [replace(one, kind="no fence", well_formed=asked <= 40) for one in found]

    with pytest.raises(Drifted, match=r"update \d left the policy where \d+% of the answers are malformed"):
        run(tmp_path, reward=drifting)
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert record["holds"] and record["by_kind"]["no fence"]["answers"] == record["answers"]["answers"]
    assert record["first"]["malformed"] == 0 and record["last"]["malformed"] > CONFIG.max_malformed


def test_draws_from_a_distribution_are_as_surprising_as_it_is_and_others_are_not():
    """z over 20,000 draws of known distributions; of a part of each, far below."""
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(50, 0.3), size=20_000)
    cumulative = chances.cumsum(axis=1)
    entropy = -(chances * np.log(chances + 1e-300)).sum(axis=1)
    variance = (chances * (np.log(chances + 1e-300) + entropy[:, None]) ** 2).sum(axis=1)

    def z(uniform) -> float:
        drawn = (cumulative < uniform[:, None]).sum(axis=1).clip(max=49)
        told = np.log(chances[np.arange(len(drawn)), drawn])
        found = Agreement.of(np.ones(len(drawn), bool), told, told, entropy, variance)
        assert found.mean_difference == 0 and found.tokens == len(drawn)
        return found.surprise / found.variance**0.5

    assert abs(z(rng.random(20_000))) < 4
    largest = chances.argmax(axis=1)  # always the likeliest one
    assert z(cumulative[np.arange(20_000), largest] - chances.max(axis=1) / 2) < -50


def compared(update: int, deviation: float) -> dict:
    """A row of an update whose 1,000 compared tokens are off by so many standard errors."""
    found = Agreement(1000, 0.0, 0.0, deviation * 1000**0.5, 1000.0)
    counts = dict.fromkeys(("answers", "distinct", "truncated", "tokens", "live", "dead"), 1)
    return {"update": update, **counts, "delivered": True, "adapter": f"{update}", "compared": vars(found)}


def test_a_fault_that_begins_late_or_is_small_everywhere_is_found():
    honest = [compared(update, 0.0) for update in range(1, 31)]
    assert summed_up(honest, 1e-3)["holds"]
    late = summed_up([*honest, compared(31, -8.0)], 1e-3)
    assert not late["holds"] and abs(late["compared"]["surprise_z"]) < 2
    assert late["broken"] == [
        "the samples were not drawn from the reported distribution: 1000 tokens of update 31 are less surprising than"
        " its entropy, by 8.0 standard errors"
    ]
    small = summed_up([compared(update, 3.0) for update in range(1, 6)], 1e-3)
    assert len(small["broken"]) == 1 and "5000 tokens are more surprising" in small["broken"][0]


def test_rounding_does_not_add_up_to_a_fault():
    """In bfloat16: 40 million tokens, each 0.001 nats less surprising than its distribution, or 0.002."""
    rows = [compared(1, 0.0)]
    for bias, holds in ((0.001, True), (0.002, False)):
        rows[0]["compared"] |= {"tokens": 40_000_000, "variance": 4e7, "surprise": -bias * 4e7}
        assert summed_up(rows, 0.05)["holds"] is holds


def test_a_run_whose_certificate_does_not_hold_is_not_opened_silently(tmp_path, caplog):
    known = summed_up([compared(1, 0.0)], 1e-3)
    write_record(tmp_path / "certificate.json", "certificate", known | {"holds": False, "broken": ["not its own"]})
    (tmp_path / "config.yaml").write_text("model: {}\nlora: {}\n")
    with pytest.raises(UserError, match="has no checkpoint"):
        open_trained(tmp_path, ExportConfig())
    with pytest.raises(UserError, match="has no checkpoint"):
        open_start(LoraConfig(start=str(tmp_path)), ARCHITECTURES["tiny"])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all(line.endswith("certificate does not hold: not its own") for line in told)


def test_the_report_says_how_small_a_difference_its_validation_can_see(tmp_path):
    write_record(tmp_path / "certificate.json", "certificate", summed_up([compared(1, 0.0)], 1e-3))
    first = {"update": 0, "reward": 0.5, "rewards": [0.5] * 8}
    rows = [first, {"update": 9, "reward": 0.6, "difference": 0.1, "low": -0.02, "high": 0.2, "rewards": [0.6] * 8}]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = "\n".join(on_policy(Records(run=RunFolder(tmp_path), name="run")))
    assert "| 9 | 0.600 | +0.100 [-0.020, +0.200] |" in page
    assert "a difference of less than about 0.11 cannot be told from chance" in page
