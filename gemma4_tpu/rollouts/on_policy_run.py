"""The run that roll-outs are drawn for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.training.hosts import ALONE, Hosts


@dataclass(frozen=True)
class OnPolicyRun:
    """What sampling, judging, certificate and validation have in common: their keys, and the run they belong to."""

    config: RolloutsConfig
    folder: Path
    """The run folder."""
    seed: int
    model: str = ""
    """Digest of what determines an answer besides the trained values and its seed: base, adapters, dtype, prompts."""
    resume_from: int | None = None
    """The update to resume from; None: a new run."""
    hosts: Hosts = ALONE
    """The processes of the run, all of which draw; process 0 judges, stores and writes."""
    progress: Callable[[], None] = lambda: None
    """Called now and then: for the stall watchdog."""
