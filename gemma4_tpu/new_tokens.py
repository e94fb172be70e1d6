"""`model.new_tokens`: custom tokens in rows of the vocabulary that the tokenizer holds in reserve. No JAX here.

Gemma's tokenizers name their spare rows `<unused0>`, `<unused1>`, … Each new token takes the name of the next one over,
in `tokenizer.json` and what else names it, so that no tensor changes its shape and everything that loads the base loads
the result. A token that the tokenizer has already keeps its row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gemma4_tpu.checkpoint_folder import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, chat_template
from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import join, read_json

_RESERVED = re.compile(r"<unused\d+>")
_CONTROL = re.compile(r"<\|.*>|<.*\|>")
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@dataclass(frozen=True)
class NewTokens:
    """New tokens of a tokenizer, each with its place."""

    ids: dict[str, int]
    """Token → its row, in the order in which they are given."""
    renamed: dict[str, str]
    """Reserved token → the new one that takes its row."""

    @property
    def taken(self) -> tuple[int, ...]:
        """Rows that were held in reserve: nothing is known yet about their tokens."""
        return tuple(self.ids[token] for token in self.renamed.values())


def problems(tokens: Sequence[str]) -> list[str]:
    """What is wrong with tokens by themselves."""
    messages = []
    for token in dict.fromkeys(tokens):
        if not token.strip() or token != token.strip():
            messages.append(f"model.new_tokens: {token!r} is blank, or has white space around it; write <name>")
        elif _CONTROL.fullmatch(token):
            messages.append(
                f"model.new_tokens: {token!r} has the form of Gemma's control tokens, which rows must not contain;"
                f" write <{token.strip('<|>')}>"
            )
        elif tokens.count(token) > 1:
            messages.append(f"model.new_tokens: {token!r} is given twice")
    return messages


def places(folder: str, tokens: Sequence[str]) -> NewTokens:
    """The rows that new tokens get in the tokenizer of a folder, local or remote.

    Raises:
      UserError: it holds fewer in reserve than are needed.
    """
    content = read_json(join(folder, TOKENIZER_NAME))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
        vocabulary = {token: number for number, (token, *_) in enumerate(vocabulary)}
    added = {entry["content"]: entry for entry in content.get("added_tokens") or []}
    known = {**vocabulary, **{token: entry["id"] for token, entry in added.items()}}
    template = chat_template(folder) or ""
    spare = [
        token for token in known
        if _RESERVED.fullmatch(token) and token not in template and not added.get(token, _ADDED)["special"]
    ]  # fmt: skip
    wanted = [token for token in tokens if token not in known]
    if len(wanted) > len(spare):
        raise UserError(
            f"model.new_tokens: {', '.join(wanted[:5])}{', …' if len(wanted) > 5 else ''}: {len(wanted)} new, but"
            f" {join(folder, TOKENIZER_NAME)} holds {len(spare)} tokens in reserve (<unused0>, …); enlarge the model"
            " with transformers (add_tokens, then resize_token_embeddings), save both and give model.path=<that folder>"
        )
    renamed = dict(zip(sorted(spare, key=known.__getitem__), wanted, strict=False))
    known |= {token: known[reserved] for reserved, token in renamed.items()}
    return NewTokens({token: known[token] for token in tokens}, renamed)


def rewritten(name: str, data: bytes | memoryview, renamed: dict[str, str]) -> bytes | memoryview:
    """A file of a tokenizer in which reserved tokens have their new names."""
    change = _CHANGES.get(name)
    if change is None or not renamed:
        return data
    content = json.loads(bytes(data))
    change(content, renamed)
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


def _in_tokenizer(content: dict[str, Any], renamed: dict[str, str]) -> None:
    model = content["model"]
    if isinstance(model["vocab"], list):
        ids = {token: number for number, (token, *_) in enumerate(model["vocab"])}
        model["vocab"] = [[renamed.get(token, token), *rest] for token, *rest in model["vocab"]]
    else:
        ids = dict(model["vocab"])
        model["vocab"] = {renamed.get(token, token): number for token, number in model["vocab"].items()}
    added = {entry["content"]: entry for entry in content.get("added_tokens") or []}
    for reserved, token in renamed.items():  # as added tokens they are found in a text whatever stands around them
        own = added.pop(reserved, {"id": ids.get(reserved)})
        added[token] = {"id": own["id"], "content": token, **_ADDED}
    content["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])


def _in_config(content: dict[str, Any], renamed: dict[str, str]) -> None:
    for entry in (content.get("added_tokens_decoder") or {}).values():
        if entry["content"] in renamed:
            entry |= {"content": renamed[entry["content"]], **_ADDED}


def _in_added(content: dict[str, Any], renamed: dict[str, str]) -> None:
    for reserved in renamed.keys() & content.keys():
        content[renamed[reserved]] = content.pop(reserved)


_CHANGES: dict[str, Callable[[dict[str, Any], dict[str, str]], None]] = {
    TOKENIZER_NAME: _in_tokenizer, TOKENIZER_CONFIG_NAME: _in_config, "added_tokens.json": _in_added,
}  # fmt: skip
