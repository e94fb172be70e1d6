"""The W&B workspace for the runs of a sweep, as code: loss curves, speed and memory, overrides against outcomes.

  pip install 'gemma4-tpu[dashboards]'
  python experiments/dashboards/sweep.py --entity <team> --group <sweep>          # saves it at W&B, prints its address
  python experiments/dashboards/sweep.py --group <sweep> --json workspace.json    # writes the definition, offline

Every curve is a key of `metrics.jsonl` over updates, every outcome a key of `result.json`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces
except ImportError as missing:
    raise SystemExit(f"error: {missing}; pip install 'gemma4-tpu[dashboards]'") from None

PROJECT = "gemma4-tpu"
UPDATE = "Step"  # W&B's name for the x axis; runs log each row at its update
OBJECTIVE = "heldout_loss_best"
CURVES = {
    "Loss": {
        "Training loss": ["loss"],
        "Held-out loss": ["heldout_loss"],
        "Learning rate": ["learning_rate"],
        "Gradient norm": ["grad_norm"],
    },
    "Speed and cost": {
        "Real tokens per second": ["real_tokens_per_second"],
        "Target tokens per second": ["target_tokens_per_second"],
        "Model FLOP/s utilisation": ["mfu"],
        "Device memory (bytes): now and at most": ["hbm_bytes", "hbm_peak_bytes"],
        "Dollars so far": ["usd"],
        "Fill": ["fill"],
    },
}
"""Section → title of a panel → keys of `metrics.jsonl`."""
SWEPT = ("lora.rank", "optimizer.learning_rate", "mesh.fsdp", "mesh.tp")
"""Keys of the configuration that the sweeps under experiments/ vary."""
OUTCOMES = (OBJECTIVE, "train_loss_last", "real_tokens_per_second", "usd")
"""Keys of `result.json`."""


def build(entity: str, project: str, group: str | None, swept: Sequence[str] = SWEPT) -> workspaces.Workspace:
    """The workspace, not saved yet.

    Args:
      entity: W&B user or team.
      project: W&B project (`tracker.project`).
      group: the sweep (`tracker.group`); None: every run of the project.
      swept: dotted keys of the configuration to set against the outcomes.
    """
    sections = [
        workspaces.Section(name=name, is_open=True, panels=[_curve(*panel) for panel in curves.items()])
        for name, curves in CURVES.items()
    ]
    sections.insert(1, workspaces.Section(name="Overrides and outcomes", is_open=True, panels=_outcomes(swept)))
    sections.append(
        workspaces.Section(
            name="Held-out samples", is_open=False, panels=[panels.WeavePanelSummaryTable(table_name="heldout_samples")]
        )
    )
    runs = workspaces.RunsetSettings(
        filters=[workspaces.Metric("Group") == group] if group else [],
        order=[workspaces.Ordering(workspaces.Summary(OBJECTIVE), ascending=True)],
        pinned_columns=[f"summary:{OBJECTIVE}", *(_column(key) for key in swept)],
    )
    name = f"Sweep {group}" if group else "All runs"
    return workspaces.Workspace(
        entity=entity, project=project, name=name, sections=sections, runset_settings=runs, auto_generate_panels=False
    )


def _curve(title: str, keys: list[str]) -> panels.LinePlot:
    return panels.LinePlot(title=title, x=UPDATE, y=keys)


def _column(key: str) -> str:
    """A key of the configuration as a column of the table of runs: W&B wraps each group's values."""
    group, _, rest = key.partition(".")
    return f"config:{group}.value.{rest}" if rest else f"config:{group}.value"


def _outcomes(swept: Sequence[str]) -> list:
    columns = [panels.ParallelCoordinatesPlotColumn(metric=panels.Config(key)) for key in swept]
    columns += [panels.ParallelCoordinatesPlotColumn(metric=panels.SummaryMetric(key)) for key in OUTCOMES]
    return [
        panels.ParallelCoordinatesPlot(title="Overrides and outcomes", columns=columns),
        panels.ParameterImportancePlot(with_respect_to=OBJECTIVE),
        *(
            panels.ScatterPlot(title=key, x=panels.Config(key), y=panels.SummaryMetric(OBJECTIVE))
            for key in ("lora.rank", "optimizer.learning_rate")
        ),
        panels.RunComparer(diff_only=True),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the workspace and saves it, at W&B or in a file."""
    parser = argparse.ArgumentParser(description="The W&B workspace for the runs of a sweep.")
    parser.add_argument("--entity", default="", help="W&B user or team")
    parser.add_argument("--project", default=PROJECT, help="W&B project (%(default)s)")
    parser.add_argument("--group", help="the sweep, as in tracker.group; without it: every run")
    parser.add_argument("--json", type=Path, help="write the definition here instead of saving it at W&B")
    given = parser.parse_args(argv)
    workspace = build(given.entity, given.project, given.group)
    if given.json:
        given.json.write_text(workspace._to_model().model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")
        print(given.json)
    elif not given.entity:
        parser.error("--entity: which user or team at W&B? (or --json FILE, offline)")
    else:
        print(workspace.save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
