"""Whole runs on the command line: rewarded by a function and by the judge, killed and gone on with."""

import json
import os
import signal

import pytest

from experiments.verilog_smoke.make_data import make_problems
from experiments.verilog_smoke.prompts import answer, chat_row
from gemma4_tpu.errors import PREEMPTED, UserError
from gemma4_tpu.reporting.found import Records
from gemma4_tpu.reporting.on_policy import on_policy
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.train import load_train
from tests.evals.verilog.designs import needs_iverilog
from tests.training.conftest import cache, shallow, train  # noqa: F401 (fixtures)
from tests.training.test_resume import last_state

FUNCTION = [
    "model.path=random:0", "objective=grpo", "rollouts.reward=tests.rollouts.noted:vowels", "rollouts.prompts=4",
    "rollouts.samples=4", "rollouts.new_tokens=16", "rollouts.slots=8", "rollouts.mask_truncated=false",
    "rollouts.max_kl=null", "data.max_rows=40", "data.heldout=[]", "trainer.max_updates=6", "lora.rank=4",
    "trainer.global_batch_sequences=8", "trainer.microbatches=4", "optimizer.learning_rate=2e-2",
    "optimizer.schedule=constant", "optimizer.warmup_updates=0", "checkpoint.every=2",
    "rollouts.validation_prompts=5", "rollouts.validation_every=3",
]  # fmt: skip
BY_CHANCE = ("seconds", "per_second", "mfu")  # endings of the metrics that are never the same


