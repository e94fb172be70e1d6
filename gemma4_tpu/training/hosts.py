"""The processes of one run, one per host: how they start, agree and end. A single process needs none of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma4_tpu.config.machines import DistributedConfig, HardwareConfig
from gemma4_tpu.errors import REFUSED, UserError, exit_now, stopped_code
from gemma4_tpu.hardware import slice_of
from gemma4_tpu.redact import redact

log = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT_SECONDS = 60
"""A process without a heartbeat for this long ends the others."""
AUTO = "auto"


@dataclass(frozen=True)
class Hosts:
    """This process among those of the run."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """The one process that writes the run folder."""
        return self.index == 0

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The return value of `make()` on process 0 (JSON-serialisable), on every process.

        Raises:
          UserError: `make` refused on process 0; raised on every process.
        """
        if self.count == 1:
            return make()
        outcome: dict[str, Any] = {}
        if self.first:
            try:
                outcome = {"value": make()}
            except UserError as refusal:
                outcome = {"refusal": str(refusal)}
        outcome = json.loads(_broadcast(json.dumps(outcome).encode()))
        if "refusal" in outcome:
            raise UserError(outcome["refusal"])
        return outcome["value"]

    def check_same(self, values: dict[str, Any], remedy: str) -> None:
        """Compares values over all processes.

        Raises:
          UserError: some differ; names them and the processes; raised on every process.
        """
        if self.count == 1:
            return
        from jax.experimental import multihost_utils

        names = sorted(values)
        texts = [json.dumps(values[name], sort_keys=True, default=str) for name in names]
        digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint8) for text in texts])
        everyone = np.asarray(multihost_utils.process_allgather(digests))  # [processes, names, 8]
        differ = (everyone != everyone[:1]).any(-1)
        if differ.any():
            named = [name for name, column in zip(names, differ.T, strict=True) if column.any()]
            others = np.flatnonzero(differ.any(1)).tolist()
            raise UserError(f"{', '.join(named)}: process {others} differs from process 0; {remedy}")

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """Ends together with the others; after a failure, at once and without them.

        JAX would wait minutes for processes that wait for this one; its absence tells them to stop.
        """
        if self.count == 1:
            return
        import jax

        if error is None:
            jax.distributed.shutdown()
            return
        if isinstance(error, UserError):
            print(redact(f"error: {error}"), file=sys.stderr)
            exit_now(REFUSED)
        sys.excepthook(type(error), error, error.__traceback__)
        print(
            f"process {self.index} of {self.count} failed, so the others will stop; if one of them is gone, that is"
            " why. The same command on every host resumes from the last checkpoint",
            file=sys.stderr,
        )
        exit_now(stopped_code(error) if isinstance(error, KeyboardInterrupt) else 1)


ALONE = Hosts()
"""The one process of a run that has no others."""


def start_hosts(distributed: DistributedConfig, hardware: HardwareConfig) -> Hosts:
    """Joins the processes of the run if there are several; imports JAX only then.

    Raises:
      UserError: the processes do not find each other, or their addresses are inconsistent.
    """
    address = distributed.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    slice_ = slice_of(hardware)
    if address is None and ((slice_ and slice_.hosts > 1) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")):
        address = AUTO
    if address is None:
        return ALONE
    import jax

    explicit: dict[str, Any] = {}
    if address != AUTO:
        explicit = {
            "coordinator_address": address,
            "num_processes": distributed.num_processes,
            "process_id": distributed.process_id,
        }
    try:
        jax.distributed.initialize(
            **explicit, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS, initialization_timeout=300
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(
            f"distributed.coordinator_address={address}: the processes of the run did not find each other ({reason});"
            " set distributed.coordinator_address=<host:port of process 0>, distributed.num_processes and"
            " distributed.process_id, the first two identical on every host"
        ) from error
    hosts = Hosts(jax.process_index(), jax.process_count())
    log.info("process %d of %d", hosts.index, hosts.count)
    return hosts


def _broadcast(text: bytes) -> bytes:
    """Process 0's bytes, on every process."""
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    own = np.zeros(length, np.uint8)
    own[: min(length, len(text))] = np.frombuffer(text[:length], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8).tobytes()
