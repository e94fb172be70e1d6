"""Following a launch: what state it is in, a new slice after a preemption, the end. A preempted slice can't do that."""

from __future__ import annotations

import json
import logging
import time

from gemma4_tpu.errors import PREEMPTED
from launch import gcloud
from launch.gcloud import GcloudError
from launch.job import Job, cost

log = logging.getLogger(__name__)

_SAID = {
    "CREATING": "asked for",
    "ACCEPTED": "in the queue",
    "WAITING_FOR_RESOURCES": "in the queue: there is no capacity yet; waiting costs nothing (another zone, spot=true or"
    " another slice may be quicker)",
    "PROVISIONING": "being made",
    "ACTIVE": "up: from now on it costs",
    "SUSPENDING": "preempted",
    "SUSPENDED": "preempted",
    "DELETING": "being deleted",
    "FAILED": "failed",
}
_GONE = ("SUSPENDING", "SUSPENDED")


def watch(job: Job) -> int:
    """Follows a launch to its end; returns the training's exit code (1: the slice is gone without a word).

    Raises:
      GcloudError: the slice can't be had, or Google can't be asked; says what is left.
    """
    watcher = Watcher(job)
    while (code := watcher.look()) is None:
        time.sleep(job.config.poll_seconds)
    return code


class Watcher:
    """One launch under observation."""

    def __init__(self, job: Job):
        self.job = job
        self._state = ""
        self._slices = 1
        self._asked = True
        self._failures = 0

    def look(self) -> int | None:
        """Looks once and does what is to be done; returns the exit code when there is nothing left to follow."""
        job = self.job
        try:
            resource = gcloud.describe(job.id, job.project, job.zone)
            outcome = gcloud.read(f"{job.launch_dir}/outcome.json")  # second: it is there before the slice goes
        except GcloudError as error:
            self._unreachable(error)
            return None
        self._failures = 0
        if outcome is not None:
            return self._over(json.loads(outcome), still_there=resource is not None)
        if resource is None and not self._asked:
            time.sleep(9 * job.config.poll_seconds)  # there was no capacity a moment ago
            return self._next_slice("preempted, and no capacity")
        if resource is None:
            log.error("%s is gone without an outcome: somebody deleted it. %s", job.id, again(job))
            return 1
        state = gcloud.state_of(resource)
        if state != self._state:
            log.info("%s: %s (%s)", job.id, _SAID.get(state, state), state)
            self._state = state
        if state in _GONE:
            return self._next_slice("preempted")
        if state == "FAILED":
            return self._failed(resource)
        return None

    def _over(self, outcome: dict, *, still_there: bool) -> int:
        job, code = self.job, int(outcome["code"])
        if still_there and not job.config.keep:
            self._delete()
        log.info("%s: %s; run folder %s, logs %s", job.id, outcome["reason"], job.run_dir, job.launch_dir)
        if still_there and job.config.keep:
            log.warning("launch.keep=true: %s is still up: %s; %s", job.id, cost(job), how_to_delete(job))
        if code == PREEMPTED:
            log.warning("it is not finished: %s", again(job))
        return code

    def _failed(self, resource: dict) -> int | None:
        """A place in the queue that came to nothing: it counts against the quota until it is deleted."""
        error = json.dumps((resource.get("state") or {}).get("failedData") or {})
        failure = gcloud.explain(error, shown=f"{self.job.id} failed")
        if failure.kind == "capacity" and self._slices > 1:  # after a preemption: some time there will be one again
            return self._next_slice("no capacity")
        self._delete()
        raise GcloudError(f"{failure}\nnothing is left behind; {again(self.job)}", failure.kind)

    def _next_slice(self, reason: str) -> int | None:
        job = self.job
        self._delete()
        if self._slices > job.config.recreations:
            log.error("%s: %s after %d slices (launch.recreations); %s", job.id, reason, self._slices, again(job))
            return PREEMPTED
        log.warning("%s: %s; slice %d is asked for, which goes on from the last checkpoint", job.id, reason,
                    self._slices + 1)  # fmt: skip
        self._slices += 1
        self._state = ""
        try:
            submit(job)
            self._asked = True
        except GcloudError as error:
            if error.kind != "capacity":
                raise
            log.warning("%s", error)
            self._asked = False
        return None

    def _delete(self) -> None:
        job = self.job
        try:
            gcloud.gcloud(gcloud.delete(job.id, job.project, job.zone))
            log.info("%s: deleted", job.id)
        except GcloudError as error:
            if error.kind == "missing":
                return
            raise GcloudError(f"{error}\n{job.id} MAY STILL COST MONEY; {how_to_delete(job)}", error.kind) from None

    def _unreachable(self, error: GcloudError) -> None:
        """A network that is gone for a moment is no reason to let go; one that stays away is told."""
        self._failures += 1
        if error.kind in ("login", "permission", "api") or self._failures >= 10:
            raise GcloudError(f"{error}\n{still_there(self.job)}", error.kind) from None
        log.warning("%s; looking again", str(error).splitlines()[0])


def submit(job: Job) -> None:
    """Asks for the slice of a launch, whose script is in its record.

    Raises:
      GcloudError: Google refuses; nothing that was asked for is left behind, or the message says so.
    """
    try:
        gcloud.gcloud(gcloud.create(job, str(job.folder / "startup.sh")))
    except GcloudError as error:
        try:  # what failed while it was being made counts against the quota
            if gcloud.describe(job.id, job.project, job.zone) is not None:
                gcloud.gcloud(gcloud.delete(job.id, job.project, job.zone))
            left = "nothing is left behind"
        except GcloudError:
            left = f"whether {job.id} is there can't be told; {how_to_delete(job)}"
        raise GcloudError(f"{error}\n{left}", error.kind) from None


def how_to_delete(job: Job) -> str:
    """The command that deletes the slice, in a sentence."""
    return f"delete it: python -m launch.tpu_vm delete {job.id} project={job.project} zone={job.zone}"


def again(job: Job) -> str:
    """How the run goes on."""
    return f"the same command with run_dir={job.run_dir} goes on from the last checkpoint"


def still_there(job: Job) -> str:
    """What is there when nobody watches."""
    return (
        f"{job.id} is still in the queue or up, and goes on by itself: {cost(job)}. It deletes itself when the run is"
        f" over; after a preemption only a watcher asks for a new slice.\n"
        f"  follow it: python -m launch.tpu_vm watch {job.id}\n"
        f"  {how_to_delete(job)}"
    )
