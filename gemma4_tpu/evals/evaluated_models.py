"""Loads the models of an evaluation: a run and its base, or a checkpoint alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma4_tpu.config.machines import HardwareConfig, MeshConfig
from gemma4_tpu.config.schema import LoraConfig, ModelConfig, TrainerConfig
from gemma4_tpu.config.tasks import EvalConfig, ExportConfig
from gemma4_tpu.data.seen import Sight
from gemma4_tpu.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from gemma4_tpu.evals.endpoint import Endpoint
from gemma4_tpu.evals.generate import Backend, InProcess, Weights, checkpoint_stop_ids
from gemma4_tpu.export.trained import Trained, open_trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import sharding, token_rows
from gemma4_tpu.models.audit import audit
from gemma4_tpu.models.base import Base, resolve_base
from gemma4_tpu.models.layout import Leaf, Path, build_tree, get
from gemma4_tpu.models.lora_parts import Parts
from gemma4_tpu.models.weights import BY_NAME, EMBEDDING
from gemma4_tpu.training.began import PlainState
from gemma4_tpu.training.setup import holding, load_weights, make_model, start_mesh

log = logging.getLogger(__name__)

RUN, BASE, MODEL, ENDPOINT = "run", "base", "model", "endpoint"


@dataclass(frozen=True)
class Backends:
    """The backends with which an evaluation generates."""

    by_name: Mapping[str, Backend]
    """By role: `run` and `base`, `model` or `endpoint`; the subject first."""
    fingerprints: dict[str, str]


def of_run(
    run: str, config: EvalConfig, hardware: HardwareConfig, mesh_config: MeshConfig, *, pictures: bool = False
) -> Backends:
    """A run's trained model, its base, or both, as `eval.adapter` says; `pictures`: whether prompts contain pictures.

    Raises:
      UserError: something can't be loaded, or does not fit together.
    """
    trained = open_trained(run, ExportConfig(checkpoint=config.checkpoint))
    data = trained.run.read_config().get("data", {})
    sight = Sight(trained.base, config.image_cache or data.get("image_cache"))
    if pictures:
        sight.check()
    mesh = start_mesh(hardware, mesh_config, trained.base.arch)
    policy = config.thoughts or data.get("thoughts", "drop")
    base, run_weights = weights_of(trained, config, mesh)
    wanted = {"run": (RUN,), "none": (BASE,), "both": (RUN, BASE)}[config.adapter]
    about = {"base": trained.base.folder, "run": str(trained.run.path), "checkpoint": trained.state.update}
    backends = {
        name: _backend(sight, base if name == BASE else run_weights, config, policy, {**about, "weights": name})
        for name in wanted
    }
    tokenizer = tokenizer_fingerprint(load_tokenizer(trained.base.tokenizer_folder, trained.base.new_tokens))
    return Backends(
        backends, {"base": trained.base.fingerprint, "checkpoint": trained.state.identity, **tokenizer}
    )  # fmt: skip


def of_checkpoint(
    model: ModelConfig, config: EvalConfig, hardware: HardwareConfig, mesh_config: MeshConfig, *, pictures: bool = False
) -> Backends:
    """The checkpoint `model.path` alone; `pictures`: whether prompts contain pictures.

    Raises:
      UserError: as for `of_run`.
    """
    base = resolve_base(model, pictures=pictures)
    audit(base).enforce()
    mesh = start_mesh(hardware, mesh_config, base.arch)
    weights = weights_as_they_are(base, config, mesh)
    about = {"base": model.path}
    backend = _backend(Sight(base, config.image_cache), weights, config, config.thoughts or "drop", about)
    tokenizer = tokenizer_fingerprint(load_tokenizer(base.tokenizer_folder, base.new_tokens))
    return Backends({MODEL: backend}, {"base": base.fingerprint, **tokenizer})


def on_server(model: ModelConfig, config: EvalConfig) -> Backends:
    """The model behind `eval.endpoint`; `model.tokenizer` is needed only for scored answers.

    Raises:
      UserError: no server answers, or there is no tokenizer.
    """
    if not model.tokenizer:
        return Backends({ENDPOINT: Endpoint(config)}, {})
    tokenizer = load_tokenizer(model.tokenizer, model.new_tokens)
    return Backends({ENDPOINT: Endpoint(config, tokenizer)}, tokenizer_fingerprint(tokenizer))


def weights_as_they_are(base: Base, config: EvalConfig, mesh: Mesh) -> Weights:
    """A checkpoint's own weights, in the compute dtype."""
    model = make_model(base.arch, LoraConfig(enabled=False), _trainer(config), mesh)
    return Weights(model, load_weights(base, model.layout, mesh, model.compute_dtype, lambda _, array: array), None)


def weights_of(trained: Trained, config: EvalConfig, mesh: Mesh) -> tuple[Weights, Weights]:
    """(base, run) in the compute dtype, with adapters in float32; a base that was quantised in training is used so.

    Weights trained in full have the base's values in the former and the trained values in the latter. If quantised
    weights lack the adapters' initial values, the base is the model with which training started.
    """
    parts, given = None, trained
    if (trained := as_computed(given)) is not given:
        assert isinstance(given.state, PlainState)
        parts = Parts(trained.lora.init, mesh, jax.random.key(0), given.state.began.read)
    lora, base = trained.lora, trained.base
    model = make_model(base.arch, lora, _trainer(config), mesh)
    params = load_weights(base, model.layout, mesh, model.compute_dtype, holding(lora, mesh, parts))
    own = _on_mesh(trained, model.layout.trained_in_full(), mesh, model.compute_dtype)
    if rows := trained.token_rows:
        path = BY_NAME[EMBEDDING].path
        own[path] = token_rows.put(get(params, path), rows, jnp.asarray(trained.state.read(token_rows.NAME)))
    tuned = model.layout.tree(lambda leaf: own.get(leaf.path, get(params, leaf.path)))
    factors = _on_mesh(trained, adapters.leaves(model.layout), mesh, np.float32)
    begun = adapters.init(model.layout, jax.random.key(0), params, parts.factors) if parts else None
    return Weights(model, params, begun), Weights(model, tuned, build_tree(iter(factors.items())) or None)


def as_computed(trained: Trained) -> Trained:
    """With the adapters as in training if quantised weights lack their initial values, else with plain ones."""
    return trained.as_trained if trained.lora.quantize and isinstance(trained.state, PlainState) else trained


def _on_mesh(trained: Trained, leaves: Iterable[Leaf], mesh: Mesh, dtype: Any) -> dict[Path, jax.Array]:
    """The trained values by path in the tree that the forward pass takes, each sharded as there."""

    def array(leaf: Leaf) -> jax.Array:
        parts = [trained.state.read(name) for name in leaf.tunix_names]
        value = (np.stack(parts) if leaf.stacked else parts[0]).astype(dtype)
        return jax.device_put(value, sharding.named(mesh, leaf))

    return {leaf.path: array(leaf) for leaf in leaves}


def _backend(sight: Sight, weights: Weights, config: EvalConfig, policy: str, description: dict[str, Any]) -> InProcess:
    base = sight.base
    tokenizer = load_tokenizer(base.tokenizer_folder, base.new_tokens)
    stops = checkpoint_stop_ids(base, tokenizer)
    about = {**description, "thoughts": policy, "stop_ids": list(stops), "batch_size": config.batch_size}
    return InProcess(weights, tokenizer, stops, config, policy, about, sight)


def _trainer(config: EvalConfig) -> TrainerConfig:
    """The configuration that `make_model` requires; nothing is trained here."""
    return replace(TrainerConfig(), compute_dtype=config.compute_dtype, remat="none")
