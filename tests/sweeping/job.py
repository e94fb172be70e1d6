"""Stands in for `python -m gemma4_tpu.train`: the same run folder and the same exit codes, without JAX.

Held-out losses and what else is to happen are read from `behaviour.json` in the working folder: job → facts.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from gemma4_tpu.errors import TERMINATING

stop: list[int] = []
for each in TERMINATING:  # first of all: what comes during the imports, which can take seconds, ends nothing
    signal.signal(each, lambda number, _: stop.append(number))

from gemma4_tpu.tracking.metrics import MetricsFile, read_metrics  # noqa: E402
from gemma4_tpu.tracking.result import Result  # noqa: E402
from gemma4_tpu.tracking.run import RunFolder  # noqa: E402
from gemma4_tpu.tracking.trackers import make_tracker, run_name  # noqa: E402
from gemma4_tpu.train import load_train  # noqa: E402


def main() -> int:
    loaded = load_train(sys.argv[1:])
    config = loaded.root
    folder = RunFolder.open(
        "outputs", config.name, config.run_dir, "auto", config=asdict(config), overrides=loaded.overrides
    )
    behaviour = json.loads(Path("behaviour.json").read_text())
    mine = {**behaviour.get("all", {}), **behaviour.get(folder.path.name, {})}
    if mine.get("stubborn"):
        for number in TERMINATING:
            signal.signal(number, signal.SIG_IGN)
    with Path("starts.txt").open("a") as file:
        file.write(f"{folder.path.name} {time.time()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
    starts = Path("starts.txt").read_text().count(f"{folder.path.name} ")
    until = time.monotonic() + 60
    while len(Path("starts.txt").read_text().splitlines()) < mine.get("waits_for_starts", 0) and not stop:
        assert time.monotonic() < until
        time.sleep(0.02)
    done = max((row["update"] for row in read_metrics(folder.metrics_path)), default=None)
    metrics = MetricsFile(folder.metrics_path, after_update=done)
    tracker = make_tracker(config.tracker, folder, asdict(config), name=run_name(config.name, loaded.overrides))
    losses = mine.get("losses", [3.0, 2.0, 1.0])
    for update in range(0 if done is None else done + 1, len(losses)):
        metrics.log({"heldout_loss": losses[update]}, update)
        tracker.log({"heldout_loss": losses[update]}, update)
        until = time.monotonic() + (mine.get("seconds", 0) if starts <= mine.get("slow_starts", 99) else 0)
        while time.monotonic() < until and not stop:
            time.sleep(0.02)
        if stop or (update > 0 and starts <= mine.get("preempted", 0)):
            folder.leave_result(Result(status="preempted", updates=update))
            return 42
    if "error" in mine:
        print(f"error: {mine['error']}", file=sys.stderr, flush=True)
        if mine.get("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return 2
    result = Result(
        status=mine.get("status", "finished"), updates=len(losses) - 1, heldout_loss_last=losses[-1],
        heldout_loss_best=min(losses), measures=mine.get("measures", {}), real_tokens=1000, seconds=2.0,
        real_tokens_per_second=mine.get("speed", 500.0),
    )  # fmt: skip
    folder.leave_result(result)
    tracker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
