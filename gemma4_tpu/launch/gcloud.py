"""The Google Cloud CLI: the commands for launching, and its errors as one message with a fix."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from gemma4_tpu.children import end_with_parent
from gemma4_tpu.errors import UserError
from gemma4_tpu.launch.record import PREFIX, Launch

LABEL = "gemma4-tpu"
"""Label of nodes launched here; its value is the queued resource's id."""
QUEUED = ("compute", "tpus", "queued-resources")

_KINDS: tuple[tuple[str, str, str], ...] = (  # kind, pattern of its message, fix
    ("login", r"have an active account|gcloud auth login|reauthentication", "run gcloud auth login"),
    ("api", r"has not been used in project|SERVICE_DISABLED|is disabled",
     "run gcloud services enable tpu.googleapis.com --project=<project>, wait a minute, and try again"),
    ("quota", r"quota|RESOURCE_EXHAUSTED.*limit|rate limit",
     "a quota limits what the project may use, whatever is free: list and delete slices and queued resources that you"
     " don't need (waiting, failed and suspended ones count), use another zone or slice (spot=true has its own quota),"
     " or request more at https://console.cloud.google.com/iam-admin/quotas (service Cloud TPU API)"),
    ("capacity", r"no more capacity|insufficient (reserved )?capacity|stockout|does not have enough resources"
     r"|ZONE_RESOURCE_POOL_EXHAUSTED|currently unavailable|RESOURCE_EXHAUSTED|valid.?until|not available within",
     "nothing is free there now: try again later, or with a longer queue_for, another zone, spot=true or false, or"
     " another slice (python -m gemma4_tpu.plan says which ones fit)"),
    ("permission", r"PERMISSION_DENIED|permission|forbidden|\b403\b",
     "the account needs roles/tpu.admin, roles/iam.serviceAccountUser and roles/storage.objectAdmin in the project, and"
     " billing must be on"),
    ("missing", r"NOT_FOUND|not found|does not exist|matched no objects|\b404\b",
     "check project, zone and bucket: not every zone has every slice (gcloud compute tpus accelerator-types list"
     " --zone=<zone>)"),
)  # fmt: skip


class GcloudError(UserError):
    """A command of the Google Cloud CLI failed."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind
        """`login`, `api`, `quota`, `capacity`, `permission`, `missing` or `other`."""


def gcloud(arguments: Sequence[str]) -> str:
    """Runs `gcloud <arguments>`; returns its standard output.

    Raises:
      GcloudError: the command failed; gives the reason and a fix.
      UserError: gcloud is not installed.
    """
    if shutil.which("gcloud") is None:
        raise UserError(
            "gcloud: not found; install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install, or: sudo snap"
            " install google-cloud-cli --classic) and run gcloud auth login; dry_run=true needs none"
        )
    done = subprocess.run(
        ["gcloud", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        preexec_fn=end_with_parent,
    )  # fmt: skip
    if done.returncode:
        raise explain(done.stderr or done.stdout, shown=f"gcloud {' '.join(arguments[:4])}")
    return done.stdout


def explain(text: str, *, shown: str) -> GcloudError:
    """Google's error in one line, with a fix.

    Args:
      text: standard error of a command, or the error of a failed queued resource.
      shown: what failed.
    """
    _, _, error = text.partition("ERROR:")  # warnings come before it
    said = " ".join((error or text).split()) or "no reason was given"
    for kind, pattern, remedy in _KINDS:
        if re.search(pattern, said, re.IGNORECASE):
            return GcloudError(f"{shown}: {kind}: {said[:600]}\n{remedy}", kind)
    return GcloudError(f"{shown}: {said[:600]}", "other")


def create(launched: Launch, script: str) -> list[str]:
    """The command that requests the slice; `script` is the path of its start-up script."""
    config, slice_ = launched.config, launched.hardware
    return [
        *QUEUED, "create", launched.id, f"--node-id={launched.id}",
        f"--project={launched.project}", f"--zone={launched.zone}",
        f"--accelerator-type={slice_.accelerator_type}", f"--runtime-version={slice_.runtime_version}",
        *(["--spot"] if launched.spot else []),
        *([f"--valid-until-duration={config.queue_for}"] if config.queue_for else []),
        f"--labels={LABEL}={launched.id}", f"--metadata-from-file=startup-script={script}",
        "--scopes=https://www.googleapis.com/auth/cloud-platform", "--quiet", *config.create_flags,
    ]  # fmt: skip


def delete(name: str, project: str, zone: str) -> list[str]:
    """The command that deletes a queued resource and its slice."""
    return [*QUEUED, "delete", name, f"--project={project}", f"--zone={zone}", "--force", "--quiet"]


def describe(name: str, project: str, zone: str) -> dict[str, Any] | None:
    """Google's description of a queued resource; None if there is none with that name."""
    try:
        text = gcloud([*QUEUED, "describe", name, f"--project={project}", f"--zone={zone}", "--format=json"])
    except GcloudError as error:
        if error.kind == "missing":
            return None
        raise
    return json.loads(text)


def queued(project: str, zone: str) -> list[dict[str, Any]]:
    """Every queued resource of a project in a zone."""
    return json.loads(gcloud([*QUEUED, "list", f"--project={project}", f"--zone={zone}", "--format=json"]) or "[]")


def upload(source: str, target: str) -> list[str]:
    """The command that copies a local file or folder to a bucket."""
    return ["storage", "cp", source, target, "--quiet"]


def read(address: str) -> str | None:
    """The text of a small file on gs://; None if there is none."""
    try:
        return gcloud(["storage", "cat", address])
    except GcloudError as error:
        if error.kind == "missing":
            return None
        raise


def state_of(resource: dict[str, Any]) -> str:
    """`WAITING_FOR_RESOURCES`, `ACTIVE`, `SUSPENDED`, …"""
    state = resource.get("state") or {}
    return str(state.get("state", "UNKNOWN"))


def name_of(resource: dict[str, Any]) -> str:
    """The id of a queued resource."""
    return str(resource.get("name", "")).rpartition("/")[2]


def node_of(resource: dict[str, Any]) -> dict[str, Any]:
    """The node that a queued resource requests."""
    specs = (resource.get("tpu") or {}).get("nodeSpec") or [{}]
    return specs[0].get("node") or {}


def is_ours(resource: dict[str, Any]) -> bool:
    """Whether a queued resource was launched here, by its name and label."""
    name = name_of(resource)
    return name.startswith(PREFIX) and (node_of(resource).get("labels") or {}).get(LABEL) == name
