"""Published step times and those that our plans predict: the source of the plans' range.

    python experiments/calibration/calibrate.py              # plans what is missing in results/, then the table
    python experiments/calibration/calibrate.py --render     # only the table

Each plan is one `python -m gemma4_tpu.plan …` in a process of its own. The models' steps are compiled to the end for
slices of up to 64 chips: some minutes and some 5 GB of memory each.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu.markdown import table
from gemma4_tpu.tracking.records import read_record

HERE = Path(__file__).resolve().parent
RESULTS, TABLE = HERE / "results", HERE / "README.md"
COMMON = ("trainer.remat=decoder", "plan.max_attempts=0")
FULL = ("lora=none", "mesh.tp=1", "hardware.usd_per_hour=0")
"""What full training adds. Nothing is costed here."""

HEAD = """\
# Predicted and published step times

Made by:

    python experiments/calibration/calibrate.py

*Quoted*: what others measured. *Estimated*: our step of the same model, slice, batch and length, by the compiler's
schedule (`docs/planning.md`). All rows are assumed to be full. Nothing here ran on a TPU.
"""

DIFFERENCES = """\
## What differs

- MaxText's steps: its own kernels (splash attention of tokamax, with a fused backward pass and larger blocks), its
  remat policy (ours is `decoder`: each layer's input is kept, everything else is recomputed), its compiler flags and
  shardings, and its treatment of experts. Its rows are synthetic and full.
- For E4B, MaxText takes half the time that the compiler expects of our step, so this row shows where our full training
  on tpu7x loses time, not how accurate schedules are. Of our 1.76 s, the core waits 415 ms for collectives: 255 for the
  embedding, which the loss gathers again for each of its chunks. Products take 842 ms, 60% of the peak, with the
  compiler's default on-chip memory (`hardware.flags=none`). Sums over the attention kernel's partial dq take 59 ms.
  This plan, unlike 31B's, was read before collectives on the sparse cores were counted, so its time is at least that.
- For 31B, MaxText takes three quarters of our time. Its MFU counts 197 GFLOP per token, 6.4 FLOP for each weight; our
  program computes 272, 1.38 times as many, since it recomputes the whole forward pass. How much MaxText recomputes, its
  recipe does not say. Products take 11.5 of our 16.3 s; collectives that the core waits for, 0.9.
- The paper's step: einsum attention over padded rows, Tunix's loss over all logits at once, LoRA without K of the
  global layers. The paper names two lengths and doesn't say which one was timed.
- For tpu7x, cycles become seconds by a clock rate inferred from the published peak.
"""


@dataclass(frozen=True)
class Measured:
    """A published step time, and how to plan the like."""

    id: str
    """Name of its file in `results/`."""
    name: str
    source: str
    measured_seconds: float
    """Of one update."""
    chips: int
    plan: list[str]
    """Words for `python -m gemma4_tpu.plan`."""
    full: bool = False
    """Full training."""
    failed: str = ""
    """Why it is not compiled, where that was tried."""
    outside: str = ""
    """Why its ratio says nothing of our steps, where it lies outside of the band."""

    @property
    def words(self) -> list[str]:
        """All of them; every row is one example of full length."""
        (length,) = (int(word.partition("=")[2]) for word in self.plan if word.startswith("data.sequence_length="))
        filled = [f"plan.mean_tokens={length - 1}", f"plan.p99_tokens={length}"]
        return [*self.plan, *COMMON, *filled, *(FULL if self.full else [])]

    @property
    def result(self) -> Path:
        """Where its plan is kept."""
        return RESULTS / f"{self.id}.json"


def measurements() -> list[Measured]:
    """Of `measurements.yaml`."""
    return [Measured(**one) for one in yaml.safe_load((HERE / "measurements.yaml").read_text(encoding="utf-8"))]


def plan(one: Measured) -> None:
    """Plans it and keeps the result."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gemma4_tpu.plan", *one.words, f"run_dir={folder}/plan"]
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)
        shutil.copy(Path(folder) / "plan" / "plan.json", one.result)


def ratio(one: Measured, told: dict[str, Any]) -> float:
    """Measured over predicted time."""
    return float(one.measured_seconds / told["step_seconds"])


def lines(found: list[Measured]) -> list[str]:
    """The README."""
    heads = ["step", "*quoted* s", "chips", "*estimated* s, by schedule", "roofline s", "measured ÷ estimated"]
    rows = []
    missing, ratios = [], []
    for one in found:
        if not one.result.is_file():
            missing.append(one)
            continue
        told = read_record(one.result).values
        ratios += [] if one.outside else [ratio(one, told)]
        estimated = (told["step_seconds"], told["roofline_seconds"]["update"])
        rows.append([
            one.name, f"{one.measured_seconds:g}", one.chips, *(f"{s:.3f}" for s in estimated),
            f"{ratio(one, told):.2f}",
        ])  # fmt: skip
    spread = f"The steps that count took {min(ratios):.2f} to {max(ratios):.2f} times the estimate." if ratios else ""
    band = [spread, ""] if ratios else []
    band += [f"{one.name} does not count: {one.outside}.\n" for one in found if one.outside]
    if missing:
        band += [
            "Not compiled:",
            "",
            *(f"- {one.name}: {one.failed or 'not fully compiled yet'}" for one in missing),
            "",
        ]
    sources = [f"- {one.name}: {one.source}. Planned with `{shlex.join(one.words)}`." for one in found]
    return [HEAD, *table(heads, rows), *band, DIFFERENCES, "## Sources and configurations", "", *sources]


def main() -> None:
    """Plans, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the table of what is there")
    given = parser.parse_args()
    found = measurements()
    if not given.render:
        RESULTS.mkdir(exist_ok=True)
        for one in found:
            if not one.result.is_file() and not one.failed:
                plan(one)
    TABLE.write_text("\n".join(lines(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
