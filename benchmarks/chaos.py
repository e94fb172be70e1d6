"""Kills every command at random moments, starts it again, and compares the result with an untouched run's.

    python -m benchmarks.chaos                       300 kills, an hour or two
    python -m benchmarks.chaos --kills 5 --seconds 120 --commands train
    python -m benchmarks.chaos --state chaos.json

`--state` keeps the counts after each series: the same command adds to them. Training and merging are compared bit by
bit here, the other commands (`killed_commands.py`) by what they leave. Each series of the former is one training run
(dropout, accumulation, packing, asynchronous saves) that is killed several times, at random moments of its updates and
now and then of its start; then left alone; then its merge is killed at moments drawn evenly over its duration. The
model is `tiny` cut to two layers, and processes are forked from one that has imported everything, so that a start costs
little; from there on each is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.chaos_page import EVERY, KILLS_PER_COMMAND, UPDATES, KillCounts, page
from benchmarks.killed_commands import scripted_server, subjects
from benchmarks.killing import CODES, TRAINS, Killer, KillTally, Process, has_left_files, problems
from benchmarks.pages import measured

TRAIN = [
    "lora.rank=2", "lora.dropout=0.1", "data=chat_jsonl", "data.heldout_fraction=0", "data.sequence_length=64",
    "trainer.global_batch_sequences=2", "trainer.microbatches=2", f"trainer.max_updates={UPDATES}",
    "trainer.remat=none", "optimizer.warmup_updates=0", f"checkpoint.every={EVERY}", "checkpoint.keep=3",
]  # fmt: skip
KILLS_PER_TRAIN, KILLS_PER_MERGE = 8, 8
ASKING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
SHARE_IN_START = 0.15
"""Of the kills of training runs; the others come during updates."""
UNDER_A_SAVE = 3
"""Updates that may pass while the checkpoint before them is still being written; they are lost with it."""


class Chaos:
    """Runs the series and counts."""

    def __init__(self, folder: Path, seed: int, counts: KillCounts):
        from gemma4_tpu.merge import main as merge
        from gemma4_tpu.train import main as train

        _import_all()
        self._train, self._merge = train, merge
        self._folder = folder
        self._words = [f"model.path={write_base(folder / 'base')}", f"data.train.0.path={write_rows(folder)}"]
        self._seed, self._random = seed, random.Random(seed)
        self.counts = counts
        self._complete("compile", self._train_words("compile"))  # fills the compilation cache
        started = time.monotonic()
        self._complete("reference", self._train_words("reference"))
        self._train_seconds = time.monotonic() - started
        started = time.monotonic()
        self._complete("reference", self._merge_words("reference"), merging=True)
        self._merge_seconds = time.monotonic() - started

    def series(self, kills: int) -> None:
        """The next series, with so many kills at most."""
        name, limit = f"series-{self.counts.series + 1}", self.counts.total_kills + kills
        self._random = random.Random(f"{self._seed} {name}")
        try:
            self._series(name, limit)
        except (AssertionError, TimeoutError) as error:
            self.counts.unrecoverable.append(f"{name}: {error}")
        self.counts.series += 1

    def _series(self, name: str, kills: int) -> None:
        for_merge = min((kills - self.counts.total_kills) // 2, KILLS_PER_MERGE)
        for _ in range(KILLS_PER_TRAIN):
            if self.counts.total_kills < kills - for_merge:
                self._killed_train(name)
        self._complete(name, self._train_words(name))
        run, reference = self._folder / name, self._folder / "reference"
        self._compare(f"{name}: metrics", metrics(run) == metrics(reference), "equal_metrics")
        self._compare(f"{name}: weights", self._weights(name) == self._weights("reference"), "equal_weights")
        for _ in range(KILLS_PER_MERGE):
            if self.counts.total_kills < kills:
                self._killed_merge(name)
        self._complete(name, self._merge_words(name), merging=True)
        self._compare(f"{name}: merged model", files(run / "merged") == files(reference / "merged"), "equal_merges")
        shutil.rmtree(run)

    def _killed_train(self, name: str) -> None:
        run, number = self._folder / name, self._random.choice((signal.SIGKILL, signal.SIGKILL, *ASKING))
        before = newest(run)
        process = Process(self._train, self._train_words(name), self._folder / f"{name}.txt")
        if self._random.random() < SHARE_IN_START:
            process.wait(self._random.uniform(0, 0.5 * self._train_seconds))
        else:
            self._wait_for_update(process, run, (before or 0) + self._random.randint(1, 4 * EVERY))
            process.wait(self._random.uniform(0, 0.1))
        if process.poll() is not None:
            assert process.code == 0, process.said()
            return  # it was done before
        code = process.kill(number)
        self._count_start(process, before)
        reference = self._folder / "reference"
        self._count_kill("train", process, number, TRAINS, lambda: metrics(run) == metrics(reference))
        self.counts.exits_42 += code == 42
        self.counts.interrupted_saves += any(run.glob("checkpoints/*tmp*"))
        done = max((row["update"] for row in metrics(run)), default=0)
        lost = done - (newest(run) or 0)
        self.counts.lost_updates.append(lost)
        if lost > EVERY + UNDER_A_SAVE:
            self.counts.different.append(f"{name}: {lost} updates lost")

    def _wait_for_update(self, process: Process, run: Path, update: int) -> None:
        """Until it is logged, or the process ends."""
        until = time.monotonic() + 1800
        while process.wait(0.01) is None and time.monotonic() < until:
            if any(row["update"] >= update for row in metrics(run)):
                return

    def _count_kill(
        self, what: str, process: Process, number: signal.Signals, codes: dict[int, tuple[int, ...]],
        complete: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Counts it, and what it did that it must not do."""
        kind = f"{what} {number.name}"
        self.counts.kills[kind] = self.counts.kills.get(kind, 0) + 1
        self.counts.wrong += [f"{kind}: {one}" for one in problems(process, number, codes[number], complete)]
        self.counts.left_by_sigkill += number == signal.SIGKILL and has_left_files(process)

    def _count_start(self, process: Process, before: int | None) -> None:
        text = process.errors.read_text(errors="replace")
        if resumed := re.search(r"resumed from the checkpoint at update (\d+)", text):
            assert before is not None and int(resumed[1]) == before, f"resumed from {resumed[1]}, not from {before}"
            self.counts.resumes += 1
        elif before is None:
            self.counts.fresh_starts += 1

    def _killed_merge(self, name: str) -> None:
        number = self._random.choice((signal.SIGKILL, *ASKING))
        process = Process(self._merge, self._merge_words(name), self._folder / f"{name}.txt")
        process.wait(self._random.uniform(0, 1.1 * self._merge_seconds))
        if process.poll() is not None:
            assert process.code == 0, process.said()
            shutil.rmtree(self._folder / name / "merged")  # it was done before: once more
            return
        process.kill(number)
        merged, reference = self._folder / name / "merged", self._folder / "reference" / "merged"
        self._count_kill("merge", process, number, CODES, lambda: files(merged) == files(reference))

    def _complete(self, name: str, words: list[str], merging: bool = False) -> None:
        before = newest(self._folder / name)
        process = Process(self._merge if merging else self._train, words, self._folder / f"{name}.txt")
        process.wait(1800)
        assert process.code == 0, f"exit {process.code}: {process.said()}"
        if not merging:
            self._count_start(process, before)

    def _compare(self, what: str, equal: bool, count: str) -> None:
        if equal:
            setattr(self.counts, count, getattr(self.counts, count) + 1)
        else:
            self.counts.different.append(what)

    def _weights(self, name: str) -> str:
        """In a child, too: what reads them starts threads."""
        process = Process(print_weights, [str(self._folder / name)], self._folder / f"{name}.weights.txt")
        process.wait(300)
        assert process.code == 0, process.said()
        return process.output.read_text()

    def _train_words(self, name: str) -> list[str]:
        return [
            *TRAIN,
            *self._words,
            f"run_dir={self._folder / name}",
            f"trainer.compile_cache={self._folder / 'compiled'}",
        ]

    def _merge_words(self, name: str) -> list[str]:
        return [f"run={self._folder / name}", "verify=stream"]


