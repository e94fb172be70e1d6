"""A search over stand-in jobs: the best is found, poor trials are stopped, a second start goes on with the study."""

import json
import os
import signal
import time
from pathlib import Path

import optuna
import pytest

from gemma4_tpu.sweeping.state import Sweep
from gemma4_tpu.tracking.run import RunFolder
from tests.sweeping.test_multirun import when

WORDS = ("hydra/sweeper=optuna", "hydra.sweeper.sampler=random", "hydra.sweeper.prune_after_trials=2")


def study_of(sweep: Sweep) -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(sweep.folder / "optuna.journal"))
    return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))


@pytest.mark.slow
def test_poor_trials_are_stopped_and_the_next_start_goes_on_with_the_study(sweep):
    Path("space.yaml").write_text(
        "lora.rank: choice(2, 4, 8, 16)\noptimizer.learning_rate: tag(log, interval(1e-5, 1e-3))\n"
    )
    # One rank is poor at once: its jobs wait to be stopped, and would wait long.
    good = [{f"lora.rank-{rank}": {"losses": [3.0, 2.0, 1.0 / rank]}} for rank in (2, 4, 8)]
    behaviour = {key: value for one in good for key, value in one.items()}
    behaviour["lora.rank-16"] = {"losses": [3.0, 2.9, 2.8, 2.7], "seconds": 10}
    sweep.behave(**behaviour)
    words = (*WORDS, "hydra.sweeper.space=space.yaml", "optimizer.learning_rate=1e-4")
    first = sweep(*words, "hydra.sweeper.n_trials=5", "hydra.sweeper.seed=7")
    trials = study_of(first).trials
    ranks = [trial.params["lora.rank"] for trial in trials]
    assert [set(trial.params) for trial in trials] == [{"lora.rank"}] * 5  # the command line fixed the other key
    assert {job.status for name, job in first.jobs.items() if name != "lora.rank-16"} == {"finished"}
    poor = first.jobs["lora.rank-16"]
    assert (poor.status, poor.error) == (
        "pruned", "held-out loss 2.9000 at update 1, worse than the median of earlier trials there",
    )  # fmt: skip
    states = {trial.params["lora.rank"]: trial.state.name for trial in trials}
    assert states["16"] == "PRUNED" and states["2"] == "COMPLETE"
    best = study_of(first).best_trial
    assert best.value == 1.0 / max(int(rank) for rank in ranks if rank != "16")
    assert (
        f"Best by heldout_loss_best (minimized): `{best.user_attrs['job']}`" in (sweep.folder / "sweep.md").read_text()
    )
    assert len(sweep.starts) == len(set(ranks))  # what was drawn twice ran once

    before = len(sweep.starts)
    sweep(*words, "hydra.sweeper.n_trials=5", "hydra.sweeper.seed=7")
    assert len(sweep.starts) == before  # the search is done
    assert len(study_of(first).trials) == 5


def test_a_stopped_search_runs_its_unfinished_trial_again(sweep):
    sweep.behave(all={"seconds": 30})
    words = (
        *WORDS,
        "lora.rank=interval(2,64)",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.metric=real_tokens_per_second",
    )
    words = (*words, "hydra.sweeper.direction=maximize")
    watch = when(lambda: sweep.starts, lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGINT)))
    stopped = sweep(*words, exit_code=130)
    watch.join()
    (name,) = stopped.jobs
    Path("behaviour.json").write_text(json.dumps({name: {"speed": 900.0}}))
    done = sweep(*words)
    assert sweep.starts[:2] == [name, name]
    assert [job.status for job in done.jobs.values()] == ["finished", "finished"]
    assert study_of(done).best_trial.user_attrs["job"] == name
    assert study_of(done).best_value == 900.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to search"),
        (
            ["hydra.sweeper.space=lara"],
            "hydra.sweeper.space=lara: no such file; did you mean lora? (conf/space has lora",
        ),
        (
            ["lora.rank=2,4", "hydra.sweeper.metric=heldout_loss"],
            "did you mean heldout_loss_last or heldout_loss_best?",
        ),
        (["lora.rank=2,4", "hydra.sweeper.direction=up"], "not a choice (choices: minimize, maximize)"),
        (["hydra.sweeper.space=bad.yaml"], "lora.rnk=choice(1,2): no such key; did you mean lora.rank?"),
        (["lora.rank=interval(8,2)"], "lora.rank: "),
    ],
)
def test_what_can_not_be_searched_is_refused(sweep, capsys, words, told):
    Path("bad.yaml").write_text("lora.rnk: choice(1,2)")
    sweep("hydra/sweeper=optuna", *words, exit_code=2)
    assert told in capsys.readouterr().err


def test_objectives_are_searched_like_any_group(sweep):
    Path("space.yaml").write_text("objective: choice(sft, grpo)\n")
    words = ("hydra.sweeper.space=space.yaml", "rollouts.reward=a.b:c", "hydra.sweeper.seed=1")
    swept = sweep(*WORDS, *words, "hydra.sweeper.n_trials=4")
    assert {job.status for job in swept.jobs.values()} == {"finished"}
    assert {trial.params["objective"] for trial in study_of(swept).trials} == {"sft", "grpo"}
    for kind in ("sft", "grpo"):
        assert RunFolder.existing(str(sweep.folder / f"objective-{kind}")).read_config()["objective"]["kind"] == kind


def test_a_measure_of_the_objective_can_decide(sweep):
    sweep.behave(**{f"lora.rank-{rank}": {"measures": {"heldout_accuracy": rank / 10}} for rank in (2, 4)})
    words = ("hydra.sweeper.metric=heldout_accuracy", "hydra.sweeper.direction=maximize", "hydra.sweeper.seed=1")
    study = study_of(sweep(*WORDS, *words, "lora.rank=choice(2,4)", "hydra.sweeper.n_trials=4"))
    assert {trial.value for trial in study.trials} == {0.2, 0.4}
    assert (study.best_trial.params["lora.rank"], study.best_value) == ("4", 0.4)


def test_an_interval_is_not_enumerated(sweep, capsys):
    from gemma4_tpu.train import main

    assert main(["-m", "lora.rank=interval(2,8)"]) == 2
    assert "an interval is searched, not enumerated; add hydra/sweeper=optuna" in capsys.readouterr().err
