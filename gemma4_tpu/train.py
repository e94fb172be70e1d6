"""`python -m gemma4_tpu.train`: compose a configuration, check it, build what it describes, train.

Reads top to bottom: configuration (no JAX yet) → run folder → data → devices and weights → the loop → result.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict

from gemma4_tpu.config.load import Loaded, load_train
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.errors import UserError

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished, 2 refused (one message on stderr)."""
    try:
        loaded = load_train(list(sys.argv[1:] if argv is None else argv))
        return _preview(loaded.root) if loaded.root.preview else _run(loaded)
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2


def _run(loaded: Loaded) -> int:
    """Opens the run folder, trains, and leaves a result there, whatever happens."""
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.result import Result
    from gemma4_tpu.tracking.run import RunFolder

    config = loaded.root
    folder = RunFolder.open(
        "outputs", config.name, config.run_dir, config.checkpoint.resume,
        config=asdict(config), overrides=loaded.overrides,
    )  # fmt: skip
    setup_logging(folder.log_path)
    for warning in loaded.checked.warnings:
        log.warning(warning)
    try:
        result = _train(config, folder)
        result.write(folder.result_path)
    except Exception as error:
        Result(status="failed", error=str(error).splitlines()[0] if str(error) else repr(error)).write(folder.result_path)
        raise
    finally:
        folder.close()
    return 0


def _train(config: TrainRoot, folder):
    """The main job: rows to batches, weights to the mesh, updates, result."""
    import jax

    from gemma4_tpu.config.checks import rows_per_microbatch, rows_per_update, warmup_warning
    from gemma4_tpu.data.build import build_data
    from gemma4_tpu.data.pipeline import Pipeline, heldout_batches
    from gemma4_tpu.data.tokenizer import load_tokenizer
    from gemma4_tpu.models.base import resolve_base
    from gemma4_tpu.step.optimizer import make_schedule
    from gemma4_tpu.tracking.files import write_json
    from gemma4_tpu.tracking.metrics import Metrics
    from gemma4_tpu.training.checkpoint import Checkpoints
    from gemma4_tpu.training.job import build_job, rows_here, start_mesh
    from gemma4_tpu.training.loop import Loop, Rates

    # data
    base = resolve_base(config.model)
    data = build_data(config.data, load_tokenizer(base.tokenizer_folder))
    write_json(folder.data_path, data.to_json())

    # devices, and the rows that are this process's
    mesh = start_mesh(config.hardware, config.mesh, base.arch)
    rows = rows_per_microbatch(config.trainer, config.data, mesh.shape["fsdp"])
    shared = {"rows_per_update": rows_per_update(config.trainer, config.data), "microbatches": config.trainer.microbatches,
              "row_slice": rows_here(mesh, rows)}  # fmt: skip
    pipeline = Pipeline(
        examples=data.train, data=config.data, seed=config.trainer.seed,
        epochs=config.trainer.epochs, max_updates=config.trainer.max_updates, **shared,
    )  # fmt: skip
    heldout = list(heldout_batches(data.heldout, config.data, **shared)) if data.heldout else []

    # weights, adapters, optimizer
    job = build_job(base, config.lora, config.optimizer, config.trainer, mesh, pipeline.total_updates)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, job.trained_leaves, mesh)
    resume_from = checkpoints.updates[-1] if checkpoints.updates else None

    # the loop
    metrics = Metrics(folder.metrics_path, after_update=resume_from)
    loop = Loop(
        job, pipeline, heldout, checkpoints, config.trainer, config.checkpoint,
        make_schedule(config.optimizer, pipeline.total_updates), Rates(0,None,None), lambda row, update: (print(update,row),metrics.log(row,update)),
    )
    return loop.run(resume_from)


def _preview(config: TrainRoot) -> int:
    return 0


if __name__ == "__main__":
    sys.exit(main())