def _import_all() -> None:
    """Everything that a training and a merge import; no device is touched, so that children can be forked."""
    import grain  # noqa: F401
    import matplotlib.figure  # noqa: F401

    import gemma4_tpu.data.build
    import gemma4_tpu.export.job
    import gemma4_tpu.reporting.curves
    import gemma4_tpu.tracking.provenance
    import gemma4_tpu.training.compile_cache
    import gemma4_tpu.training.loop  # noqa: F401


def write_base(folder: Path) -> Path:
    """A checkpoint of `tiny`, cut to two layers, with random weights; `model=tiny` means that one from here on."""
    from safetensors.numpy import save_file

    from gemma4_tpu import assets
    from gemma4_tpu.architectures import ARCHITECTURES, GLOBAL, SLIDING, to_hf_config
    from gemma4_tpu.models.names import name_map

    arch = replace(ARCHITECTURES["tiny"], num_layers=2, layer_types=(SLIDING, GLOBAL), num_kv_shared_layers=0)
    ARCHITECTURES["tiny"] = arch
    rng = np.random.default_rng(0)
    shapes = {f"model.{n}": tensor.hf_shape for tensor in name_map(arch).values() for n in tensor.hf_names}
    tensors = {n: (0.1 * rng.standard_normal(shape)).astype(np.float32) for n, shape in sorted(shapes.items())}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf_config(arch)))
    for file in Path(assets.resolve("embedded:tiny")).iterdir():
        if file.suffix != ".safetensors" and not (folder / file.name).exists():
            shutil.copy(file, folder)  # the tokenizer
    return folder