def metrics(run) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.endswith(BY_CHANCE)}
        for row in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_very_bits_and_judges_nothing_twice(shallow, tmp_path, monkeypatch):  # noqa: F811
    """Killed in the middle of judging, before the first checkpoint and behind it, and then preempted."""
    whole, broken, again, exact = (tmp_path / name for name in ("whole", "broken", "again", "exact"))
    shallow(*FUNCTION, "tracker=jsonl", f"run_dir={whole}", cwd=tmp_path)
    record = json.loads((whole / "certificate.json").read_text())
    assert record["holds"] and record["updates"] == record["adapters"] == 6
    told = [json.loads(line) for line in (whole / "tracker.jsonl").read_text().splitlines()]
    tables = [event for event in told if event["event"] == "table" and event["name"] == "rollouts"]
    assert [event["update"] for event in tables] == [1, 2] and tables[0]["rows"][0][-1] in ("some", "none")

    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    for killed_at in (5, 60):  # of 20 answers before the first update, 16 in each, 20 after the third and the last
        monkeypatch.setenv("KILLED_AT", str(killed_at))
        shallow(*FUNCTION, f"run_dir={broken}", cwd=tmp_path, exit_code=-signal.SIGKILL)
    monkeypatch.setenv("KILLED_AT", "30")
    monkeypatch.setenv("SIGNAL", str(int(signal.SIGTERM)))
    shallow(*FUNCTION, f"run_dir={broken}", cwd=tmp_path, exit_code=PREEMPTED)
    monkeypatch.delenv("KILLED_AT")
    shallow(*FUNCTION, f"run_dir={broken}", cwd=tmp_path)

    assert metrics(broken) == metrics(whole)
    assert json.loads((broken / "certificate.json").read_text()) == record
    (update, expected), (resumed, found) = last_state(whole), last_state(broken)
    assert update == resumed == 6 and found.keys() == expected.keys()
    assert not [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    validated = [read_metrics(run / "validation.jsonl") for run in (whole, broken)]
    assert validated[0] == validated[1] and [row["update"] for row in validated[0]] == [0, 3, 6]
    assert len(validated[0][0]["rewards"]) == 5 and "difference" in validated[0][1]
    for name in sorted(os.listdir(whole / "rollouts")):
        stored = [sorted((run / "rollouts" / name).read_text().splitlines()) for run in (whole, broken)]
        assert stored[0] == stored[1], name
    noted = (tmp_path / "notes").read_text()
    shallow(*FUNCTION, f"replay={whole}", f"rollouts.recorded={whole}", f"run_dir={again}", cwd=tmp_path)
    assert json.loads((again / "replay.json").read_text())["losses"]["first_difference"] is None
    assert metrics(again) == metrics(whole) and (tmp_path / "notes").read_text() == noted  # judged nothing
    shallow(*FUNCTION, f"replay={whole}", f"run_dir={exact}", cwd=tmp_path)
    assert json.loads((exact / "replay.json").read_text())["losses"]["first_difference"] is None
    assert metrics(exact) == metrics(whole) and (tmp_path / "notes").read_text() != noted  # drew and judged all of it
    notes = noted.splitlines()
    assert (
        len(notes) <= record["answers"]["answers"] + 3 * 5 * 4
    )  # equal answers to a prompt in an update are judged once


@pytest.mark.slow
def test_ahead_of_its_policy_it_is_certified_as_such_and_ends_with_the_very_bits(shallow, tmp_path, monkeypatch):  # noqa: F811
    """Answers for three updates are drawn at a time; saved, killed and preempted between them."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shallow(*FUNCTION, "rollouts.off_policy=2", f"run_dir={whole}", cwd=tmp_path)
    record = json.loads((whole / "certificate.json").read_text())
    assert record["holds"] and (record["updates"], record["adapters"], record["max_lag"]) == (6, 2, 2)
    rows = read_metrics(whole / "certificate.jsonl")
    assert [row.get("lag", 0) for row in rows if "answers" in row] == [0, 1, 2, 0, 1, 2]
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    for killed_at, name, code in ((40, "SIGKILL", -signal.SIGKILL), (50, "SIGTERM", PREEMPTED)):
        monkeypatch.setenv("KILLED_AT", str(killed_at))
        monkeypatch.setenv("SIGNAL", str(int(getattr(signal, name))))
        shallow(*FUNCTION, "rollouts.off_policy=2", f"run_dir={broken}", cwd=tmp_path, exit_code=code)
    monkeypatch.delenv("KILLED_AT")
    shallow(*FUNCTION, "rollouts.off_policy=2", f"run_dir={broken}", cwd=tmp_path)
    assert metrics(broken) == metrics(whole)
    assert json.loads((broken / "certificate.json").read_text()) == record
    (_, expected), (_, found) = last_state(whole), last_state(broken)
    assert not [name for name in expected if found[name].tobytes() != expected[name].tobytes()]


SHARED = ["data.heldout=[]", "trainer.global_batch_sequences=8", "checkpoint.keep_best=false"]


@pytest.fixture(scope="module")
def solver(train, tmp_path_factory):  # noqa: F811
    """A policy that was tuned on some problems for a while, so that it solves some of them, and those problems."""
    made, folder = make_problems(0, 12, heldout=False), tmp_path_factory.mktemp("solver")
    rows, problems, start = folder / "rows.jsonl", folder / "problems.jsonl", folder / "start"
    rows.write_text("".join(json.dumps(chat_row(p.id, p.prompt, answer(d))) + "\n" for d, p in made))
    problems.write_text("".join(json.dumps(p.to_row()) + "\n" for _, p in made))
    words = [f"data.train={rows}", "trainer.max_updates=60", "optimizer.learning_rate=5e-3", f"run_dir={start}"]
    train(*SHARED, *words, cwd=folder)
    return [f"data.train={rows}", f"lora.start={start}", f"rollouts.problems_path={problems}"]


@pytest.mark.slow
@needs_iverilog
@pytest.mark.parametrize("objective", ["grpo", "expert_iteration"])
def test_it_trains_on_designs_that_the_judge_passes(objective, solver, train, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    train(
        *SHARED, *solver, f"objective={objective}", "rollouts.prompts=4", "rollouts.samples=4", "rollouts.slots=16",
        "trainer.microbatches=4", "trainer.max_updates=2", "optimizer.learning_rate=1e-4",
        "optimizer.warmup_updates=0", "rollouts.validation_prompts=3", f"run_dir={run}", cwd=tmp_path,
    )  # fmt: skip
    record = json.loads((run / "certificate.json").read_text())
    assert record["holds"] and record["updates"] == 2 and record["by_kind"]["pass"]["mean_reward"] == 1
    assert sum(one["answers"] for one in record["by_kind"].values()) == record["answers"]["answers"]
    page = "\n".join(on_policy(Records(run=RunFolder(run), name="run")))
    assert "It holds over 2 updates" in page and "| pass |" in page
    assert "On 3 prompts that were not trained on" in page


REFUSED = [
    ("rollouts.reward=judge", r"rollouts\.problems_path: rollouts\.reward=judge needs problems"),
    ("rollouts.reward=nothing", r"rollouts\.reward=nothing: give judge, module:function, or a URL"),
    ("data.sequence_length=200", r"rollouts\.prompt_tokens=128 \+ rollouts\.new_tokens=128; give at least 255"),
    ("lora.dropout=0.1", r"lora\.dropout=0\.1: the policy is sampled without dropout"),
    ("data.packing=false", r"data\.packing=false: roll-outs need packed rows"),
    ("rollouts.samples=1", r"rollouts\.samples=1: must be at least 2, so that answers can be compared"),
    ("rollouts.overlong_tokens=500", r"rollouts\.overlong_tokens=500: more than the 128 tokens"),
    ("rollouts.recorded=/nowhere", r"rollouts\.recorded=/nowhere: no folder with rollouts/"),
    ("hardware=v5p8 mesh=fsdp model=gemma4_31b model.path=random:0",
     r"mesh\.fsdp=4: .* would gather 42\.9 GiB of weights onto every chip; .*mesh\.fsdp=1 mesh\.tp=4"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_cannot_be_sampled_as_it_is_trained_is_refused_at_once(words, said):
    with pytest.raises(UserError, match=said):
        load_train(["objective=grpo", "rollouts.reward=a.b:c", *words.split()])
    if not words.startswith("lora.dropout"):  # supervised tuning does not read them, or bears them
        load_train([word for word in words.split() if "sequence_length" not in word])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rollouts.off_policy=-1", r"rollouts\.off_policy=-1: must be a number of at least 0"),
        ("rollouts.entropy_low=5", r"rollouts\.entropy_low=5"),
        ("rollouts.entropy_high=0.5", r"rollouts\.entropy_high=0\.5: .*at least 1"),
    ],
)
def test_a_band_that_the_start_is_outside_of_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        load_train(["objective=grpo", "rollouts.reward=a.b:c", words])


def test_recorded_roll_outs_of_another_reward_or_length_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run/rollouts").mkdir(parents=True)
    words = ["objective=grpo", "rollouts.reward=a.b:c", "rollouts.recorded='~/run/'"]
    recorded = tmp_path / "run/config.yaml"
    recorded.write_text("rollouts: {reward: 'a.b:c', new_tokens: 128}\n")
    assert load_train(words).root.rollouts.recorded == str(tmp_path / "run")
    recorded.write_text("rollouts: {reward: 'a.b:d', new_tokens: 64}\n")
    said = r"its run had rollouts\.new_tokens=64 rollouts\.reward=a\.b:d, this one has new_tokens=128, reward=a\.b:c"
    with pytest.raises(UserError, match=said):
        load_train(words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("objective=grpo rollouts.advantages=std rollouts.overlong_tokens=4 rollouts.overlong_penalty=2", None),
        ("objective=grpo rollouts.overlong_penalty=2", "overlong_penalty=2.0: rollouts.overlong_tokens=0"),
        ("objective=grpo rollouts.validation_every=2", "validation_every=2: rollouts.validation_prompts=0"),
        ("objective=grpo rollouts.max_malformed=0.1", "max_malformed=0.1: rollouts.reward=a.b:c has no problems"),
        ("objective=expert_iteration rollouts.advantages=std", "advantages=std: objective=expert_iteration has no"),
        (
            "objective=distill objective.teacher=embedded:tiny rollouts.mask_truncated=false",
            "mask_truncated=False: objective=distill learns from all answers",
        ),
    ],
)
def test_values_of_rollouts_that_nothing_uses_are_reported(words, told):
    warnings = load_train(["rollouts.reward=a.b:c", *words.split()]).checked.warnings
    assert [told in line for line in warnings if "no effect" in line] == ([] if told is None else [True])


def test_slots_that_every_copy_of_the_weights_would_decode_are_told():
    words = ["objective=grpo", "rollouts.reward=a.b:c", "hardware=v6e8", "mesh=dp", "model.path=random:0"]
    shape = ["trainer.global_batch_sequences=16", "trainer.microbatches=1"]
    assert not [line for line in load_train([*words, *shape]).checked.warnings if "divide over" in line]
    told = load_train([*words, *shape, "rollouts.slots=30"]).checked.warnings
    assert [line.split(": ")[0] for line in told if "give a multiple of 8" in line] == ["rollouts.slots=30"]
