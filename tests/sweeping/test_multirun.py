"""A sweep of stand-in jobs: order, restarts, failures, what a second start does, Ctrl-C, parallel jobs."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.sweeps import fixed_keys, job_name, sweep_name, sweep_problems, swept
from gemma4_tpu.config.tasks import MergeRoot
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.checks import examine_merge
from gemma4_tpu.sweeping import devices, job_process, plan_check
from gemma4_tpu.sweeping.state import Sweep, SweepJob
from gemma4_tpu.tracking.files import write_json
from tests.sweeping.conftest import STAND_IN
from tests.tracking.test_trackers import history, read_wandb

RANKS = ("lora.rank-2", "lora.rank-4", "lora.rank-8")


def statuses(sweep: Sweep) -> dict[str, str]:
    return {name: job.status for name, job in sweep.jobs.items()}


def when(condition, act):
    """Does something as soon as a condition holds, beside the test."""

    def watch():
        until = time.monotonic() + 300
        while time.monotonic() < until and not condition():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_job_finds_its_folder_whatever_it_is_called(tmp_path):
    for name in ("it's", "a,b=c", "back\\slash", "${x"):
        *_, word = job_process.command("train", [], tmp_path / name)
        assert OverridesParser.create().parse_override(word).value() == str(tmp_path / name)


def test_a_key_is_not_swept_and_set():
    """The last word counts, so that jobs would have the same values, and share a folder."""
    chosen = {"hydra/sweeper": "grid"}
    for words in (["lora.rank=4", "lora.rank=2,8"], ["lora.rank=2,8", "+lora.rank=4"], ["lora.rank=2,8"] * 2):
        (problem,) = sweep_problems(["trainer.seed=1", "trainer.seed=2", *words], chosen)
        assert problem.message == f"{', '.join(words)}: lora.rank is swept and given twice; give it once"
    assert not sweep_problems(["mesh=fsdp", "mesh.tp=1,2", "trainer.seed=1", "trainer.seed=2"], chosen)


@pytest.mark.slow
def test_a_failing_and_a_preempted_job_do_not_stop_a_sweep_and_the_next_start_goes_on(sweep):
    sweep.behave(**{"lora.rank-2": {"preempted": 1}, "lora.rank-4": {"error": "no such thing"}})
    first = sweep("lora.rank=2,4,8", exit_code=1)
    assert sweep.starts == ["lora.rank-2", "lora.rank-2", "lora.rank-4", "lora.rank-8"]
    assert statuses(first) == dict(zip(RANKS, ("finished", "failed", "finished"), strict=True))
    assert first.jobs["lora.rank-4"].error == "no such thing"
    table = {row["lora.rank"]: row for row in sweep.table}
    assert (table["2"]["starts"], table["2"]["heldout_loss_last"], table["4"]["error"]) == ("2", "1.0", "no such thing")
    assert "no such thing" in (sweep.folder / "sweep.md").read_text()

    # `merge run=<sweep folder>` takes what finished, and says what it leaves out.
    for name in RANKS:
        (sweep.folder / name / "checkpoints").mkdir(exist_ok=True)
    checked, _ = examine_merge(MergeRoot(run=str(sweep.folder)))
    assert [run.name for run in checked.runs] == ["lora.rank-2", "lora.rank-8"]
    assert checked.skipped == ("lora.rank-4: failed",)

    sweep.behave()
    second = sweep("lora.rank=2,4,8,16")  # more values: the same folder, only what is new or unfinished
    assert sweep.starts[4:] == ["lora.rank-4", "lora.rank-16"]
    assert set(statuses(second).values()) == {"finished"}
    assert second.jobs["lora.rank-4"].starts == 2


def test_a_job_that_its_time_limit_stopped_has_its_result_and_goes_on_with_the_next_start(sweep):
    """It exits with 0, as one that patience ended does, which is finished for good."""
    sweep.behave(**{"lora.rank-4": {"status": "stopped"}})
    first = sweep("lora.rank=2,4")
    assert set(statuses(first).values()) == {"finished"}
    assert [row["heldout_loss_last"] for row in sweep.table] == ["1.0", "1.0"]
    sweep("lora.rank=2,4")
    assert sweep.starts == ["lora.rank-2", "lora.rank-4", "lora.rank-4"]


def test_why_a_job_was_killed_is_told_if_it_said_so(sweep):
    sweep.behave(**{"lora.rank-4": {"error": "the template of x", "killed": True}})
    done = sweep("lora.rank=2,4", exit_code=1)
    assert [job.error for job in done.jobs.values()] == [None, "the template of x"]


def test_a_job_is_given_up_after_so_many_preemptions(sweep):
    sweep.behave(all={"preempted": 9})
    done = sweep("lora.rank=choice(2)", "hydra.launcher.max_restarts=1", exit_code=1)
    assert sweep.starts == ["lora.rank-2"] * 2
    assert done.jobs["lora.rank-2"].error == "preempted 2 times (hydra.launcher.max_restarts=1)"


@pytest.mark.slow  # its jobs import wandb
def test_wandb_has_a_sweep_as_a_group_of_runs_named_after_their_overrides(sweep, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    sweep("lora.rank=2,4", "tracker=wandb")
    found = {}
    for name in RANKS[:2]:
        (records,) = read_wandb(sweep.folder / name)
        run = next(record["run"] for record in records if record["type"] == "run")
        losses = [row["heldout_loss"] for row in history(records).values()]
        found[run["display_name"]] = (run["run_group"], run["config"]["update"]["lora"]["rank"], losses)
    group = "/".join(sweep.folder.parts[-2:])
    assert found == {f"model.path=random:0 lora.rank={rank}": (group, rank, [3.0, 2.0, 1.0]) for rank in (2, 4)}


def test_what_the_checks_refuse_is_listed_and_the_rest_runs(sweep):
    words = ("hardware=v5p8", "mesh.tp=2,3", "trainer.microbatches=2", "hydra.launcher.plan=false")
    done = sweep(*words)
    assert statuses(done) == {"mesh.tp-2": "finished", "mesh.tp-3": "refused"}
    assert sweep.starts == ["mesh.tp-2"]
    assert "mesh.tp=3: not possible for model=tiny on 4 devices" in done.jobs["mesh.tp-3"].error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
@pytest.mark.slow
def test_a_stopped_sweep_lets_its_job_save_and_goes_on_when_started_again(sweep, number, code):
    sweep.behave(all={"seconds": 30})
    watch = when(lambda: sweep.starts, lambda: (time.sleep(0.5), os.kill(os.getpid(), number)))
    stopped = sweep("lora.rank=2,4", exit_code=code)
    watch.join()
    assert statuses(stopped) == {"lora.rank-2": "interrupted", "lora.rank-4": "waiting"}
    assert stopped.run_folder(stopped.jobs["lora.rank-2"]).joinpath("result.json").is_file()  # it had its time to save
    if number == signal.SIGINT:
        sweep.behave()
        assert set(statuses(sweep("lora.rank=2,4")).values()) == {"finished"}
        assert sweep.starts == ["lora.rank-2", "lora.rank-2", "lora.rank-4"]


def test_a_second_ctrl_c_kills_a_job_that_does_not_listen(sweep):
    sweep.behave(all={"seconds": 60, "stubborn": True})

    def twice():
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGINT)

    watch = when(lambda: sweep.starts, twice)
    started = time.monotonic()
    assert statuses(sweep("lora.rank=2,4", exit_code=130))["lora.rank-2"] == "interrupted"
    watch.join()
    assert time.monotonic() - started < 100  # it would take 180


@pytest.mark.slow
def test_jobs_at_a_time_share_the_gpus(sweep, monkeypatch):
    monkeypatch.setattr(devices, "gpus_here", lambda: ["0", "1", "2", "3"])
    sweep.behave(all={"waits_for_starts": 2, "seconds": 0.2})  # the first ends no sooner than the second has begun
    sweep("lora.rank=2,4,8", "hydra.launcher.parallel=2")
    starts = [line.split() for line in Path("starts.txt").read_text().splitlines()]
    assert {words[2] for words in starts[:2]} == {"0,1", "2,3"}
    began = [float(words[1]) for words in starts]
    ended = sorted((sweep.folder / name / "result.json").stat().st_mtime for name in RANKS)
    assert max(began[:2]) < ended[0] < began[2]  # two at a time, then the third


def test_one_accelerator_is_not_fought_for(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    tpu = HardwareConfig(name="v5p-8")
    with pytest.raises(UserError, match=r"hydra.launcher.parallel=2: hardware=v5p8 has a TPU.*parallel=1"):
        devices.shares(2, [HardwareConfig(), tpu])
    monkeypatch.setattr(devices, "tpu_here", lambda: True)
    with pytest.raises(UserError, match="this machine has a TPU"):
        devices.shares(2, [HardwareConfig()])
    monkeypatch.setattr(devices, "tpu_here", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert devices.shares(2, [HardwareConfig()]) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(UserError, match=r"there are only 2 GPUs.*at most hydra.launcher.parallel=2"):
        devices.shares(3, [HardwareConfig()])
    with pytest.raises(UserError, match=r"hardware=h100x2 takes 2 GPUs, but each job would get 1.*parallel=1"):
        devices.shares(2, [HardwareConfig(name="h100x2")])


@pytest.mark.slow
def test_jobs_that_do_not_fit_are_listed_before_anything_runs(sweep, monkeypatch):
    compiled = []

    def compile_(config, answer, stopped):
        compiled.append(config.lora.rank)
        told = ("the step needs 40.0 GiB", False) if config.lora.rank > 64 else ("fits: 9.0 GiB of 31.2 GiB HBM", True)
        write_json(answer, plan_check.Fit(told[1], told[0]))

    monkeypatch.setattr(plan_check, "_compile", compile_)
    monkeypatch.setattr(plan_check, "_obstacle", lambda config: None)  # libtpu need not be there
    words = ("hardware=v6e1", "lora.rank=8,128", "optimizer.learning_rate=1e-4,2e-4")
    done = sweep(*words)
    assert compiled == [8, 128]  # the learning rate changes no memory
    assert [job.status for job in done.jobs.values()] == ["finished", "finished", "does not fit", "does not fit"]
    assert len(sweep.starts) == 2
    assert sweep.table[2]["error"] == "the step needs 40.0 GiB"
    sweep(*words)
    assert compiled == [8, 128]  # the answers are kept in the sweep folder


def test_a_plan_check_that_is_insisted_on_but_impossible_is_refused(sweep, capsys):
    sweep("lora.rank=8,16", "hydra.launcher.plan=true", exit_code=2)
    assert "hydra.launcher.plan=true: a job cannot be checked here (hardware=local" in capsys.readouterr().err


def test_the_names_of_sweep_and_jobs_follow_from_the_command():
    words = ["lora.rank=16,32", "mesh=tp,fsdp", "trainer.max_updates=5", "data.train.0.path=gs://b/x.jsonl"]
    name = sweep_name(words)
    assert name.startswith("lora.rank+mesh_")
    assert sweep_name(["lora.rank=64,128", "mesh=auto,tp", *words[2:]]) == name  # more values go on in the same folder
    assert sweep_name([*words[:2], "trainer.max_updates=6", words[3]]) != name
    assert sweep_name([*words, "hydra.launcher.parallel=2"]) == name
    job = ["lora.rank=16", "mesh=tp", *words[2:]]
    assert job_name(swept(job, fixed_keys(words))) == "lora.rank-16+mesh-tp"
    odd = [job_name({"data.train.0.path": path}) for path in ("gs://b/x y", "gs://b/x_y")]
    assert len(set(odd)) == 2
    assert not set("/ :,=") & set("".join(odd))  # a folder's name, and typed unquoted after run=


def test_a_sweep_is_run_by_one_process_at_a_time(sweep, capsys):
    code = "import sys; from pathlib import Path; from gemma4_tpu.sweeping.state import SweepLock"
    code += f"; lock = SweepLock(Path({str(sweep.folder)!r})); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        sweep("lora.rank=2,4", exit_code=2)
        assert f"this sweep is being run by another process (pid {other.pid})" in capsys.readouterr().err
        other.stdin.close()
    assert not sweep.starts


@pytest.mark.parametrize("kept", [True, False])
def test_a_job_that_outlived_its_sweep_is_taken_over(sweep, caplog, kept):
    """Also where the sweep was killed before it had kept that the job runs."""
    folder, words = sweep.folder / "lora.rank-8", ["model.path=random:0", "lora.rank=8"]
    orphan = subprocess.Popen([*STAND_IN, *words, f"run_dir='{folder}'"])
    orphan.send_signal(signal.SIGSTOP)  # until it is found
    watch = when(lambda: "still running" in caplog.text, lambda: orphan.send_signal(signal.SIGCONT))
    about = {"status": "running", "starts": 1, "pid": orphan.pid} if kept else {"status": "waiting"}
    job = SweepJob(name=folder.name, values={"lora.rank": "8"}, words=words, **about)
    sweep.folder.mkdir()
    Sweep(folder=sweep.folder, entry="train", jobs={job.name: job}).save()
    done = sweep("lora.rank=4,8")
    watch.join()
    assert [one.status for one in done.jobs.values()] == ["finished", "finished"]
    assert (done.jobs[job.name].pid, done.jobs[job.name].starts) == (orphan.pid, int(kept)) and orphan.wait(60) == 0
    assert sweep.starts == ["lora.rank-8", "lora.rank-4"]  # nothing new before it has ended
    assert "lora.rank-8: still running" in caplog.text