def write_rows(folder: Path) -> Path:
    """Forty short conversations of different lengths."""
    path = folder / "rows.jsonl"
    turns = [[("user", f"{'a ' * (n % 7)}{n}"), ("assistant", f"{n + 1} {'b' * (n % 5)}")] for n in range(40)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(run: Path) -> list[dict]:
    """The rows, without times."""
    from gemma4_tpu.tracking.metrics import read_metrics

    keys = ("update", "loss", "grad_norm", "learning_rate", "real_tokens", "epoch")
    return [{key: row[key] for key in keys if key in row} for row in read_metrics(run / "metrics.jsonl")]


def newest(run: Path) -> int | None:
    """The newest checkpoint that verifies; nothing is changed."""
    from gemma4_tpu.training import checksums
    from gemma4_tpu.training.saved import saved_updates

    folder = run / "checkpoints"
    return next((u for u in reversed(saved_updates(folder)) if checksums.problem(f"{folder}/{u}") is None), None)


def print_weights(arguments: list[str]) -> int:
    """Prints a digest of every trained value of a run's last checkpoint."""
    from gemma4_tpu.training.saved import open_saved

    state = open_saved(Path(arguments[0]), "latest")
    digest = hashlib.sha256()
    for name in state.names:
        digest.update(name.encode() + np.asarray(state.read(name)).tobytes())
    print(f"update {state.update}: {digest.hexdigest()}")
    return 0


def files(folder: Path) -> dict[str, bytes]:
    """Contents of an export by name; its journal aside, which names the very save that it was made from."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "gemma4_tpu.json"}


def main() -> int:
    """Exit code: 0 if nothing was unrecoverable, nothing differed, and every command ended as documented."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="in all, those in --state included")
    parser.add_argument("--seconds", type=float, default=7200, help="no new series after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=100, help="kills of a series, at most")
    parser.add_argument("--commands", help="such as train,plan (default: every one)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--state", type=Path, help="JSON file that keeps the counts, to go on from")
    given, stamp = parser.parse_args(), measured("jax")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    kept = json.loads(given.state.read_text()) if given.state and given.state.is_file() else {}
    counts = KillCounts(**kept.get("train", {}))
    tallies = {name: KillTally(**tally) for name, tally in kept.get("commands", {}).items()}
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        _run(given, folder, counts, tallies)
    print(page(counts, tallies, stamp))
    wrong = counts.unrecoverable or counts.different or counts.wrong or any(tally.wrong for tally in tallies.values())
    return 1 if wrong else 0


def _run(given: argparse.Namespace, folder: Path, counts: KillCounts, tallies: dict[str, KillTally]) -> None:
    """Series after series, of each command in turn, until there are enough kills or the time is over."""
    cache = folder / "compiled"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    server, endpoint = scripted_server()
    chaos = Chaos(folder, given.seed, counts)
    run, wanted = folder / "reference", given.commands.split(",") if given.commands else None
    known = subjects(folder / "base", folder / "rows.jsonl", run, cache, endpoint)
    killers = {one.name: Killer(folder, one) for one in known if wanted is None or one.name in wanted}
    ready: set[str] = set()
    broken: set[str] = set()
    started, before = time.monotonic(), counts.seconds

    def total() -> int:
        return counts.total_kills + sum(tally.total for tally in tallies.values())

    try:
        while total() < given.kills and time.monotonic() - started < given.seconds:
            for name in (["train"] if wanted is None or "train" in wanted else []) + list(killers):
                left = min(given.kills - total(), given.each)
                if left <= 0 or time.monotonic() - started > given.seconds:
                    break
                if name == "train":
                    chaos.series(left)
                else:
                    tally, killer = tallies.setdefault(name, KillTally()), killers[name]
                    if name in broken:
                        continue
                    if name not in ready:
                        try:
                            killer.prepare()
                        except AssertionError as error:  # it does not even end where nobody kills it
                            tally.wrong.append(f"{name}: {error}")
                            broken.add(name)
                            continue
                        ready.add(name)
                    draw = random.Random(f"{given.seed} {name} {tally.series}")
                    killer.series(tally.series, min(left, KILLS_PER_COMMAND), draw, tally)
                counts.seconds = before + time.monotonic() - started
                print(f"{name}: {total()} kills, {counts.seconds:.0f} s", file=sys.stderr, flush=True)
                if given.state:
                    kept = {"train": asdict(counts), "commands": {n: asdict(each) for n, each in tallies.items()}}
                    given.state.write_text(json.dumps(kept))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
