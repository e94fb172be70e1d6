"""Checkpoints of a run: trained values, optimizer state, counters, dropout key and the data position, by Orbax.

On disk, every tensor has its own per-layer name (`layers.7.attn.q_einsum.w_lora_a`), whatever the mesh or the stacking
in memory, so that a run can resume on another mesh and a merge can read one layer at a time. `trained` are the values
to evaluate and export; if those are an average, `current` are the ones that updates continue from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import checkpoint_managers as policies

from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.errors import DISK_FULL, UserError
from gemma4_tpu.models import sharding
from gemma4_tpu.models.layout import Leaf
from gemma4_tpu.models.weights import Axes
from gemma4_tpu.step.train_step import TrainState
from gemma4_tpu.storage import Deadline, StorageGone, is_remote, join, list_folder
from gemma4_tpu.training import checksums
from gemma4_tpu.training.state_on_disk import from_disk, to_disk, unstack

log = logging.getLogger(__name__)
CHUNK_BYTES = 32 << 20  # large tensors are saved in pieces, so that a merge never holds a whole one
_UNDER_WAY = ".orbax-checkpoint-tmp"  # suffix of the folder of a save in progress, until it is complete
_FULL_SAID = ("No space left", "Disk quota exceeded", "File too large")


@dataclass
class Refuge:
    """Where a run on gs:// saves if its bucket becomes unreachable."""

    folder: Path
    """The local folder of checkpoints."""
    deadline: Deadline
    flush: Callable[[], None]
    """Copies the run's small files to the bucket, so that they are there before the checkpoint."""
    bucket_gone: Callable[[], None]
    """Called once, when nothing more is to be copied to the bucket."""
    taken: bool = False
    """Whether something was saved there."""


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Keeps the N latest checkpoints and, with `keep_best`, the one with the lowest held-out loss. Each contains the
    checksums of its files.
    """

    def __init__(
        self, folder: str | Path, config: CheckpointConfig, leaves: Iterable[Leaf], mesh: Mesh,
        refuge: Refuge | None = None,
    ):  # fmt: skip
        """Opens the folder.

        Args:
          folder: local or gs://.
          config: how often to save, and what to keep.
          leaves: the trained arrays.
          mesh: of the run.
          refuge: where to save if a folder on gs:// becomes unreachable; None: saves wait without a deadline.
        """
        self._config, self._refuge = config, refuge if is_remote(str(folder)) else None
        self._leaves = list(leaves)
        self._mesh = mesh
        self.folder = str(folder) if is_remote(str(folder)) else str(Path(folder).absolute())
        self._saving = 0
        kept: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_best:  # the last of those in descending order
            best = {"reverse": True, "n": 1, "keep_checkpoints_without_metrics": False}
            kept.append(policies.BestN(get_metric_fn=_heldout_loss, **best))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=_heldout_loss,  # without it, Orbax 0.12 does not write the metrics, and loses them on a resume
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._complete),
            ),
            item_names=("state", "position"),
        )

    @property
    def updates(self) -> list[int]:
        """Updates that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, position: dict[str, Any], heldout_loss: float | None = None) -> None:
        """Saves the state after an update, asynchronously: the state can be donated as soon as this returns.

        Args:
          state: the training state.
          position: the pipeline's `get_state()`, JSON-serialisable.
          heldout_loss: if measured at this update; decides which checkpoint is the best.

        Raises:
          UserError: the disk is full, now or during the previous save.
          StorageGone: the bucket is unreachable; the state is in the refuge.
        """
        if self._refuge is None:
            return self._save(state, position, heldout_loss)
        self._reach(lambda: self._save(state, position, heldout_loss), state, position)

    def _save(self, state: TrainState, position: dict[str, Any], heldout_loss: float | None) -> None:
        update = int(state.update)
        if update in self._manager.all_steps():
            return
        self._wait()  # for the previous save
        self._saving = update
        disk = to_disk(state, self._leaves)
        chunked = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        with self._telling_full_disks():
            self._manager.save(
                update,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(disk, save_args=jax.tree.map(lambda _: chunked, disk)),
                    position=ocp.args.JsonSave(position),
                ),
                metrics=None if heldout_loss is None else {"heldout_loss": heldout_loss},
                force=True,
            )
        log.info("checkpoint at update %d", update)

    def save_initial(self, name: str, trained: Any, leaves: Iterable[Leaf]) -> None:
        """Saves some of the trained values before the first update (see `began.py`), and waits for it.

        Args:
          name: of the folder next to the checkpoints.
          trained: the values.
          leaves: those to save.

        Raises:
          UserError: the disk is full.
        """
        values = unstack(trained, list(leaves))
        places = [self.folder] if self._refuge is None else [self.folder, str(self._refuge.folder)]
        for folder in (join(place, name) for place in places):
            self._save_initial(folder, values)

    def _save_initial(self, folder: str, values: Any) -> None:
        with self._telling_full_disks(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as saver:
            state = ocp.args.StandardSave({"trained": values})
            saver.save(folder, args=ocp.args.Composite(state=state), force=True)
        if jax.process_index() == 0:
            checksums.write(folder)

    def _complete(self) -> None:
        """Called by Orbax, in its own thread, when all parts are written and before the folder gets its final name."""
        if jax.process_index() == 0:
            names = (str(self._saving), f"{self._saving}{_UNDER_WAY}")
            (name,) = (name for name in list_folder(self.folder) if name in names)
            checksums.write(join(self.folder, name))

    def restore(self, update: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and data position saved after `update`, on this mesh; `state` provides structure and types.

        Raises:
          UserError: the checkpoint contains other tensors than this run trains.
        """
        abstract = jax.eval_shape(partial(to_disk, leaves=self._leaves), state)
        axes = {name: leaf.axes for leaf in self._leaves for name in leaf.tunix_names}
        shapes = {name: leaf.shape for leaf in self._leaves for name in leaf.tunix_names}
        targets = {
            group: {name: self._target(axes[name] if x.shape == shapes[name] else (), x) for name, x in value.items()}
            if isinstance(value, dict)
            else self._target((), value)  # scalars and keys are replicated
            for group, value in abstract.items()
        }
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(targets), position=ocp.args.JsonRestore())
        try:
            saved = self._manager.restore(update, args=wanted)
        except (ValueError, KeyError, TypeError) as error:  # its bytes have been verified, so the structure must differ
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(
                f"{self.folder}/{update}: does not match what this run trains ({reason}); use the configuration that"
                " the run started with, or another run_dir"
            ) from error
        return from_disk(saved["state"], state, self._leaves), saved["position"]

    def close(self) -> None:
        """Waits for saves in progress."""
        if self._refuge is None:
            self._close()
        elif not self._refuge.taken:  # otherwise the pending save would never end
            self._refuge.deadline.wait_for(self.folder, self._close)

    def _close(self) -> None:
        with self._telling_full_disks():
            self._manager.close()

    def wait(self, state: TrainState | None = None, position: dict[str, Any] | None = None) -> None:
        """Waits for saves in progress; afterwards the folder is complete. `state` and `position` are what was saved
        last.

        Raises:
          UserError: the disk is full.
          StorageGone: the bucket is unreachable; what was saved last is in the refuge.
        """
        if self._refuge is None or state is None or position is None:
            return self._wait()
        self._reach(self._wait, state, position)

    def _reach(self, call: Callable[[], None], state: TrainState, position: dict[str, Any]) -> None:
        """Runs a call that needs the bucket; if that is unreachable, saves in the refuge."""
        assert self._refuge is not None
        refuge = self._refuge

        def with_small_files() -> None:
            refuge.flush()
            call()

        try:
            refuge.deadline.wait_for(self.folder, with_small_files, again=True)
        except StorageGone as gone:
            refuge.taken = True
            refuge.bucket_gone()
            if jax.process_count() > 1:
                raise StorageGone(f"{gone}. Without it, the processes share no folder: not saved") from gone
            try:
                local = Checkpoints(refuge.folder, self._config, self._leaves, self._mesh)
                local.save(state, position)
                local.close()
            except UserError as full:
                raise StorageGone(f"{gone}. Nor could it be saved here: {full}") from gone
            raise StorageGone(
                f"{gone}. Saved at update {int(state.update)} on this machine: run_dir={refuge.folder.parent} resumes"
                " there"
            ) from gone

    def _wait(self) -> None:
        with self._telling_full_disks():
            self._manager.wait_until_finished()

    @contextmanager
    def _telling_full_disks(self) -> Iterator[None]:
        """Converts the many errors of a full disk to one message."""
        try:
            yield
        except Exception as error:
            if getattr(error, "errno", None) not in DISK_FULL and not any(said in str(error) for said in _FULL_SAID):
                raise
            kept = [u for u in self.updates if u != self._saving]
            last = f"the last good checkpoint is at update {kept[-1]}" if kept else "there is no checkpoint yet"
            raise UserError(
                f"the disk of {self.folder} is full: the checkpoint at update {self._saving} could not be written;"
                f" {last}. Free some space, or lower checkpoint.keep, and the same command resumes"
            ) from error

    def _target(self, axes: Sequence[Axes], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = NamedSharding(self._mesh, sharding.fit(axes, x.shape, self._mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _heldout_loss(metrics: dict[str, float]) -> float:
    return metrics["heldout_loss"]
