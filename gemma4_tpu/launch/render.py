"""The start-up script of a launch: its own settings, quoted, followed by `startup.sh`. Contains no secret."""

from __future__ import annotations

import shlex
from pathlib import Path

from gemma4_tpu.errors import UserError
from gemma4_tpu.launch.after import PROBLEMS, SERVED
from gemma4_tpu.launch.parcel import called
from gemma4_tpu.launch.record import MODEL_IN_MEMORY, Launch
from gemma4_tpu.redact import redact

_BODY = Path(__file__).with_name("startup.sh")
_MAX_BYTES = 256_000  # of one metadata value


def render(launched: Launch) -> str:
    """Renders the script.

    Raises:
      UserError: a setting contains a secret, or the script is too long for the VM's metadata.
    """
    config = launched.config
    git_url, _, git_ref = (config.git or "").rpartition("@")
    values = {
        "ID": launched.id,
        "PROJECT": launched.project,
        "ZONE": launched.zone,
        "HOSTS": launched.hardware.hosts,
        "RUN_DIR": launched.run_dir,
        "LAUNCH_DIR": launched.launch_dir,
        "GIT_URL": git_url,
        "GIT_REF": git_ref,
        "MODEL_SOURCE": launched.model_source or "",
        "MODEL_TARGET": MODEL_IN_MEMORY,
        "RESTARTS": config.restarts,
        "MAX_SECONDS": "" if config.max_hours is None else round(config.max_hours * 3600),
        "KEEP": str(config.keep).lower(),
        "LAUNCHER": called("tpu_vm"),
        "NEEDS_SIMULATOR": str(needs_simulator(launched)).lower(),
    }
    lines = ["#!/usr/bin/env bash", f"# {launched.id}: rendered by {called('tpu_vm')} at {launched.created}"]
    lines += [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    lines += [
        f"SECRETS=({shlex.join(f'{name}={secret}' for name, secret in config.secrets.items())})",
        "# shellcheck disable=SC1003,SC2016  # nothing in these words is meant for the shell",
        f"TRAIN=({shlex.join(launched.train)})",
        "# shellcheck disable=SC1003,SC2016",
        *_after(launched),
        "",
        _BODY.read_text(encoding="utf-8"),
    ]
    script = "\n".join(lines)
    if redact(script) != script:
        raise UserError(
            "the start-up script would contain a secret, or the value of an environment variable with a name like one;"
            " put it into Secret Manager and give secrets={NAME: <name of the secret>}"
        )
    if len(script.encode()) > _MAX_BYTES:
        raise UserError(f"the start-up script takes more than {_MAX_BYTES:,} bytes; give shorter settings")
    return script


def needs_simulator(launched: Launch) -> bool:
    """Whether Icarus Verilog is needed on the slice."""
    return any(stage.name == "evaluate" for stage in launched.stages) or "data.check_syntax=true" in launched.train


def _after(launched: Launch) -> list[str]:
    """The function `after`: each stage, and the upload of what it leaves on the slice; the next one waits for both."""
    lines = []
    for number, stage in enumerate(launched.stages, 1):
        if stage.name == "merge":  # its record is in the local copy of the run folder
            record = f"outputs/gs/{launched.run_dir.removeprefix('gs://')}/merges"
        else:
            record = {"serve": "outputs/servings"}.get(stage.name, "outputs/evaluations")
        commands = []
        if stage.problems:
            place = shlex.quote(stage.problems.rstrip("/"))
            commands += [f'mkdir -p "$ROOT/{PROBLEMS}"', f'gcloud storage cp --quiet -r {place}/* "$ROOT/{PROBLEMS}/"']
        if stage.served:
            place = shlex.quote(stage.served)
            commands += [f"mkdir -p {SERVED}", f"gcloud storage cp --quiet -r {place}/* {SERVED}/"]
        commands += [
            f"run gemma4_tpu.{stage.name} {shlex.join(stage.words)}",
            f"gcloud storage cp --quiet -r {shlex.quote(record)} {shlex.quote(launched.run_dir + '/')}",
            f"mark_done {number}",
        ]
        lines += [f"has_done {number} || {{", *(f"  {command} &&" for command in commands), "    true", "} || return"]
    return ["after() {", *(f"  {line}" for line in [*lines, "true"]), "}"]
