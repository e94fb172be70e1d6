"""Loads the checkpoint's own Hugging Face tokenizer from a local or remote folder, and fingerprints it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_tpu import assets
from gemma4_tpu.data import markup
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.hard_limit import BYTES, SECONDS, hard_limit
from gemma4_tpu.data.timeout import memory_limit, row_limit
from gemma4_tpu.errors import UserError, first_line
from gemma4_tpu.new_tokens import places, rewritten
from gemma4_tpu.scratch import scratch_folder
from gemma4_tpu.storage import is_remote, join, list_folder, open_bytes

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
)

LOAD_SECONDS = 300.0
"""A real one takes a few seconds."""
LOAD_BYTES = 8 * 2**30
_REMEDY = "use the original checkpoint's tokenizer (model.tokenizer=<folder>)"
_CHARACTERS_PER_SECOND = 50_000  # of ordinary text, a busy core encodes 600,000
_BYTES_PER_CHARACTER = 512  # of ordinary text, encodings take about 220
_PART_CHARACTERS = 2**20
_PROBES = (f"{markup.TURN}Xy  z.{markup.TURN_END}", "  Xy\n\n\tZ \n", "\u00e9 \ufb01 \u212b 漢😀")
"""Case, white space and letters that tokenizers of other models change."""


def load_tokenizer(folder: str, new_tokens: Sequence[str] = ()) -> Any:
    """The tokenizer in `folder` (local, gs://… or `embedded:NAME`), with its chat template and `model.new_tokens`.

    Raises:
      UserError: there is no tokenizer or chat template, no room for the new tokens, or it changes texts.
    """
    path = assets.resolve(folder)
    with scratch_folder() as scratch:
        if new_tokens or is_remote(path):
            _fetch(path, scratch, places(path, new_tokens).renamed if new_tokens else {})
            path = str(scratch)
        if not (Path(path) / "tokenizer.json").is_file():
            raise UserError(f"{folder}: there is no tokenizer.json; set model.tokenizer to a folder that has one")
        tokenizer = load_limited(path, folder)
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder}: the tokenizer has no chat template; use an instruction-tuned checkpoint's tokenizer "
            "(model.tokenizer=…), or put a chat_template.jinja next to it"
        )
    _check_spelling(tokenizer, folder)
    return tokenizer


def _check_spelling(tokenizer: Any, folder: str) -> None:
    """Raises `UserError` if the tokenizer's ids spell another text than the one they were made from.

    Normalizers that lower, trim or compose, and tokens that swallow the white space next to them or add some, would
    silently train on other texts than rows hold.
    """
    if dropout := getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise UserError(f"{folder}: the tokenizer draws its tokens by chance (dropout: {dropout}); {_REMEDY}")
    for text in _PROBES:
        [ids] = encode(tokenizer, [text])
        spelt = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if spelt != text and tokenizer.unk_token_id not in ids:
            raise UserError(
                f"{folder}: the tokenizer reads {text!r} as {spelt!r}, so no row would keep its text; {_REMEDY}"
            )


def load_limited(path: str, folder: str) -> Any:
    """`AutoTokenizer.from_pretrained`, which ends the process if loading or using the tokenizer takes far too long.

    Args:
      path: a local folder.
      folder: what messages call it.

    Raises:
      UserError: transformers cannot load it.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about missing PyTorch, which is not needed
    from transformers import AutoTokenizer

    try:
        with load_limit(folder):
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({error})") from error
    tokenizer.name_or_path = folder  # not a temporary one
    kind = type(tokenizer)
    tokenizer.__class__ = type(kind.__name__, (_Limited, kind), {})
    return tokenizer


def load_limit(folder: str) -> AbstractContextManager[None]:
    """Ends the process if loading the tokenizer of `folder` takes far longer, or far more memory, than it should."""
    return hard_limit(f"loading the tokenizer of {folder}", _REMEDY, seconds=LOAD_SECONDS, most_bytes=LOAD_BYTES)


class _Limited:
    """What a loaded tokenizer is in addition to its own class: `tokenizer(text)` and `decode` are limited."""

    name_or_path: str

    def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
        with tokenizer_limit(self.name_or_path, sum(map(len, markup.strings(text)))):
            return super()._encode_plus(text, *args, **options)  # type: ignore[misc]

    def _decode(self, token_ids: Any, *args: Any, **options: Any) -> str:
        with tokenizer_limit(self.name_or_path, np.size(token_ids)):
            return super()._decode(token_ids, *args, **options)  # type: ignore[misc]


@contextmanager
def tokenizer_limit(folder: str, characters: int) -> Iterator[None]:
    """Ends the process if the tokenizer of `folder` takes far longer, or far more memory, for a text than it should.

    `characters`: the text's, or the number of tokens to decode.

    Raises:
      UserError: the tokenizer fails: its patterns backtrack too often, for instance.
    """
    who = f"the tokenizer of {folder}"
    seconds, most = SECONDS + characters / _CHARACTERS_PER_SECOND, BYTES + characters * _BYTES_PER_CHARACTER
    try:
        with hard_limit(who, _REMEDY, seconds=seconds, most_bytes=most):
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, and not an Exception
            raise
        raise UserError(f"{who} fails ({first_line(error)}); {_REMEDY}") from None


def apply_template(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """A conversation as the tokenizer's template renders it. Always limited: a template comes with a checkpoint.

    Raises:
      RowDropped: the template fails, or takes too long or too much memory.
    """
    who = f"the chat template of {tokenizer.name_or_path}"
    try:
        with (
            hard_limit(who, "use the original checkpoint's template", seconds=SECONDS, most_bytes=BYTES),
            row_limit(),
            memory_limit(),
        ):
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except RowDropped:
        raise
    except Exception as error:  # a template's own code can raise anything
        raise RowDropped("template_error", f"{type(error).__name__}: {error}"[:120]) from error


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, int32 [n + 1]; adds no special tokens."""
    # Equivalent to `tokenizer(texts)` without offsets into the text, which saves a quarter of the time.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encoded = []
    for part in limited_parts(texts):
        with tokenizer_limit(tokenizer.name_or_path, sum(map(len, part))):
            encoded += backend.encode_batch_fast(part, add_special_tokens=False)
    return [np.array(piece.ids, np.int32) for piece in encoded]


def limited_parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Consecutive texts, few enough that a good tokenizer needs a second or two; a long text is a part of its own."""
    part: list[str] = []
    characters = 0
    for text in texts:
        if part and characters + len(text) > _PART_CHARACTERS:
            yield part
            part, characters = [], 0
        part.append(text)
        characters += len(text)
    if part:
        yield part


def _fetch(folder: str, target: Path, renamed: dict[str, str]) -> None:
    """Copies only the tokenizer's files, renaming reserved tokens."""
    present = list_folder(folder)
    for name in FILES:
        if name in present:
            file = open_bytes(join(folder, name))
            (target / name).write_bytes(rewritten(name, file.read(0, file.size_bytes), renamed))


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, str]:
    """sha256 of the vocabulary with its rules, and of the chat template."""
    backend = tokenizer.backend_tokenizer.to_str()
    return {
        "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    }
