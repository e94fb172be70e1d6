"""Seconds from a command to its answer: help, a refusal, a composed configuration, the plan of a small model.

    python -m benchmarks.startup [--times 5]

Each command runs in its own process, after one run that does not count; medians. For comparison, a bare
Python, and one that imports JAX: what the commands before `plan` do not pay for.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.pages import measured
from gemma4_tpu.markdown import table

COMMANDS = {
    "Python alone": ["-c", "pass"],
    "Python and JAX": ["-c", "import jax"],
    "train --help": ["-m", "gemma4_tpu.train", "--help"],
    "train lora.rnak=64 (refused)": ["-m", "gemma4_tpu.train", "lora.rnak=64"],
    "train hardware=v5p8 mesh.tp=3 (refused)": ["-m", "gemma4_tpu.train", "hardware=v5p8", "mesh.tp=3"],
    "train --cfg job": ["-m", "gemma4_tpu.train", "--cfg", "job"],
    "plan hardware=v6e1 model=tiny": ["-m", "gemma4_tpu.plan", "hardware=v6e1", "model=tiny"],
}


def seconds(arguments: list[str]) -> float:
    """Of one run, whatever its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        own = [*arguments, f"run_dir={folder}/plan"] if "gemma4_tpu.plan" in arguments else arguments
        started = time.perf_counter()
        subprocess.run([sys.executable, *own], cwd=Path(__file__).parents[1], capture_output=True, check=False)
        return time.perf_counter() - started


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    times, stamp = parser.parse_args().times, measured("jax")
    rows = []
    for name, arguments in COMMANDS.items():
        seconds(arguments)
        found = [seconds(arguments) for _ in range(times)]
        rows.append([f"`{name}`", *(f"{value:.2f}" for value in (statistics.median(found), min(found), max(found)))])
    heads = ["command", "seconds, median", "least", "most"]
    print("\n".join([f"{stamp} Each command in its own process.", "", *table(heads, rows, "lrrr")]))


if __name__ == "__main__":
    main()
