"""The common parts of the launchers' entry points."""

from __future__ import annotations

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.launch.parcel import called


class LaunchEntry(EntryPoint):
    """`gemma4-tpu launch <name>`."""

    @property
    def command(self) -> str:
        return called(self.name)

    @property
    def module(self) -> str:
        return f"gemma4_tpu.launch.{self.name}"


def shorthands(*keys: str) -> dict[str, str]:
    """The shorthands of every launcher, and those for these keys of `launch.`."""
    common = ("project", "zone", "bucket", "dry_run")
    return {"spot": "hardware.spot", **{key: f"launch.{key}" for key in (*common, *keys)}}


def look_at_checkpoint(model: ModelConfig) -> list[str]:
    """Notes on the checkpoint, as far as it can be reached from this machine.

    Raises:
      UserError: training would refuse it, by then on a slice that costs money.
    """
    from gemma4_tpu.models.audit import look_from_afar

    found = look_from_afar(model)
    if found.problems:
        raise UserError("training would refuse the checkpoint:\n" + "\n".join(found.problems))
    return found.notes
