"""A checkpoint's own picture processor and frozen vision tower, run by transformers on the host's CPU.

The processor is always transformers' PIL version: torchvision resizes slightly differently, and features would depend
on the machine. Only the tower is loaded, never the text model.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gemma4_tpu.checkpoint_folder import read_config
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.storage import join, list_folder, read_json

VERSION = 1
"""Version of the features; part of `Tower.key`."""
PREFIX = "model.vision_tower."
SETTINGS = ("processor_config.json", "preprocessor_config.json")
"""Files that can hold a processor's settings, the first one under `image_processor`."""


@dataclass(frozen=True)
class PictureProcessor:
    """Splits a picture into patches, which determines its number of soft tokens."""

    settings: dict[str, Any]

    @classmethod
    def of(cls, folder: str) -> PictureProcessor:
        """The processor of a checkpoint's folder, local or remote.

        Raises:
          UserError: its settings are missing, or transformers rejects them.
        """
        present = list_folder(folder)
        for name in SETTINGS:
            found = read_json(join(folder, name)) if name in present else {}
            found = found.get("image_processor", {} if name == SETTINGS[0] else found)
            if isinstance(found, dict) and found:
                return cls(found)
        raise UserError(
            f"{folder}: pictures need the checkpoint's processor, but neither {' nor '.join(SETTINGS)} is"
            " there; copy the file next to the weights"
        )

    @cached_property
    def _made(self) -> Any:
        try:
            from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
        except ImportError as error:
            raise UserError(f"pictures need the extra: pip install 'gemma4-tpu[pictures]' ({error})") from None
        try:
            return Gemma4ImageProcessorPil.from_dict(self.settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"transformers rejects the checkpoint's picture settings: {error}") from None

    def tokens(self, width: int, height: int) -> int:
        """Soft tokens of a picture of this size in pixels.

        Raises:
          ValueError: its aspect ratio is too large for the processor.
        """
        from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

        made = self._made
        pooled = made.pooling_kernel_size**2
        rows, columns = get_aspect_ratio_preserving_size(
            height=height, width=width, patch_size=made.patch_size, max_patches=made.max_soft_tokens * pooled,
            pooling_kernel_size=made.pooling_kernel_size,
        )  # fmt: skip
        return rows * columns // made.patch_size**2 // pooled

    def __call__(self, images: Sequence[Any]) -> Any:
        """PyTorch tensors of PIL images: `pixel_values` [n, patches, 3·p²] and `image_position_ids` [n, patches, 2]."""
        return self._made(images=list(images), return_tensors="pt")


class Tower:
    """The tower of one checkpoint, in float32; features are rounded to the dtype in which its weights are stored.

    Raises:
      UserError: the checkpoint has none, PyTorch is not installed, or its tensors do not match its configuration.
    """

    def __init__(self, checkpoint: Checkpoint, processor: PictureProcessor):
        self._checkpoint, self._processor = checkpoint, processor
        self._config = read_config(checkpoint.folder).get("vision_config") or {}
        self._names = [name for name in checkpoint.names() if name.startswith(PREFIX)]
        if not self._names or not self._config:
            raise UserError(f"{checkpoint.folder}: contains no vision tower ({PREFIX}…), so it cannot read pictures")
        self.dtype = checkpoint.dtype(next(name for name in self._names if name.endswith("weight")))
        """Dtype of features, as stored."""
        self.dim: int = self._config.get("hidden_size", 768)
        """Width I of a feature."""

    @cached_property
    def key(self) -> str:
        """A hash of everything besides the picture that determines features: weights, their configuration, the
        processor.
        """
        digest = hashlib.sha256(json.dumps([VERSION, self._config, self._processor.settings], sort_keys=True).encode())
        for name in self._names:
            array = np.ascontiguousarray(self._checkpoint.read(name))
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @cached_property
    def _model(self) -> Any:
        try:
            import torch
            from transformers import Gemma4VisionConfig, Gemma4VisionModel
        except ImportError as error:
            raise UserError(
                f"the vision tower runs in PyTorch: pip install 'gemma4-tpu[pictures]' ({error}); where all features"
                " are in data.image_cache already, it is not needed"
            ) from None
        try:
            model = Gemma4VisionModel(Gemma4VisionConfig.from_dict(copy.deepcopy(self._config)))  # which changes it
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._checkpoint.folder}: this transformers cannot build its vision tower ({error!r}); config.json"
                " says in transformers_version which one saved it: pip install -U transformers"
            ) from None
        weights = {
            name.removeprefix(PREFIX): torch.from_numpy(np.array(self._checkpoint.read(name), np.float32))
            for name in self._names
        }
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{self._checkpoint.folder}: its vision tower does not load: {error}") from None
        return model.eval().requires_grad_(False)

    def encode(self, images: Sequence[Any]) -> list[np.ndarray]:
        """Features [n, I] of each PIL image (RGB), before the projector; n is `PictureProcessor.tokens` of its size."""
        import torch

        model = self._model
        given = self._processor(images)
        with torch.inference_mode():
            found = model(given["pixel_values"], given["image_position_ids"]).last_hidden_state.numpy()
        counts = [int(count) for count in given["num_soft_tokens_per_image"]]
        return [part.astype(self.dtype) for part in np.split(found, np.cumsum(counts)[:-1])]
