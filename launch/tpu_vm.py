"""`python -m launch.tpu_vm`: one command from a checkout to a training on a Cloud TPU slice, and back to no costs.

Configuration → script and commands → (dry_run=true ends here) → sources to the bucket → place in the queue → watching.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gemma4_tpu.config.load import load
from gemma4_tpu.errors import UserError, exit_code
from launch import gcloud, owned, source
from launch.config import PROJECT, TPU_VM, ZONE, TpuVmRoot, look_at_checkpoint
from launch.gcloud import GcloudError
from launch.job import Job, cost, make_job, saved_jobs
from launch.render import render
from launch.watch import how_to_delete, still_there, submit, watch

log = logging.getLogger(__name__)
VERBS = ("list", "watch", "delete")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: the training's (0 finished, 42 to be gone on with); 2 refused, 130 interrupted; 0 without watching."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    return exit_code(lambda: _run(words), interrupted="interrupted; nothing was asked for")


def _run(words: list[str]) -> int:
    if words and words[0] in VERBS:
        return _verb(words[0], words[1:])
    if "-m" in words or "--multirun" in words:
        raise UserError("--multirun: one launch is one run; give one value for each key")
    loaded = load(words, TPU_VM)
    warnings = [*loaded.checked.warnings, *_offline(loaded.root)]
    if not loaded.root.launch.dry_run:
        warnings += look_at_checkpoint(loaded.root)
    return _launch(make_job(loaded), warnings)


def _launch(job: Job, warnings: Sequence[str]) -> int:
    script = render(job)
    if job.config.dry_run:
        print(_shown(job, script))
        return 0
    log.info("%s: %s %s in %s; %s", job.id, job.slice, "spot" if job.spot else "on demand", job.zone, cost(job))
    for warning in warnings:
        log.warning(warning)
    job.save()
    (job.folder / "startup.sh").write_text(script, encoding="utf-8")
    _upload(job)
    return exit_code(lambda: _submit(job), interrupted=f"interrupted; {still_there(job)}")


def _submit(job: Job) -> int:
    submit(job)
    log.info("%s is asked for; run folder %s", job.id, job.run_dir)
    if not job.config.watch:
        print(still_there(job))
        return 0
    return watch(job)


def _offline(root: TpuVmRoot) -> list[str]:
    """W&B's key is not on the slice unless it is fetched."""
    if root.tracker.kind != "wandb" or "WANDB_API_KEY" in root.launch.secrets:
        return []
    return ["tracker=wandb without secrets={WANDB_API_KEY: <name in Secret Manager>}: W&B stays offline on the slice"]


def _upload(job: Job) -> None:
    """The sources to the bucket, where that is not git's part."""
    if job.config.git:
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in source.pack(Path(folder)):
            gcloud.gcloud(gcloud.upload(str(path), f"{job.launch_dir}/{path.name}"))


def _shown(job: Job, script: str) -> str:
    """The commands and the script, as they would be."""
    commands = [] if job.config.git else [
        gcloud.upload(name, f"{job.launch_dir}/{name}") for name in (source.ARCHIVE, source.BUNDLE)
    ]  # fmt: skip
    commands.append(gcloud.create(job, str(job.folder / "startup.sh")))
    return "\n".join(
        [
            "# dry run: nothing is submitted. The commands:",
            *(f"gcloud {shlex.join(command)}" for command in commands),
            f"# cost: {cost(job)}",
            f"# {job.folder / 'startup.sh'}, which every host of the slice runs:",
            script,
        ]
    )


def _verb(verb: str, words: list[str]) -> int:
    """`list`, `watch` and `delete`, with ids and project=, zone=, dry_run=."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    if unknown := [word for word in [*given, *names] if word.startswith("-") or word in set(given) - _SETTINGS]:
        raise UserError(f"{verb}: {unknown[0]}: takes ids and {', '.join(f'{key}=' for key in sorted(_SETTINGS))}")
    project, zone = given.get("project", os.environ.get(PROJECT)), given.get("zone", os.environ.get(ZONE))
    if verb == "list":
        print(owned.show(owned.places(project, zone)))
        return 0
    if not names:
        raise UserError(f"{verb}: which? give ids; python -m launch.tpu_vm list shows them")
    if verb == "watch":
        return _watch_again(names)
    for name in names:
        job = saved_jobs().get(name)
        where = [(job.project, job.zone)] if job else owned.places(project, zone)
        if len(where) > 1:
            raise UserError(f"{name}: in which zone? give project= and zone=")
        print(owned.remove(name, *where[0], dry_run=given.get("dry_run") == "true"))
    return 0


_SETTINGS = {"project", "zone", "dry_run"}


def _watch_again(names: list[str]) -> int:
    if len(names) != 1:
        raise UserError("watch: give one id")
    job = saved_jobs().get(names[0])
    if job is None:
        known = ", ".join(saved_jobs()) or "none"
        raise UserError(f"watch: {names[0]}: not launched from this folder (launched: {known})")
    return exit_code(lambda: _follow(job), interrupted=f"interrupted; {still_there(job)}")


def _follow(job: Job) -> int:
    try:
        return watch(job)
    except GcloudError as error:
        raise UserError(f"{error}\nif it is still there, {how_to_delete(job)}") from None


if __name__ == "__main__":
    sys.exit(main())
