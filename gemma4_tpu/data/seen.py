"""What a run needs in order to read pictures: a counter of their tokens, and a source of their features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma4_tpu.config.schema import DataConfig
from gemma4_tpu.data.build import TrainingData
from gemma4_tpu.data.chat import Message
from gemma4_tpu.data.drops import REASONS, Origin, RowDropped
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.data.picture_cache import BATCH, FeatureCache, Shown
from gemma4_tpu.data.pictures import Picture, PictureReader, pictures_of
from gemma4_tpu.data.turns import IMAGE_PARTS, to_turns
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.base import Base
from gemma4_tpu.models.vision_tower import PictureProcessor, Tower

logger = logging.getLogger(__name__)


def picture_reader(base: Base, data: DataConfig) -> PictureReader | None:
    """A reader for pictures in rows that matches the base; None: rows with pictures are dropped.

    Raises:
      UserError: the checkpoint has no processor.
    """
    return None if data.image_cache is None else PictureReader(_processor(base))


def feature_cache(base: Base, data: DataConfig, share: tuple[int, int] = (0, 1)) -> FeatureCache | None:
    """The cache for features of the base's tower; None: pictures are not read. `share`: as for `FeatureCache`.

    Raises:
      UserError: the checkpoint has no tower or no processor, or the folder can't be written to.
    """
    if data.image_cache is None:
        return None
    return FeatureCache(data.image_cache, Tower(base.checkpoint, _processor(base)), share)


def shown_with(base: Base, cache: FeatureCache, data: TrainingData, processes: int) -> Shown:
    """The features of all examples; call it after every process has made its share.

    Raises:
      UserError: some are missing.
    """
    every = [keys for examples in (data.train, data.heldout) if examples for keys in examples.pictures or ()]
    if missing := cache.missing([key for keys in every for key in keys]):
        several = f": {processes} processes need one folder, such as a bucket" if processes > 1 else ""
        raise UserError(f"data.image_cache: {len(missing)} pictures have no features in {cache.folder}{several}")
    assert base.arch.vision is not None
    return Shown(cache, base.arch.vision.image_token)


def holds_pictures(messages: Sequence[Message]) -> bool:
    """Whether any turn contains a picture, in any row format."""
    contents = [message.get("content") for message in messages]
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(part.get("type") in IMAGE_PARTS for part in parts if isinstance(part, dict))


@dataclass(frozen=True)
class Sight:
    """Reads the pictures of prompts for a model in this process.

    Args:
      base: the model's base; one resolved for text alone refuses pictures.
      cache: folder for features, as `data.image_cache`; None: they are recomputed each time.
    """

    base: Base
    cache: str | None = None

    def check(self) -> None:
        """Raises: UserError: the model can't read pictures."""
        if self.base.arch.vision is None:
            raise UserError(
                "a prompt with a picture, for a model that was loaded for text. A run reads pictures if it was trained"
                " with data.image_cache; an E2B or E4B checkpoint (also a merged one) does with Gemma4.load(…,"
                " pictures=True) or in an evaluation"
            )

    def read(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[Message, ...]]:
        """Conversations with their pictures loaded. Paths are relative to the current folder; tokens of pictures that
        were loaded already are recounted for this model.

        Raises:
          UserError: the model can't read pictures, or a row with such a turn or picture would be dropped.
        """
        if not any(map(holds_pictures, conversations)):
            return [tuple(messages) for messages in conversations]
        self.check()
        reader, made = PictureReader(_processor(self.base)), []
        for number, messages in enumerate(conversations, start=1):
            try:
                turns = to_turns(list(messages), {}, lambda note: None)
                read = reader.within(Conversation(turns), None, Origin("prompt", number), lambda note: None)
            except RowDropped as problem:
                raise UserError(f"prompt {number}: {REASONS[problem.reason]} ({problem.detail})") from None
            made.append(tuple(read.messages))
        return made

    def shown(self, conversations: Sequence[Sequence[Message]]) -> Shown | None:
        """The features of all pictures in conversations from `read`; None if there are none."""
        pictures = [picture for messages in conversations for picture in pictures_of(messages)]
        if not pictures:
            return None
        assert self.base.arch.vision is not None  # `read` refuses
        image_token, tower = self.base.arch.vision.image_token, Tower(self.base.checkpoint, _processor(self.base))
        if self.cache is None:
            return Shown(_made_now(tower, pictures), image_token)
        cache = FeatureCache(self.cache, tower)
        cache.ensure(pictures)
        logger.info("%s", cache.told())
        return Shown(cache, image_token)


@dataclass(frozen=True)
class _InMemory:
    """Features of a few pictures."""

    dim: int
    dtype: Any
    of: dict[str, np.ndarray]

    def read(self, keys: Sequence[str]) -> list[np.ndarray]:
        return [self.of[key] for key in keys]


def _made_now(tower: Tower, pictures: Sequence[Picture]) -> _InMemory:
    distinct = list({picture.key: picture for picture in pictures}.values())
    made: dict[str, np.ndarray] = {}
    for start in range(0, len(distinct), BATCH):
        batch = distinct[start : start + BATCH]
        made |= zip([one.key for one in batch], tower.encode([one.image() for one in batch]), strict=True)
    return _InMemory(tower.dim, tower.dtype, made)


def _processor(base: Base) -> PictureProcessor:
    return PictureProcessor.of(base.folder or base.tokenizer_folder)
