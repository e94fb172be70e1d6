"""The commands by name: `gemma4-tpu train` is `python -m gemma4_tpu.train`; each module has its own help and checks."""

from __future__ import annotations

from gemma4_tpu.bench import BENCH
from gemma4_tpu.check import CHECK
from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.evaluate import EVALUATE
from gemma4_tpu.judge import JUDGE
from gemma4_tpu.launch.gke import GKE
from gemma4_tpu.launch.tpu_vm import TPU_VM
from gemma4_tpu.merge import MERGE
from gemma4_tpu.plan import PLAN
from gemma4_tpu.report import REPORT
from gemma4_tpu.serve import SERVE
from gemma4_tpu.train import TRAIN

ENTRIES: dict[str, EntryPoint] = {
    entry.name: entry for entry in (TRAIN, CHECK, MERGE, EVALUATE, JUDGE, PLAN, REPORT, SERVE, BENCH)
}
"""By name: `train`."""
COMMANDS: dict[str, EntryPoint] = {**ENTRIES, "launch tpu_vm": TPU_VM, "launch gke": GKE}
"""By the words after `gemma4-tpu`, in the order of the map of commands."""
TOOLS = {
    "translate": "Translate an axolotl, TRL or MaxText configuration to overrides.",
    "completion": "Complete commands, groups and keys with Tab: bash, zsh, fish.",
}
"""Commands without a configuration (`gemma4_tpu/<name>.py`), with their line in the map."""
