"""`python -m launch.tpu_vm`: one command from a checkout to a training run on a Cloud TPU slice that deletes itself.

Configuration → script and commands → (dry_run=true ends here) → sources to the bucket → queued resource → watching.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.errors import UserError, exit_code, leave
from gemma4_tpu.launch import gcloud, owned, parcel
from gemma4_tpu.launch.after import stages
from gemma4_tpu.launch.checks import PROJECT, ZONE, examine_tpu_vm, normalise_launch
from gemma4_tpu.launch.entries import LaunchEntry, look_at_checkpoint, shorthands
from gemma4_tpu.launch.gcloud import GcloudError
from gemma4_tpu.launch.record import MODEL_IN_MEMORY, Launch, cost, name_and_folder, saved, train_words
from gemma4_tpu.launch.render import render
from gemma4_tpu.launch.schema import TpuVmRoot
from gemma4_tpu.launch.watch import how_to_delete, still_there, submit, watch
from gemma4_tpu.tracking.files import write_text
from gemma4_tpu.training.checks import Checked

log = logging.getLogger(__name__)
VERBS = ("list", "watch", "delete")


TPU_VM: EntryPoint[TpuVmRoot, Checked] = LaunchEntry(
    name="tpu_vm",
    schema=TpuVmRoot,
    normalise=normalise_launch,
    examine=examine_tpu_vm,
    summary=(
        "Train on a Cloud TPU slice that deletes itself afterwards. Requests it (queued resources), installs, runs"
        " python -m gemma4_tpu.train with the same words, resumes after preemptions, uploads, deletes the slice."
    ),
    examples=(
        (
            "experiment=v5p8 model.path=gs://bucket/gemma-4-31b bucket=gs://bucket project=p zone=us-east5-a"
            " dry_run=true",
            "show what would be done",
        ),
        ("experiment=v5p8 model.path=gs://… bucket=gs://… spot=true after=[merge]", "spot capacity, merged at the end"),
        ("experiment=v5p8 model.path=gs://… run_dir=gs://bucket/v5p8/<run>", "resume a run"),
        (
            "experiment=v5p8 model.path=gs://… hardware=v6e8 mesh=auto trainer.global_batch_sequences=4"
            " run_dir=gs://bucket/v5p8/<run> max_hours=8 \"after=[merge,'serve serving=v6e8']\"",
            "serve a finished run on its own slice",
        ),
        ("list", "show what runs or waits, and its cost"),
        ("watch <id>", "follow a run again, and restart it after preemptions"),
        ("delete <id>", "delete a slice and its queued resource"),
    ),
    shorthands=shorthands("queue_for", "max_hours", "git", "secrets", "after", "keep", "watch"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: the training run's (0 finished, 42 to be resumed); 2 refused, 130 interrupted; 0 without watching."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    return exit_code(lambda: _run(words), interrupted="interrupted; nothing was requested")


def _run(words: list[str]) -> int:
    if words and words[0] in VERBS:
        return _verb(words[0], words[1:])
    if "-m" in words or "--multirun" in words:
        raise UserError("--multirun: one launch is one run; give one value for each key")
    loaded = load(words, TPU_VM)
    warnings = [*loaded.checked.warnings, *_offline(loaded.root)]
    if not loaded.root.launch.dry_run:
        warnings += look_at_checkpoint(loaded.root.model)
    return _launch(new_launch(loaded), warnings)


def new_launch(loaded: Loaded[TpuVmRoot, Checked]) -> Launch:
    """The launch that a command line describes.

    Raises:
      UserError: train would refuse its words on the slice.
    """
    root, config = loaded.root, loaded.root.launch
    name, run_dir = name_and_folder(root.name, root.run_dir, config, now := datetime.now(UTC))
    words = train_words(loaded.overrides, run_dir)
    source = None
    if config.model_in_memory:
        source = (root.model.path or "").rstrip("/")
        words = [word for word in words if not word.startswith("model.path=")] + [f"model.path={MODEL_IN_MEMORY}"]
    return Launch(
        id=name, project=config.project or "", zone=config.zone or "",
        slice=root.hardware.name, spot=root.hardware.spot,
        run_dir=run_dir, launch_dir=f"gs://{run_dir.split('/')[2]}/launches/{name}", train=words,
        after=[asdict(stage) for stage in stages(config.after, run_dir, root.model.name, base=source)],
        model_source=source, launch=asdict(config), created=now.isoformat(timespec="seconds"),
    )  # fmt: skip


def _launch(launched: Launch, warnings: Sequence[str]) -> int:
    script = render(launched)
    if launched.config.dry_run:
        print(_shown(launched, script))
        return 0
    log.info(
        "%s: %s %s in %s; %s",
        launched.id,
        launched.slice,
        "spot" if launched.spot else "on demand",
        launched.zone,
        cost(launched),
    )
    for warning in warnings:
        log.warning(warning)
    launched.save()
    write_text(launched.folder / "startup.sh", script)
    _upload(launched)
    return exit_code(lambda: _submit(launched), interrupted=f"interrupted; {still_there(launched)}")


def _submit(launched: Launch) -> int:
    submit(launched)
    log.info("%s is requested; run folder %s", launched.id, launched.run_dir)
    if not launched.config.watch:
        print(still_there(launched))
        return 0
    return watch(launched)


def _offline(root: TpuVmRoot) -> list[str]:
    """A warning that W&B's key is not on the slice unless it is fetched."""
    if root.tracker.kind != "wandb" or "WANDB_API_KEY" in root.launch.secrets:
        return []
    return ["tracker=wandb without secrets={WANDB_API_KEY: <name in Secret Manager>}: W&B stays offline on the slice"]


