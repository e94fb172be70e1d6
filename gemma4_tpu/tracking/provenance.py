"""Provenance of a run: code, packages, machine, seeds, data; and how two such records differ."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_tpu.redact import redact, redact_arguments
from gemma4_tpu.tracking.files import write_text
from gemma4_tpu.tracking.records import PROVENANCE, read_record, write_record
from gemma4_tpu.tracking.run import RunFolder

if TYPE_CHECKING:
    from jax.sharding import Mesh

log = logging.getLogger(__name__)

PACKAGES = (
    "gemma4-tpu", "jax", "jaxlib", "libtpu", "flax", "optax", "google-tunix", "qwix", "grain", "orbax-checkpoint",
    "numpy", "safetensors", "transformers", "tokenizers", "jinja2", "pyarrow", "datasets", "hydra-core", "omegaconf",
    "wandb", "tensorboardX",
)  # fmt: skip
"""Packages whose versions can change a result or how it was recorded."""

_MAX_DIFF_BYTES = 1_000_000
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(kw_only=True)
class Provenance:
    """What one start of a run was made from. Contains no environment variables; secrets in arguments are blanked."""

    started: str
    """UTC, ISO 8601."""
    command: list[str]
    """The command line."""
    code: dict[str, Any]
    """`sha256` of the package's files; `git_commit`, `git_dirty`, `git_diff_sha256` where it runs from a checkout."""
    packages: dict[str, str]
    """Versions of `PACKAGES`, where installed."""
    python: str
    """Version of Python."""
    platform: str
    """Operating system and processor architecture."""
    host: str
    """Hash of the machine's name."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """Devices, mesh and slice, as the caller found them."""
    seeds: dict[str, int] = field(default_factory=dict)
    """Every seed of the run."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Hashes of inputs: data, tokenizer, base weights."""


@dataclass(frozen=True)
class RecordDifference:
    """One entry that differs between two records."""

    key: str
    """Dotted, such as `packages.jax`."""
    recorded: Any
    """None: absent."""
    now: Any
    """None: absent."""

    def __str__(self) -> str:
        return f"{self.key}: {self.recorded} → {self.now}"


def capture(
    *,
    hardware: dict[str, Any],
    seeds: dict[str, int],
    fingerprints: dict[str, str],
    command: Sequence[str] | None = None,
) -> Provenance:
    """Captures this process; `command` None means its own command line."""
    return Provenance(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=redact_arguments(list(sys.orig_argv if command is None else command)),
        code={"sha256": code_sha256(), **_git_state()},
        packages={name: version for name in PACKAGES if (version := _version(name))},
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        host=hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
        hardware=hardware,
        seeds=seeds,
        fingerprints=fingerprints,
    )


def hardware_of(slice_name: str, mesh: Mesh) -> dict[str, Any]:
    """The devices, and everything about this machine and the compiler's settings that can change the last bits of a
    result.
    """
    device = mesh.devices.flat[0]
    found = {"slice": slice_name, "devices": mesh.size, "kind": device.device_kind}
    return found | _machine(device.platform)


def _machine(platform_name: str) -> dict[str, Any]:
    """The host's processor counts only where it computes."""
    flags = {name.lower(): redact(os.environ.get(name, "")) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    if platform_name != "cpu":
        return flags
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": _processor(), "cores": cores, "xla_flags": flags["xla_flags"]}


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def record(run: RunFolder, provenance: Provenance) -> list[RecordDifference]:
    """Writes `provenance.json`, and `git.diff` where the checkout has changes that fit into a megabyte.

    A resumed run keeps the record of its first start; later starts are listed under `resumed` with what differs, which
    is also logged. Returns these differences.
    """
    if not run.write:
        return []
    now = dataclasses.asdict(provenance)
    if not run.provenance_path.exists():
        write_record(run.provenance_path, PROVENANCE, {**now, "resumed": []})
        _save_diff(run.path / "git.diff")
        return []
    first = read_record(run.provenance_path).values
    differences = compare(first, now)
    for difference in differences:
        log.warning("changed since the run started: %s", difference)
    start = {"started": now["started"], "command": now["command"], "differences": differences}
    write_record(run.provenance_path, PROVENANCE, {**first, "resumed": [*first.get("resumed", []), start]})
    if any(difference.key.startswith("code.") for difference in differences):
        _save_diff(run.path / f"git.resumed_{len(first.get('resumed', [])) + 1}.diff")
    return differences


def compare(recorded: dict[str, Any], now: dict[str, Any]) -> list[RecordDifference]:
    """Differences that could change a run's results: everything except when, where and by which command it was started.

    Takes records as in `provenance.json` (or `dataclasses.asdict(Provenance)`).
    """
    about_the_start = {"started", "command", "host", "resumed"}
    before = dict(_leaves({key: value for key, value in recorded.items() if key not in about_the_start}))
    after = dict(_leaves({key: value for key, value in now.items() if key not in about_the_start}))
    keys = [*before, *(key for key in after if key not in before)]
    return [RecordDifference(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def file_sha256(*paths: Path) -> str:
    """One hash over the contents of files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def code_sha256() -> str:
    """Hash of the package's Python files, names included: the same in a checkout and in an installed wheel."""
    files = sorted(_PACKAGE_ROOT.rglob("*.py"))
    names = "\n".join(path.relative_to(_PACKAGE_ROOT).as_posix() for path in files)
    return hashlib.sha256(f"{names}\n{file_sha256(*files)}".encode()).hexdigest()


def _leaves(tree: Any, prefix: str = ""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any]:
    """State of the checkout that the package runs from; empty for an installed wheel, or without git."""
    commit, diff = _git("rev-parse", "HEAD"), _git("diff", "HEAD", "--binary")
    if commit is None or diff is None:
        return {}
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", str(_PACKAGE_ROOT)) or ""
    return {
        "git_commit": commit.strip(),
        "git_dirty": bool(diff or untracked),
        "git_diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "git_untracked": untracked.splitlines(),
    }


def _save_diff(path: Path) -> None:
    diff = _git("diff", "HEAD", "--binary")
    if not diff:
        return
    if len(diff) <= _MAX_DIFF_BYTES:
        write_text(path, diff)
    else:
        log.warning("%s: the checkout's changes take %.1f MB; only their hash is kept", path.name, len(diff) / 1e6)


def _git(*arguments: str) -> str | None:
    """Output of git in the package's own checkout; None if this is none (a virtual environment may lie inside one)."""
    ours = ["git", "-C", str(_PACKAGE_ROOT), "ls-files", "--error-unmatch", "__init__.py"]
    command = ["git", "-C", str(_PACKAGE_ROOT), "--no-optional-locks", *arguments]
    try:
        subprocess.run(ours, capture_output=True, check=True, timeout=10)
        return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
