"""Whether a checkpoint's tensors match an architecture, from headers except for the output matrix. Imports no JAX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.errors import UserError
from gemma4_tpu.hf_config import UNQUANTISED
from gemma4_tpu.models.names import full_name, name_map, some
from gemma4_tpu.models.tensorfile import Checkpoint, Index
from gemma4_tpu.models.weights import BY_NAME, EMBEDDING

PREFIXES = ("model.language_model.", "model.")
"""What precedes `layers.N…` in Gemma4ForConditionalGeneration and in Gemma4ForCausalLM."""

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")

# Tensors that text training leaves untouched: other modalities, the tied output matrix, buffers computed from the
# config.
_HEAD = re.compile(r"(model\.)?(language_model\.)?lm_head\.weight$")
_PASSTHROUGH = re.compile(
    r"(model\.)?(vision_tower|vision_embedder|audio_tower|embed_vision|embed_audio|multi_modal_projector)\."
    r"|.*\brotary_emb\.|.*\bembed_scale$"
)
# Tensors that quantisers add next to a weight, or store instead of it, by method.
_QUANTISED = {
    "bitsandbytes": re.compile(r"\.(absmax|quant_map|nested_\w+|quant_state\.[\w.]+|SCB|weight_format)$"),
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|g_idx)$"),
    "compressed-tensors": re.compile(r"weight_(packed|shape|zero_point|global_scale)$"),
    "MXFP4": re.compile(r"_(blocks|scales)$"),
    "fp8 or another format with scales": re.compile(r"(weight|proj)_scale(_inv|_2)?$|\.input_scale$"),
}
_SHARED_KV = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight$")


@dataclass(frozen=True)
class Match:
    """How a checkpoint's tensors correspond to an architecture."""

    prefix: str
    """One of `PREFIXES`."""
    passthrough: tuple[str, ...]
    """Full names of the tensors that text training leaves untouched, sorted; includes `head`."""
    head: str | None = None
    """Full name of a stored output matrix [V, D]. Gemma 4 ties it to the embedding, so its values must be the same."""

    @property
    def embedding(self) -> str:
        """Full name of the embedding."""
        return f"{self.prefix}{BY_NAME[EMBEDDING].on_disk}"


def match(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> Match:
    """Pairs a checkpoint's tensors (full name → shape) with those of `arch`.

    Raises:
      UserError: tensors are missing, unexpected or misshapen; names them all (the first ten of each kind), and the
        method if the checkpoint is quantised. `where` says which checkpoint.
    """
    prefixes = [p for p in PREFIXES if any(name.startswith(p + "layers.") for name in shapes)]
    if len(prefixes) != 1:
        raise UserError(
            f"{where}: expected text weights under exactly one of {', '.join(p + 'layers.N' for p in PREFIXES)};"
            f" found {len(prefixes)} of them among {some(sorted(shapes))}"
        )
    (prefix,) = prefixes
    expected = {full_name(prefix, name): t.hf_shape for t in name_map(arch).values() for name in t.hf_names}
    heads = sorted(name for name in shapes if _HEAD.match(name))
    wanted = expected | dict.fromkeys(heads, (arch.vocab_size, arch.embed_dim))
    rest = shapes.keys() - wanted.keys()
    passthrough = sorted([*heads, *(name for name in rest if _left_alone(arch, name, prefix))])
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(rest - set(passthrough)),
        "with another shape": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in shapes and tuple(shapes[name]) != shape
        ],
    }
    if any(problems.values()):
        if told := _quantised(problems["unexpected"]):
            raise UserError(f"{where}: {told}; {UNQUANTISED}")
        found = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{where}: its tensors do not match {arch.name}: {found}")
    return Match(prefix, tuple(passthrough), heads[0] if heads else None)


def _quantised(names: Sequence[str]) -> str | None:
    """The method by which a checkpoint with these unexpected tensors is quantised; None if it is not."""
    for method, pattern in _QUANTISED.items():
        if found := [name for name in names if pattern.search(name)]:
            return f"quantised with {method}, though config.json has no quantization_config ({some(found, 2)})"
    return None


def _left_alone(arch: Architecture, name: str, prefix: str) -> bool:
    if _PASSTHROUGH.match(name):
        return True
    shared = _SHARED_KV.match(name.removeprefix(prefix))
    return shared is not None and arch.num_unshared_layers <= int(shared[1]) < arch.num_layers


def fit(arch: Architecture, checkpoint: Checkpoint) -> Match:
    """Pairs the tensors of a checkpoint with those of `arch`; reads no weights.

    Raises:
      UserError: tensors are missing, unexpected, misshapen or quantised; names them.
    """
    found = match(arch, {name: checkpoint.shape(name) for name in checkpoint.names()}, checkpoint.folder)
    for name in (full_name(found.prefix, own) for tensor in name_map(arch).values() for own in tensor.hf_names):
        if (dtype := checkpoint.dtype(name).name) not in WEIGHT_DTYPES:
            raise UserError(
                f"{checkpoint.file_of(name).path}: {name} is stored as {dtype}, not as a plain weight"
                f" ({', '.join(WEIGHT_DTYPES)}); a quantised checkpoint? {UNQUANTISED}"
            )
    return found


def check_tied(checkpoint: Checkpoint, found: Match, index: Index, embedding: np.ndarray | None = None) -> None:
    """Compares the stored output matrix, if any, with the embedding, over `index` [V, D].

    transformers does not tie the two if a checkpoint stores both with different values, whatever its config says.

    Args:
      checkpoint: the open checkpoint.
      found: the result of `fit`.
      index: which rows and columns.
      embedding: that part of the embedding, if it has been read already.

    Raises:
      UserError: they differ; names the tensors and the file.
    """
    if found.head is None:
        return
    embedding = checkpoint.read(found.embedding, index) if embedding is None else embedding
    if not np.array_equal(checkpoint.read(found.head, index), embedding):
        raise UserError(
            f"{checkpoint.file_of(found.head).path}: {found.head} is not {found.embedding}: a separate output matrix"
            " (tie_word_embeddings=false), which Gemma 4 as released does not have and this project does not train;"
            " use a checkpoint with tied weights"
        )