def _upload(launched: Launch) -> None:
    """Uploads the sources to the bucket, unless they come from git."""
    if launched.config.git:
        return
    assert parcel.CHECKOUT is not None  # the checks
    with tempfile.TemporaryDirectory() as folder:
        for path in parcel.pack(Path(folder), parcel.CHECKOUT):
            gcloud.gcloud(gcloud.upload(str(path), f"{launched.launch_dir}/{path.name}"))


def _shown(launched: Launch, script: str) -> str:
    """The commands and the script of the launch."""
    commands = [] if launched.config.git else [
        gcloud.upload(name, f"{launched.launch_dir}/{name}") for name in (parcel.ARCHIVE, parcel.BUNDLE)
    ]  # fmt: skip
    commands.append(gcloud.create(launched, str(launched.folder / "startup.sh")))
    return "\n".join(
        [
            "# dry run: nothing is submitted. The commands:",
            *(f"gcloud {shlex.join(command)}" for command in commands),
            f"# cost: {cost(launched)}",
            f"# {launched.folder / 'startup.sh'}, which every host of the slice runs:",
            script,
        ]
    )


def _verb(verb: str, words: list[str]) -> int:
    """Runs `list`, `watch` or `delete`, with ids and project=, zone=, dry_run=."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    if unknown := [word for word in [*given, *names] if word.startswith("-") or word in set(given) - _SETTINGS]:
        raise UserError(f"{verb}: {unknown[0]}: takes ids and {', '.join(f'{key}=' for key in sorted(_SETTINGS))}")
    project, zone = given.get("project", os.environ.get(PROJECT)), given.get("zone", os.environ.get(ZONE))
    if verb == "list":
        print(owned.show(owned.places(project, zone)))
        return 0
    if not names:
        raise UserError(f"{verb}: give ids; {parcel.called('tpu_vm')} list shows them")
    if verb == "watch":
        return _watch_again(names)
    for name in names:
        launched = saved().get(name)
        where = [(launched.project, launched.zone)] if launched else owned.places(project, zone)
        if len(where) > 1:
            raise UserError(f"{name}: its zone is unknown; give project= and zone=")
        print(owned.remove(name, *where[0], dry_run=given.get("dry_run") == "true"))
    return 0


_SETTINGS = {"project", "zone", "dry_run"}


def _watch_again(names: list[str]) -> int:
    if len(names) != 1:
        raise UserError("watch: give one id")
    launched = saved().get(names[0])
    if launched is None:
        known = ", ".join(saved()) or "none"
        raise UserError(f"watch: {names[0]}: not launched from this folder (launched: {known})")
    return exit_code(lambda: _follow(launched), interrupted=f"interrupted; {still_there(launched)}")


def _follow(launched: Launch) -> int:
    try:
        return watch(launched)
    except GcloudError as error:
        raise UserError(f"{error}\nif it still exists, {how_to_delete(launched)}") from None


if __name__ == "__main__":
    leave(main())
