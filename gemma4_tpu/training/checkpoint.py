"""Checkpoints of a run: trained values, Adam moments, counters, dropout key and the data position, by Orbax.

On disk every tensor has its own per-layer name (`layers.7.attn.q_einsum.w_lora_a`), whatever the mesh or the stacking
in memory, so that a run can resume on another mesh and a merge can read one layer at a time.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import checkpoint_managers as policies

from gemma4_tpu.config.schema import CheckpointConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import sharding
from gemma4_tpu.models.layout import Leaf, build_tree, get
from gemma4_tpu.models.weights import Axes
from gemma4_tpu.step.train_step import TrainState
from gemma4_tpu.storage import is_remote, join, list_folder
from gemma4_tpu.training import checksums

log = logging.getLogger(__name__)
CHUNK_BYTES = 32 << 20  # large tensors are saved in pieces, so that a merge need not hold one whole
_UNDER_WAY = ".orbax-checkpoint-tmp"  # ending of the folder of a save under way, until all of it is there
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_SAID = ("No space left", "Disk quota exceeded", "File too large")
_MOMENTS = ("mu", "nu")  # AdamW's two moments, shaped like the trained tree


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Keeps the N latest checkpoints and, with `keep_best`, the one with the lowest held-out loss. Each holds the
    checksums of its files.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig, leaves: Iterable[Leaf], mesh: Mesh):
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
                best_fn=_heldout_loss,  # without it Orbax 0.12 does not write the metrics, and forgets them on a resume
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
        """Saves the state after an update, asynchronously: the state may be donated as soon as this returns.

        Args:
          state: the training state.
          position: the pipeline's `get_state()`, JSON-able.
          heldout_loss: if it was measured at this update; decides which checkpoint is the best.

        Raises:
          UserError: the disk is full, now or while the checkpoint before was saved.
        """
        update = int(state.update)
        if update in self._manager.all_steps():
            return
        self.wait()  # for the save before
        self._saving = update
        disk = _to_disk(state, self._leaves)
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

    def _complete(self) -> None:
        """Called by Orbax, in its own thread, when all parts are written and before the folder gets its final name."""
        if jax.process_index() == 0:
            names = (str(self._saving), f"{self._saving}{_UNDER_WAY}")
            (name,) = (name for name in list_folder(self.folder) if name in names)
            checksums.write(join(self.folder, name))

    def restore(self, update: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and data position saved after `update`, on this mesh; `state` gives structure and types.

        Raises:
          UserError: the checkpoint holds other tensors than this run trains.
        """
        abstract = jax.eval_shape(partial(_to_disk, leaves=self._leaves), state)
        axes = {name: leaf.axes for leaf in self._leaves for name in leaf.tunix_names}
        targets = {
            group: {name: self._target(axes[name], x) for name, x in value.items()}
            if isinstance(value, dict)
            else self._target((), value)  # counters and keys lie everywhere
            for group, value in abstract.items()
        }
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(targets), position=ocp.args.JsonRestore())
        try:
            saved = self._manager.restore(update, args=wanted)
        except (ValueError, KeyError, TypeError) as error:  # its bytes are sound: they have been verified
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(
                f"{self.folder}/{update}: does not hold what this run trains ({reason}); give the configuration that"
                " the run began with, or another run_dir"
            ) from error
        return _from_disk(saved["state"], state, self._leaves), saved["position"]

    def close(self) -> None:
        """Waits for saves under way."""
        with self._telling_full_disks():
            self._manager.close()

    def wait(self) -> None:
        """Waits for saves under way; the folder is complete afterwards.

        Raises:
          UserError: the disk is full.
        """
        with self._telling_full_disks():
            self._manager.wait_until_finished()

    @contextmanager
    def _telling_full_disks(self) -> Iterator[None]:
        """Turns the many forms of a full disk into one message."""
        try:
            yield
        except Exception as error:
            if getattr(error, "errno", None) not in _FULL and not any(said in str(error) for said in _FULL_SAID):
                raise
            kept = [u for u in self.updates if u != self._saving]
            last = f"the last good checkpoint is at update {kept[-1]}" if kept else "there is no checkpoint yet"
            raise UserError(
                f"the disk of {self.folder} is full: the checkpoint at update {self._saving} could not be written;"
                f" {last}. Make space, or lower checkpoint.keep, and the same command goes on"
            ) from error

    def _target(self, axes: Sequence[Axes], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = NamedSharding(self._mesh, sharding.fit(axes, x.shape, self._mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _heldout_loss(metrics: dict[str, float]) -> float:
    return metrics["heldout_loss"]


def _to_disk(state: TrainState, leaves: list[Leaf]) -> dict[str, Any]:
    """The state as flat dicts from tensor name to array."""
    disk: dict[str, Any] = {"trained": _unstack(state.trained, leaves)}
    for moment in _MOMENTS:
        disk[moment] = _unstack(optax.tree.get(state.optimizer, moment), leaves)
    return disk | {"update": state.update, "key": jax.random.key_data(state.key)}


def _from_disk(disk: dict[str, Any], like: TrainState, leaves: list[Leaf]) -> TrainState:
    """Inverse of `_to_disk`; every counter of the optimizer equals the number of updates."""
    trees = {group: _stack(disk[group], leaves) for group in ("trained", *_MOMENTS)}
    trees = {group: jax.tree.map(_like, tree, like.trained) for group, tree in trees.items()}
    optimizer = optax.tree.set(like.optimizer, mu=trees["mu"], nu=trees["nu"], count=disk["update"])
    key = jax.random.wrap_key_data(disk["key"], impl=jax.random.key_impl(like.key))
    state = TrainState(trees["trained"], optimizer, disk["update"], key)
    return jax.tree.map(lambda x: jnp.copy(x) if x.ndim == 0 else x, state)  # an array may be donated only once


def _like(x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.device_put(x, y.sharding)


@partial(jax.jit, static_argnums=1)
def _slices(tree: Any, leaves: tuple[Leaf, ...]) -> dict[str, jax.Array]:
    flat: dict[str, jax.Array] = {}
    for leaf in leaves:
        array = get(tree, leaf.path)
        if leaf.stacked:
            flat |= {name: array[r] for r, name in enumerate(leaf.tunix_names)}
        else:
            flat[leaf.tunix_names[0]] = array
    return flat


def _unstack(tree: Any, leaves: list[Leaf]) -> dict[str, jax.Array]:
    return _slices(tree, tuple(leaves))


def _stack(flat: dict[str, jax.Array], leaves: list[Leaf]) -> Any:
    return build_tree(
        (leaf.path, jnp.stack([flat[n] for n in leaf.tunix_names]) if leaf.stacked else flat[leaf.tunix_names[0]])
        for leaf in leaves
    )


def state_bytes(leaves: Iterable[Leaf]) -> int:
    """Bytes of one checkpoint: values and two moments in float32."""
    return 3 * 4 * sum(math.prod(leaf.array_shape) for leaf in leaves)
