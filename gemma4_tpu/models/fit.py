"""Whether a checkpoint's tensors are those of an architecture. Headers say so, but for the output matrix. No JAX."""

from __future__ import annotations

import numpy as np

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.errors import UserError
from gemma4_tpu.hf_config import UNQUANTISED
from gemma4_tpu.models.names import Match, match, name_map
from gemma4_tpu.models.tensorfile import Checkpoint, Index

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")


def fit(arch: Architecture, checkpoint: Checkpoint) -> Match:
    """Pairs the tensors of a checkpoint with those of `arch`; reads no weights.

    Raises:
      UserError: missing, unexpected, misshapen or quantised tensors; names them.
    """
    found = match(arch, {name: checkpoint.shape(name) for name in checkpoint.names()}, checkpoint.folder)
    for name in (found.prefix + hf_name for tensor in name_map(arch).values() for hf_name in tensor.hf_names):
        if (dtype := checkpoint.dtype(name).name) not in WEIGHT_DTYPES:
            raise UserError(
                f"{checkpoint.file_of(name).path}: {name} is stored as {dtype}, not as a plain weight"
                f" ({', '.join(WEIGHT_DTYPES)}); a quantised checkpoint? {UNQUANTISED}"
            )
    return found


def check_tied(checkpoint: Checkpoint, found: Match, index: Index, embedding: np.ndarray | None = None) -> None:
    """Compares the stored output matrix, if there is one, with the embedding, as far as `index` [V, D] goes.

    transformers does not tie the two where a checkpoint holds both with different values, whatever its config says.

    Args:
      checkpoint: the open checkpoint.
      found: of `fit`.
      index: which rows and columns.
      embedding: those of the embedding, where they have been read already.

    Raises:
      UserError: they differ; names the tensors and the file.
    """
    if found.head is None:
        return
    embedding = checkpoint.read(found.embedding, index) if embedding is None else embedding
    if not np.array_equal(checkpoint.read(found.head, index), embedding):
        raise UserError(
            f"{checkpoint.file_of(found.head).path}: {found.head} is not {found.embedding}: an output matrix of its own"
            " (tie_word_embeddings=false), which Gemma 4 as released does not have and this project does not train;"
            " give a checkpoint with tied weights"
        )
