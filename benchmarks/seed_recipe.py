"""The published recipe's train step, for comparison: Tunix's model, Qwix's adapters, Tunix's default loss.

As in the paper: every row padded to T, one row per microbatch, gradients accumulated over eight, einsum attention,
every decoder layer computed again in the backward pass, adapters in the base's dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tunix.models.gemma4 import model as tunix
from tunix.sft import peft_trainer

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.models.tunix_bridge import tunix_config

MODULES = ".*q_einsum|.*kv_einsum|.*attn_vec_einsum|.*gate_proj|.*down_proj|.*up_proj"
"""The recipe's pattern; it misses the keys of global layers (`k_einsum`)."""
ROWS_PER_UPDATE = 8


def adapted(model: tunix.Gemma4, rank: int, places: int) -> nnx.Module:
    """`model` with Qwix's adapters; `places`: size of the mesh's fsdp axis. Remat is set afterwards, on the config."""
    provider = qwix.LoraProvider(module_path=MODULES, rank=rank, alpha=float(rank))
    tokens = jnp.zeros((places, 128), jnp.int32)
    mask = jnp.ones((places, 1, 128), bool)
    return qwix.apply_lora_to_model(model, provider, tokens, tokens, None, mask, rngs=nnx.Rngs(1))


def model_input(rows: Any) -> dict[str, jax.Array]:
    """What Tunix's default loss takes, from right-padded tokens [B, T] and the mask of real ones."""
    tokens, mask = rows.input_tokens, rows.input_mask
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None] & (mask[:, None, :] > 0)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return {"input_tokens": tokens, "input_mask": mask, "positions": positions, "attention_mask": causal}


def padded(examples: list[np.ndarray], length: int) -> list[peft_trainer.TrainingInput]:
    """One padded row per example."""
    rows = []
    for ids in examples:
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(ids)] = ids
        rows.append(peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.arange(length)[None] < len(ids)))
    return rows


def absent_step(arch: Architecture, mesh: Mesh, length: int, rank: int) -> tuple[Any, tuple[Any, ...]]:
    """(step, shapes) to be lowered: one microbatch and the optimizer's update in bfloat16, as PeftTrainer's."""
    config = tunix_config(arch, jnp.bfloat16)

    def constrain(x: jax.Array, spec: Any, eager: bool = False) -> jax.Array:
        del eager
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    # Tunix 0.1.7 asks the first device that is there whether to constrain activations; here none is there.
    tunix.shard = constrain

    def build() -> tuple[nnx.Module, nnx.Optimizer]:
        model = adapted(tunix.Gemma4(config, rngs=nnx.Rngs(0)), rank, mesh.shape["fsdp"])
        return model, nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.LoRAParam)

    with mesh:
        model, optimizer = nnx.eval_shape(build)
    config.remat_config = tunix.RematConfig.DECODER
    graph, state = nnx.split((model, optimizer))
    state = jax.tree.map(lambda v: _placed(v, mesh), state, is_leaf=lambda v: hasattr(v, "get_metadata"))

    def step(state: Any, tokens: jax.Array, mask: jax.Array) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        given = model_input(peft_trainer.TrainingInput(input_tokens=tokens, input_mask=mask))
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(peft_trainer._default_loss_fn, argnums=wrt)(model, **given)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    rows = NamedSharding(mesh, P("fsdp", None))
    shape = (mesh.shape["fsdp"], length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows)
    return jax.jit(step, donate_argnums=0), (state, tokens, mask)


def _placed(variable: Any, mesh: Mesh) -> Any:
    """A variable's shape with its sharding; axes that do not divide, and specs of another rank, are left out."""
    value, facts = variable.get_value(), variable.get_metadata()
    axes = tuple(facts.get("sharding") or facts.get("out_sharding") or facts.get("sharding_names") or ())
    if len(axes) != len(value.shape):
        axes = (None,) * len(value.shape)
    axes = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, value.shape, strict=True)]
    place = NamedSharding(mesh, P(*axes))
    return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place))
