"""`python -m launch.gke`: trains on a GKE cluster through xpk, as a JobSet that Kueue starts when there is capacity.

Every host of the slice runs the same command with the same run folder; JobSet restarts all of them after a preemption
or a crash.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from gemma4_tpu.children import end_with_parent
from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.errors import STALLED, UserError, exit_code, leave
from gemma4_tpu.hardware import slice_of
from gemma4_tpu.launch.checks import examine_gke, normalise_launch
from gemma4_tpu.launch.entries import LaunchEntry, look_at_checkpoint, shorthands
from gemma4_tpu.launch.record import PREFIX, name_and_folder, train_words
from gemma4_tpu.launch.schema import GkeConfig, GkeRoot
from gemma4_tpu.prices import price_of
from gemma4_tpu.redact import redact
from gemma4_tpu.training.checks import Checked

log = logging.getLogger(__name__)

_NAME_LENGTH = 39  # xpk's limit
_CRASHED = 1  # also the exit code of the other hosts when one of them is gone
_GRACE_SECONDS = 300  # for the save after a SIGTERM


_INSTALL = "install it: pip install 'gemma4-tpu[gke]' (or, apart from this project: pipx install xpk)"


GKE: EntryPoint[GkeRoot, Checked] = LaunchEntry(
    name="gke",
    schema=GkeRoot,
    normalise=normalise_launch,
    examine=examine_gke,
    summary=(
        "Train on a GKE cluster made by xpk. Submits a JobSet that waits in Kueue's queue and restarts after"
        " preemptions."
    ),
    examples=(
        (
            "experiment=v5p8 model.path=gs://bucket/gemma-4-31b bucket=gs://bucket project=p zone=us-east5-a"
            " cluster=c image=us-docker.pkg.dev/p/r/gemma4-tpu:1 dry_run=true",
            "show the command and the JobSet",
        ),
    ),
    shorthands=shorthands("cluster", "image"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 submitted (or shown), 2 refused, 130 interrupted, else xpk's exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    return exit_code(
        lambda: _run(load(list(sys.argv[1:] if argv is None else argv), GKE)),
        interrupted="interrupted; the workload may exist: xpk workload list shows it",
    )


def _run(loaded: Loaded[GkeRoot, Checked]) -> int:
    command, run_dir = create(loaded)
    if loaded.root.launch.dry_run:
        print(_shown(command, loaded.root.hardware))
        return 0
    for warning in look_at_checkpoint(loaded.root.model):
        log.warning("%s", warning)
    _need_xpk()
    log.info("run folder %s; %s", run_dir, _cost(loaded.root.hardware))
    return _submit(command, loaded.root.launch)


def create(loaded: Loaded[GkeRoot, Checked]) -> tuple[list[str], str]:
    """(command line of xpk, run folder).

    Raises:
      UserError: train would refuse its words, or Kubernetes would change them.
    """
    root, config = loaded.root, loaded.root.launch
    now = datetime.now(UTC)
    _, run_dir = name_and_folder(root.name, root.run_dir, config, now)
    name, _ = name_and_folder(root.name[: _NAME_LENGTH - len(f"{PREFIX}-20260101-000000")], run_dir, config, now)
    train = shlex.join(["python", "-m", "gemma4_tpu.train", *train_words(loaded.overrides, run_dir)])
    if "$" in train or "\n" in train or redact(train) != train:
        raise UserError("a setting holds $, a line break or a secret, which a JobSet would change or show; remove it")
    slice_ = slice_of(root.hardware)
    assert slice_ is not None and slice_.accelerator_type is not None  # the checks
    command = [
        "xpk", "workload", "create", f"--workload={name}", f"--cluster={config.cluster}",
        f"--project={config.project}", f"--zone={config.zone}", f"--tpu-type={slice_.accelerator_type}",
        f"--docker-image={config.image}", f"--command=exec {train}", f"--priority={config.priority}",
        f"--max-restarts={config.restarts}", f"--restart-on-exit-codes={_CRASHED},{STALLED}",
        f"--termination-grace-period-seconds={_GRACE_SECONDS}", *(["--spot"] if root.hardware.spot else []),
    ]  # fmt: skip
    return command, run_dir


def _submit(command: list[str], config: GkeConfig) -> int:
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, preexec_fn=end_with_parent).returncode
    if code == 0:
        place = f"--cluster={config.cluster} --project={config.project} --zone={config.zone}"
        name = command[3].partition("=")[2]
        print(
            f"submitted {name}; it waits in Kueue's queue until there is capacity\n"
            f"  follow it: xpk workload list {place}\n"
            f"  delete it: xpk workload delete --workload={name} {place}\n"
            "the cluster's nodes cost money until they are gone, with or without a workload: xpk cluster delete"
        )
    return code


def _shown(command: list[str], hardware: HardwareConfig) -> str:
    """The command, and if xpk is installed, the JobSet that it would submit."""
    lines = ["# dry run: nothing is submitted. The command:", shlex.join(command), f"# {_cost(hardware)}"]
    if shutil.which("xpk") is None:
        return "\n".join([*lines, f"# xpk would show the JobSet; {_INSTALL}"])
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "jobset.yaml"
        done = subprocess.run(
            [*command, "--dry-run", "--skip-validation", f"--output-manifest-file={manifest}"],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, preexec_fn=end_with_parent,
        )  # fmt: skip
        if done.returncode or not manifest.exists():
            raise UserError(f"xpk workload create --dry-run: {(done.stderr or done.stdout).strip()[-600:]}")
        return "\n".join([*lines, "# the JobSet:", manifest.read_text(encoding="utf-8")])


def _need_xpk() -> None:
    if shutil.which("xpk") is None:
        raise UserError(f"xpk: not found; {_INSTALL}; dry_run=true needs none")


def _cost(hardware: HardwareConfig) -> str:
    price = price_of(hardware)
    if price is None:
        return "cost: no price with a source is known for this slice; hardware.usd_per_hour=… sets one"
    return f"cost: ${price.usd_per_hour:,.2f} per hour ({price.date}, {price.source}); estimated"


if __name__ == "__main__":
    leave(main())
