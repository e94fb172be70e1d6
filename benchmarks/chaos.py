"""Kills training runs and merges at random moments, starts them again, and compares what comes of them, bit by bit.

    python benchmarks/chaos.py                       100 kills, some minutes
    python benchmarks/chaos.py --kills 5 --seconds 120
    python benchmarks/chaos.py --write benchmarks/chaos.md

Each series is one training (dropout, accumulation, packing, asynchronous saves) that is killed several times, by
SIGKILL or SIGTERM, at random moments of its updates and now and then of its start; then left alone; then its merge is
killed at moments drawn evenly over its duration. Reference: the same training and merge, never touched. The model is
`tiny` cut to two layers, and processes are forked from one that has imported everything, so that a start costs little;
from there on each is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from gemma4_tpu.markdown import table

EVERY = 3
UPDATES = 60
TRAIN = [
    "lora.rank=2", "lora.dropout=0.1", "data=chat_jsonl", "data.heldout_fraction=0", "data.sequence_length=64",
    "trainer.global_batch_sequences=2", "trainer.microbatches=2", f"trainer.max_updates={UPDATES}",
    "trainer.remat=none", "optimizer.warmup_updates=0", f"checkpoint.every={EVERY}", "checkpoint.keep=3",
]  # fmt: skip
KILLS_PER_TRAIN, KILLS_PER_MERGE = 8, 3
SHARE_IN_START = 0.15
"""Of the kills of training runs; the others come during updates."""
UNDER_A_SAVE = 3
"""Updates that may pass while the checkpoint before them is still being written; they are lost with it."""


@dataclass
class Counts:
    """What the table shows."""

    series: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    """By what was killed, and how: `train SIGKILL`."""
    resumes: int = 0
    """Starts that resumed from a checkpoint."""
    fresh_starts: int = 0
    """Starts that found none yet."""
    exits_42: int = 0
    interrupted_saves: int = 0
    """Kills while a checkpoint was being written."""
    lost_updates: list[int] = field(default_factory=list)
    """Of each killed training: updates done that the next start has to do again."""
    unrecoverable: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    equal_weights: int = 0
    equal_metrics: int = 0
    equal_merges: int = 0
    seconds: float = 0.0

    @property
    def total_kills(self) -> int:
        return sum(self.kills.values())


class Process:
    """A command in a forked child, its output in a file."""

    def __init__(self, main: Callable[[list[str]], int], arguments: Sequence[str], output: Path):
        self.output = output
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(file, 1)
                os.dup2(file, 2)
                code = main(list(arguments))
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None: still running."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float) -> int | None:
        """Waits at most this long."""
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return self.code

    def kill(self, number: int) -> int:
        """Sends the signal and waits for the end."""
        os.kill(self.pid, number)
        if self.wait(300) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)
            raise TimeoutError(f"still running 300 s after {signal.Signals(number).name}")
        assert self.code is not None
        return self.code


class Chaos:
    """Runs the series and counts."""

    def __init__(self, folder: Path, seed: int):
        from gemma4_tpu.merge import main as merge
        from gemma4_tpu.train import main as train

        _import_all()
        self._train, self._merge = train, merge
        self._folder = folder
        self._words = [f"model.path={write_base(folder / 'base')}", f"data.train.0.path={write_rows(folder)}"]
        self._random = random.Random(seed)
        self.counts = Counts()
        started = time.monotonic()
        self._complete("compile", self._train_words("compile"))  # fills the compilation cache
        started = time.monotonic()
        self._complete("reference", self._train_words("reference"))
        self._train_seconds = time.monotonic() - started
        started = time.monotonic()
        self._complete("reference", self._merge_words("reference"), merging=True)
        self._merge_seconds = time.monotonic() - started

    def run(self, kills: int, seconds: float) -> None:
        """Series after series until this many kills, or this much time."""
        until, started = time.monotonic() + seconds, time.monotonic()
        while self.counts.total_kills < kills and time.monotonic() < until:
            name = f"series-{self.counts.series + 1}"
            try:
                self._series(name, kills)
            except (AssertionError, TimeoutError) as error:
                self.counts.unrecoverable.append(f"{name}: {error}")
            self.counts.series += 1
            self.counts.seconds = time.monotonic() - started
            print(f"{name}: {self.counts.total_kills} kills, {self.counts.seconds:.0f} s", flush=True)

    def _series(self, name: str, kills: int) -> None:
        for _ in range(KILLS_PER_TRAIN):
            if self.counts.total_kills < kills:
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
        run, number = self._folder / name, self._random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        before = newest(run)
        process = Process(self._train, self._train_words(name), self._folder / f"{name}.txt")
        if self._random.random() < SHARE_IN_START:
            process.wait(self._random.uniform(0, 0.5 * self._train_seconds))
        else:
            self._wait_for_update(process, run, (before or 0) + self._random.randint(1, 4 * EVERY))
            process.wait(self._random.uniform(0, 0.1))
        if process.poll() is not None:
            assert process.code == 0, said(process)
            return  # it was done before
        code = process.kill(number)
        self._count_start(process, before)
        self._count_kill(f"train {number.name}")
        if number == signal.SIGTERM:
            assert code in (42, 0, -signal.SIGTERM), f"exit {code} after SIGTERM: {said(process)}"
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

    def _count_kill(self, what: str) -> None:
        self.counts.kills[what] = self.counts.kills.get(what, 0) + 1

    def _count_start(self, process: Process, before: int | None) -> None:
        text = process.output.read_text(errors="replace")
        if resumed := re.search(r"resumed from the checkpoint at update (\d+)", text):
            assert before is not None and int(resumed[1]) == before, f"resumed from {resumed[1]}, not from {before}"
            self.counts.resumes += 1
        elif before is None:
            self.counts.fresh_starts += 1

    def _killed_merge(self, name: str) -> None:
        number = self._random.choice((signal.SIGKILL, signal.SIGTERM))
        process = Process(self._merge, self._merge_words(name), self._folder / f"{name}.txt")
        process.wait(self._random.uniform(0, 1.1 * self._merge_seconds))
        if process.poll() is not None:
            assert process.code == 0, said(process)
            shutil.rmtree(self._folder / name / "merged")  # it was done before: once more
            return
        process.kill(number)
        self._count_kill(f"merge {number.name}")

    def _complete(self, name: str, words: list[str], merging: bool = False) -> None:
        before = newest(self._folder / name)
        process = Process(self._merge if merging else self._train, words, self._folder / f"{name}.txt")
        process.wait(1800)
        assert process.code == 0, f"exit {process.code}: {said(process)}"
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
        assert process.code == 0, said(process)
        return said(process)

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


def said(process: Process) -> str:
    """The end of what a process printed."""
    return process.output.read_text(errors="replace")[-2000:]


def page(counts: Counts, command: str) -> str:
    """The result as Markdown."""
    lost = counts.lost_updates
    rows = [
        ("training runs (series)", counts.series),
        *[(f"kills: {what}", number) for what, number in sorted(counts.kills.items())],
        ("kills in all", counts.total_kills),
        ("of them while a checkpoint was being written", counts.interrupted_saves),
        ("SIGTERM during a training run that exited with 42", counts.exits_42),
        ("starts that resumed from a checkpoint", counts.resumes),
        ("starts that found no checkpoint yet", counts.fresh_starts),
        (f"updates lost by a kill (checkpoint.every={EVERY}): mean", f"{np.mean(lost):.1f}" if lost else "-"),
        ("updates lost by a kill: most", max(lost, default=0)),
        ("final weights equal to the reference, bitwise", f"{counts.equal_weights} of {counts.series}"),
        ("metrics.jsonl equal to the reference, no gap or duplicate", f"{counts.equal_metrics} of {counts.series}"),
        ("merged models equal to the reference, bitwise", f"{counts.equal_merges} of {counts.series}"),
        ("unrecoverable", len(counts.unrecoverable)),
        ("different results", len(counts.different)),
    ]
    lines = [
        "# Chaos",
        "",
        f"*Measured* on {datetime.now(UTC):%Y-%m-%d}, {platform.machine()} with {os.cpu_count()} CPU cores (shared with"
        f" other work), in {counts.seconds / 60:.0f} minutes, by `{command}`.",
        "",
        *table(["", ""], rows),
        f"Each training makes {UPDATES} updates of `tiny`, cut to two layers, with dropout, two microbatches, packed"
        f" rows and a checkpoint every {EVERY} updates, written while training continues. A kill loses the updates"
        " since the last complete checkpoint: at most one interval, plus those made while the next one was being"
        " written.",
    ]
    return "\n".join([*lines, *[f"- {line}" for line in counts.unrecoverable + counts.different], ""])


def main() -> int:
    """Exit code: 0 if nothing was unrecoverable and nothing differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3600, help="no new series after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        chaos = Chaos(folder, given.seed)
        chaos.run(given.kills, given.seconds)
    command = " ".join(["python benchmarks/chaos.py", *sys.argv[1:]])
    text = page(chaos.counts, re.sub(r" --(write|folder) \S+", "", command))
    print(text)
    print(json.dumps(asdict(chaos.counts)))
    if given.write:
        given.write.write_text(text, encoding="utf-8")
    return 1 if chaos.counts.unrecoverable or chaos.counts.different else 0


if __name__ == "__main__":
    sys.exit(main())
