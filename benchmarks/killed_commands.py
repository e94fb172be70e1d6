"""The commands that `chaos.py` kills, but for training and merging: their words, and what has to come of each."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from benchmarks.killing import TRAINS, Killed


def subjects(base: Path, rows: Path, run: Path, cache: Path, endpoint: str) -> list[Killed]:
    """Every command but training and merging, which `chaos.py` compares bit by bit.

    Args:
      base: a checkpoint of `tiny`.
      rows: conversations.
      run: a finished training run on both.
      cache: for compiled programs.
      endpoint: a server to load.
    """
    on_policy = [
        f"model.path={base}", "data=chat_jsonl", f"data.train.0.path={rows}", "data.heldout_fraction=0", "lora.rank=2",
        "data.sequence_length=144", "trainer.remat=none", "trainer.global_batch_sequences=4", "trainer.max_updates=4",
        "rollouts.reward=benchmarks.killed_commands:share_of_vowels", "rollouts.prompts=2", "rollouts.samples=2",
        "rollouts.new_tokens=8", "rollouts.slots=4", "rollouts.mask_truncated=false", "rollouts.max_kl=null",
        "checkpoint.every=1", "optimizer.warmup_updates=0", f"trainer.compile_cache={cache}",
    ]  # fmt: skip
    of_pairs = [
        f"model.path={base}", "data=chat_jsonl", f"data.train.0.path={write_pairs(rows)}", "data.format=preference",
        "data.heldout_fraction=0", "lora.rank=2", "data.sequence_length=64", "trainer.remat=none",
        "trainer.global_batch_sequences=4", "trainer.max_updates=12", "checkpoint.every=3",
        "optimizer.warmup_updates=0", f"trainer.compile_cache={cache}",
    ]  # fmt: skip
    flags = os.environ.get("XLA_FLAGS", "")
    judged = ["eval.max_problems=2", "eval.judge.workers=1", f"eval.judge.cache_dir={cache / 'judge'}"]
    jobs = [
        "-m", "model.path=random:0", "data=chat_jsonl", f"data.train.0.path={rows}", "data.heldout_fraction=0",
        "data.sequence_length=64", "trainer.global_batch_sequences=8", "trainer.max_updates=3", "trainer.remat=none",
        "optimizer.warmup_updates=0", f"trainer.compile_cache={cache}",
    ]  # fmt: skip
    search = [
        "hydra/sweeper=optuna", "hydra.sweeper.sampler=random", "hydra.sweeper.n_trials=20",
        "hydra.sweeper.metric=real_tokens", "lora.rank=2", "trainer.max_updates=1", "hydra.launcher.parallel=2",
        "trainer.seed=interval(0,1000000)",  # equal draws share a job; these are all different
    ]  # fmt: skip
    return [
        *(
            Killed(kind, "gemma4_tpu.train", _in_run(f"objective={kind}", *on_policy), _losses, codes=TRAINS)
            for kind in ("grpo", "expert_iteration")
        ),
        Killed("distill", "gemma4_tpu.train",
               _in_run("objective=distill", f"objective.teacher={base}", *on_policy), _losses, codes=TRAINS),
        Killed("dpo", "gemma4_tpu.train", _in_run("objective=dpo", *of_pairs), _losses, codes=TRAINS),
        Killed(
            "evaluate", "gemma4_tpu.evaluate",
            _in_run(f"run={run}", "eval.n=1", "eval.max_new_tokens=6", "eval.batch_size=2", *judged), _verdicts,
        ),
        Killed(
            "plan", "gemma4_tpu.plan",
            _in_run("model=tiny", "model.path=random:0", "hardware=v5e4", "data=chat_jsonl",
                    f"data.train.0.path={rows}", "data.sequence_length=256", "plan.schedule=false",
                    "trainer.remat=none"),
            _plan,
        ),
        Killed(
            "serve", "gemma4_tpu.serve",
            lambda place: [f"run={run / 'merged'}", "serving=local", f"serving.port={_free_port()}",
                           f"run_dir={place / 'run'}"],
            lambda place: None, ready="endpoint: ",
        ),
        Killed("report", "gemma4_tpu.report", lambda place: [f"run={run}", f"out={place / 'page.md'}"], _page),
        Killed("check", "gemma4_tpu.check", lambda place: [f"model.path={base}"],
               lambda place: place.with_suffix(".txt").read_text()),
        Killed("bench", "gemma4_tpu.bench", _in_run(f"endpoint={endpoint}", "bench=smoke"), _cells),
        Killed("judge", "gemma4_tpu.judge", lambda place: [*judged, "port=0"], lambda place: None,
               ready="http://"),
        Killed("sweep", "gemma4_tpu.train", _in_sweep(*jobs, "lora.rank=2,4"), _jobs, codes=TRAINS, orphans=True),
        Killed("search", "gemma4_tpu.train", _in_sweep(*jobs, *search), _trials, codes=TRAINS, orphans=True),
        Killed("meshes", "gemma4_tpu.train", _in_sweep(*jobs, "lora.rank=2", "mesh.tp=1,2"), _jobs, codes=TRAINS,
               orphans=True, environment={"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8"}),
    ]  # fmt: skip


def _in_run(*words: str) -> Callable[[Path], list[str]]:
    return lambda place: [*words, f"run_dir={place / 'run'}"]


def _in_sweep(*words: str) -> Callable[[Path], list[str]]:
    return lambda place: [*words, f"hydra.sweep.dir={place / 'sweep'}"]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def write_pairs(rows: Path) -> Path:
    """Pairs with the first prompt of every conversation: its answer is chosen, that of the next one rejected."""
    turns = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    path = rows.with_name("pairs.jsonl")
    path.write_text("".join(
        json.dumps({"prompt": one[:1], "chosen": one[1:2], "rejected": other[1:2]}) + "\n"
        for one, other in zip(turns, turns[1:] + turns[:1], strict=True)
    ))  # fmt: skip
    return path


def share_of_vowels(rows: list[dict[str, Any]]) -> list[float]:
    """A reward that needs no judge."""
    return [sum(map(row["completion"].count, "aeiou")) / (1 + len(row["completion"])) for row in rows]


def _losses(place: Path) -> list[tuple[int, float]]:
    lines = (place / "run/metrics.jsonl").read_text().splitlines()
    return [(row["update"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]


def _verdicts(place: Path) -> dict[str, list[Any]]:
    made = sorted((place / "run").rglob("samples.jsonl")) + sorted((place / "run").rglob("verdicts.jsonl"))
    skipped = ("cpu_seconds", "seconds")
    return {
        str(path.relative_to(place)): sorted(
            json.dumps({k: v for k, v in json.loads(line).items() if k not in skipped})
            for line in path.read_text().splitlines()
        )
        for path in made
    }


def _plan(place: Path) -> Any:
    told = json.loads((place / "run/plan.json").read_text())
    return {key: told[key] for key in ("fits", "hbm_bytes_per_chip", "flops_per_real_token_and_chip")}


def _page(place: Path) -> tuple[str, list[str]]:
    """The page, without when it was made and the name of its folder; and the names of all that is with it."""
    made = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    text = (place / "page.md").read_text().replace(str(place), "")
    return re.sub(r"^Made on \S+ \S+ UTC ", "", text, flags=re.MULTILINE), made


def _cells(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "run").rglob("*.json"))


def _jobs(place: Path) -> list[tuple[str, str]]:
    return [(job["name"], job["status"]) for job in json.loads((place / "sweep/sweep.json").read_text())["jobs"]]


def _trials(place: Path) -> tuple[int, int, set[str]]:
    """Trials that are complete, jobs, and what came of those; which are drawn depends on the kills."""
    backend = optuna.storages.journal.JournalFileBackend(str(place / "sweep/optuna.journal"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    jobs = _jobs(place)
    return len(complete), len(jobs), {status for _, status in jobs}


def scripted_server() -> tuple[subprocess.Popen[str], str]:
    """A server that answers by the clock, for `bench`: (process, endpoint)."""
    script = Path(__file__).parents[1] / "tests/benching/scripted_server.py"
    with tempfile.NamedTemporaryFile("w+") as said:  # not a pipe, which would be full after some hundred answers
        process = subprocess.Popen([sys.executable, script, "{}"], stdout=said)
        while not (line := Path(said.name).read_text()).endswith("\n"):
            time.sleep(0.05)
    return process, f"http://127.0.0.1:{line.split()[0]}"
