"""Types of what a training run writes elsewhere: checkpoints, buckets, trackers. Base layer, as `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming (`checkpoint=`)."""

    every: int = 100
    """Updates between checkpoints; the last update is always saved."""
    keep: int = 3
    """How many of the latest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out loss."""
    resume: str = "auto"
    """`auto`: resume from the newest checkpoint in the run folder that verifies; `never`: refuse a used folder."""
    resume_allow: list[str] = field(default_factory=list)
    """Differences from the recorded run to accept when resuming, by the names that the refusal shows: keys or groups of
    the configuration, fingerprints of data, tokenizer and base, `learning_rate` for a jump upward."""


@dataclass(kw_only=True)
class StorageConfig:
    """What to do if a run folder on gs:// can't be reached (`storage=`)."""

    deadline: str = "15m"
    """How long a run waits for its bucket: `30s`, `15m`, `2h` or a number of minutes. After that it saves on this
    machine and ends with exit code 4; SIGTERM shortens the wait."""


@dataclass(kw_only=True)
class TrackerConfig:
    """Where metrics go in addition to `metrics.jsonl`, which is always written (`tracker=`)."""

    kind: str = "none"
    """`none`, `wandb`, `mlflow`, `trackio`, `tensorboard`, or `jsonl`: one JSON Lines file of everything that a tracker
    receives."""
    project: str = "gemma4-tpu"
    """Project in W&B or Trackio, experiment in MLflow."""
    entity: str | None = None
    """W&B entity; null: the account's default."""
    group: str | None = None
    """Group of runs in W&B and Trackio, a tag in MLflow; null: the sweep's, if any."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in W&B, MLflow and Trackio."""
    mode: str = "auto"
    """W&B mode: `auto` (online if there is a key, else offline), `online`, `offline`."""
