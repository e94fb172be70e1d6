"""Follows a launch: its state, a new slice after a preemption, its end. A preempted slice can't do that itself."""

from __future__ import annotations

import json
import logging
import time

from gemma4_tpu.errors import PREEMPTED
from gemma4_tpu.launch import gcloud
from gemma4_tpu.launch.gcloud import GcloudError
from gemma4_tpu.launch.parcel import called
from gemma4_tpu.launch.record import Launch, cost

log = logging.getLogger(__name__)

_SAID = {
    "CREATING": "requested",
    "ACCEPTED": "in the queue",
    "WAITING_FOR_RESOURCES": "in the queue: there is no capacity yet; waiting costs nothing (another zone, spot=true or"
    " another slice can be faster)",
    "PROVISIONING": "being created",
    "ACTIVE": "up: from now on it costs money",
    "SUSPENDING": "preempted",
    "SUSPENDED": "preempted",
    "DELETING": "being deleted",
    "FAILED": "failed",
}
_GONE = ("SUSPENDING", "SUSPENDED")


def watch(launched: Launch) -> int:
    """Follows a launch to its end; returns the training run's exit code (1: the slice is gone without an outcome).

    Raises:
      GcloudError: the slice is not available, or Google can't be reached; says what remains.
    """
    watcher = Watcher(launched)
    while (code := watcher.look()) is None:
        time.sleep(launched.config.poll_seconds)
    return code


class Watcher:
    """One launch under observation."""

    def __init__(self, launched: Launch):
        self.launched = launched
        self._state = ""
        self._slices = 1
        self._asked = True
        self._failures = 0

    def look(self) -> int | None:
        """Checks once and acts; returns the exit code if there is nothing left to follow."""
        launched = self.launched
        try:
            resource = gcloud.describe(launched.id, launched.project, launched.zone)
            outcome = gcloud.read(f"{launched.launch_dir}/outcome.json")  # read second: it exists before the slice goes
        except GcloudError as error:
            self._unreachable(error)
            return None
        self._failures = 0
        if outcome is not None:
            return self._over(json.loads(outcome), still_there=resource is not None)
        if resource is None and not self._asked:
            time.sleep(9 * launched.config.poll_seconds)  # there was no capacity a moment ago
            return self._next_slice("preempted, and no capacity")
        if resource is None:
            log.error("%s is gone without an outcome: somebody deleted it. %s", launched.id, again(launched))
            return 1
        state = gcloud.state_of(resource)
        if state != self._state:
            log.info("%s: %s (%s)", launched.id, _SAID.get(state, state), state)
            self._state = state
        if state in _GONE:
            return self._next_slice("preempted")
        if state == "FAILED":
            return self._failed(resource)
        return None

    def _over(self, outcome: dict, *, still_there: bool) -> int:
        launched, code = self.launched, int(outcome["code"])
        if still_there and not launched.config.keep:
            self._delete()
        log.info(
            "%s: %s; run folder %s, logs %s", launched.id, outcome["reason"], launched.run_dir, launched.launch_dir
        )
        if still_there and launched.config.keep:
            log.warning(
                "launch.keep=true: %s is still up: %s; %s", launched.id, cost(launched), how_to_delete(launched)
            )
        if code == PREEMPTED:
            log.warning("the run is not finished: %s", again(launched))
        return code

    def _failed(self, resource: dict) -> int | None:
        """Deletes a failed queued resource, which would count against the quota."""
        error = json.dumps((resource.get("state") or {}).get("failedData") or {})
        failure = gcloud.explain(error, shown=f"{self.launched.id} failed")
        if failure.kind == "capacity" and self._slices > 1:  # after a preemption: capacity will return some time
            return self._next_slice("no capacity")
        self._delete()
        raise GcloudError(f"{failure}\nnothing remains; {again(self.launched)}", failure.kind)

    def _next_slice(self, reason: str) -> int | None:
        launched = self.launched
        self._delete()
        if self._slices > launched.config.recreations:
            log.error(
                "%s: %s after %d slices (launch.recreations); %s", launched.id, reason, self._slices, again(launched)
            )
            return PREEMPTED
        log.warning("%s: %s; requesting slice %d, which resumes from the last checkpoint", launched.id, reason,
                    self._slices + 1)  # fmt: skip
        self._slices += 1
        self._state = ""
        try:
            submit(launched)
            self._asked = True
        except GcloudError as error:
            if error.kind != "capacity":
                raise
            log.warning("%s", error)
            self._asked = False
        return None

    def _delete(self) -> None:
        launched = self.launched
        try:
            gcloud.gcloud(gcloud.delete(launched.id, launched.project, launched.zone))
            log.info("%s: deleted", launched.id)
        except GcloudError as error:
            if error.kind == "missing":
                return
            raise GcloudError(
                f"{error}\n{launched.id} MAY STILL COST MONEY; {how_to_delete(launched)}", error.kind
            ) from None

    def _unreachable(self, error: GcloudError) -> None:
        """Tolerates a short network failure; raises for a lasting one."""
        self._failures += 1
        if error.kind in ("login", "permission", "api") or self._failures >= 10:
            raise GcloudError(f"{error}\n{still_there(self.launched)}", error.kind) from None
        log.warning("%s; trying again", str(error).splitlines()[0])


def submit(launched: Launch) -> None:
    """Requests the slice of a launch, whose script is in its record.

    Raises:
      GcloudError: Google refuses; nothing requested remains, unless the message says otherwise.
    """
    try:
        gcloud.gcloud(gcloud.create(launched, str(launched.folder / "startup.sh")))
    except GcloudError as error:
        try:  # a resource that failed during creation counts against the quota
            if gcloud.describe(launched.id, launched.project, launched.zone) is not None:
                gcloud.gcloud(gcloud.delete(launched.id, launched.project, launched.zone))
            left = "nothing remains"
        except GcloudError:
            left = f"{launched.id} may exist; {how_to_delete(launched)}"
        raise GcloudError(f"{error}\n{left}", error.kind) from None


def how_to_delete(launched: Launch) -> str:
    """A sentence with the command that deletes the slice."""
    return f"delete it: {called('tpu_vm')} delete {launched.id} project={launched.project} zone={launched.zone}"


def again(launched: Launch) -> str:
    """How to resume the run."""
    return f"the same command with run_dir={launched.run_dir} resumes from the last checkpoint"


def still_there(launched: Launch) -> str:
    """States what continues when nobody watches."""
    return (
        f"{launched.id} is still in the queue or up, and continues by itself: {cost(launched)}. It deletes itself when"
        f" the run is over; after a preemption, only a watcher requests a new slice.\n"
        f"  follow it: {called('tpu_vm')} watch {launched.id}\n"
        f"  {how_to_delete(launched)}"
    )
