"""Prompts on which the merged model and its base answer with different tokens, stored with the merged model.

A server started with the model is given these (`gemma4_tpu/serving/probe.py`), so that serving the base by mistake is
noticed. They come from the logits of the comparison, else from the run's held-out answers (`trainer.sample_prompts`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_tpu.checkpoint_folder import PROBE_NAME
from gemma4_tpu.data.tokenizer import load_limit, tokenizer_limit
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.place import Place
from gemma4_tpu.export.trained import Trained
from gemma4_tpu.new_tokens import rewritten
from gemma4_tpu.tracking.records import check_shape
from gemma4_tpu.tracking.typed import COUNT, TEXT, fields

_ANSWER = fields({"update": COUNT, "prompt": TEXT, "answer": TEXT})
log = logging.getLogger(__name__)

MIN_MARGIN = 0.1
"""Margin in logits by which each model must prefer its own token; bfloat16 rounds logits near 30 by 0.06 to 0.12."""
MIN_CONTEXT = 4
"""Tokens before the requested one."""
MAX_PROMPTS = 4
_SAMPLES = "heldout_samples.jsonl"


def from_logits(tokens: np.ndarray, mask: np.ndarray, base: np.ndarray, merged: np.ndarray) -> list[dict[str, Any]]:
    """One probe from each prompt in which the models differ by `MIN_MARGIN` somewhere: where they differ most clearly.

    Args:
      tokens: prompts [B, T].
      mask: [B, T], 1 for real tokens.
      base: the base's logits over real positions [positions, V].
      merged: the merged model's.
    """
    own, theirs = merged.argmax(-1), base.argmax(-1)  # [positions]
    at = np.arange(len(own))
    margin = np.minimum(merged[at, own] - merged[at, theirs], base[at, theirs] - base[at, own])
    probes, start = [], 0
    for row, length in enumerate(mask.sum(axis=1)):
        inside = margin[start + MIN_CONTEXT - 1 : start + length]
        if len(inside) and (best := float(inside.max())) >= MIN_MARGIN:
            place = start + MIN_CONTEXT - 1 + int(inside.argmax())
            context = tokens[row, : place - start + 1].tolist()
            probes.append(
                {"tokens": context, "merged": int(own[place]), "base": int(theirs[place]), "margin": round(best, 3)}
            )
        start += length
    return probes


def from_answers(trained: Trained) -> list[dict[str, Any]]:
    """Probes from the answers to held-out prompts, before the first update and after the exported one.

    Each holds the tokens before the first difference, as the tokenizer splits them again.
    """
    path, tokenizer_path = trained.run.path / _SAMPLES, Path(trained.base.tokenizer_folder, "tokenizer.json")
    if not path.is_file() or not tokenizer_path.is_file():
        return []
    from tokenizers import Tokenizer

    folder, renamed = trained.base.tokenizer_folder, trained.base.token_places.renamed
    content = bytes(rewritten(tokenizer_path.name, tokenizer_path.read_bytes(), renamed))
    with load_limit(folder):
        tokenizer = Tokenizer.from_buffer(content)
    rows = list(_answers(path))
    before = {row["prompt"]: row["answer"] for row in rows if row["update"] == 0}
    after = {row["prompt"]: row["answer"] for row in rows if row["update"] == trained.state.update}
    probes: list[dict[str, Any]] = []
    for prompt in before.keys() & after.keys():
        texts = (prompt, before[prompt], after[prompt])
        with tokenizer_limit(folder, sum(map(len, texts))):
            start, base, merged = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        shared = next((i for i, (a, b) in enumerate(zip(base, merged, strict=False)) if a != b), None)
        if shared is not None:
            probes.append({"tokens": start + merged[:shared], "merged": merged[shared], "base": base[shared]})
    return sorted(probes, key=lambda probe: len(probe["tokens"]))[:MAX_PROMPTS]


def _answers(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of held-out answers, as they were sampled. Raises: UserError: one is damaged."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if line:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: damaged ({error}); delete that line") from None
            check_shape(row, _ANSWER, f"{path}, line {number}", "delete that line")
            yield row


def write_probes(trained: Trained, place: Place, report: dict[str, Any] | None) -> None:
    """Writes `probe.json` into the staging folder, if there are probes."""
    logits = (report or {}).get("logits")
    probes = logits["probes"] if logits else from_answers(trained)
    if not probes:
        log.warning(
            "no known prompt separates merged model and base clearly, so a server can't be checked for which of them it"
            " serves (such prompts come from verify=true, or from trainer.sample_prompts of the training run)"
        )
        return
    if place.done(PROBE_NAME) is None and not place.published:
        with place.create(PROBE_NAME) as out:
            out.write(json.dumps({"prompts": probes}, indent=1).encode() + b"\n")
            place.finish(PROBE_NAME, out)
