"""Inspects a checkpoint and reports what would go wrong with it, from headers and small files only. Imports no JAX.

`python -m gemma4_tpu.check` prints the report; training, evaluation, planning and launching run it as a step.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gemma4_tpu import checkpoint_folder as files
from gemma4_tpu import templates
from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.paths import local_folder
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.config.tasks import ANY_SIZE
from gemma4_tpu.errors import UserError
from gemma4_tpu.hf_config import text_config, vision
from gemma4_tpu.models.base import Base, resolve_base
from gemma4_tpu.models.kv_cache import parameter_count
from gemma4_tpu.models.match import Match, check_tied, fit
from gemma4_tpu.models.names import full_name, name_map
from gemma4_tpu.storage import is_remote, join, list_folder, read_json

log = logging.getLogger(__name__)

END_OF_TURN = "<turn|>"
_OTHER_PARAMETERS = {"gemma4_31b": 575_743_536, "gemma4_12b": 52_379_904}
"""Parameters of the image and audio parts of the released checkpoints, where known; those of the text model follow from
its shapes.
"""
_ROWS = 16  # rows of a stored output matrix compared with the embedding here; loading compares all of it
_SECONDS = 30.0  # limit for looking at a checkpoint that may be unreachable
_CHILD = """
import json, sys
from dataclasses import asdict
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.models.audit import look
print(json.dumps(asdict(look(ModelConfig(**json.loads(sys.argv[1]))))))
"""


@dataclass
class Audit:
    """The findings."""

    facts: dict[str, str] = field(default_factory=dict)
    """What the checkpoint is, by heading."""
    problems: list[str] = field(default_factory=list)
    """Reasons why training would be refused."""
    notes: list[str] = field(default_factory=list)
    """Worth knowing, but no reason to refuse."""

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Records a refusal inside the block as a problem."""
        try:
            yield
        except UserError as refusal:
            self.problems.append(str(refusal))

    def enforce(self) -> None:
        """Logs the notes, and raises one `UserError` with all problems if there are any."""
        for note in self.notes:
            log.warning("%s", note)
        if self.problems:
            raise UserError("\n".join(self.problems))


def look(model: ModelConfig) -> Audit:
    """Audits the checkpoint that `model` names; `model.name=auto` detects its size."""
    found = Audit()
    with found.collecting():
        return audit(resolve_base(replace(model, name=_size(model)) if model.name == ANY_SIZE else model))
    return found


def _size(model: ModelConfig) -> str:
    """The name of a checkpoint's architecture."""
    path = model.path or ""
    if path.startswith(files.RANDOM):
        raise UserError(f"model.path={path}: random weights of which size? give model=<size>")
    place, messages = local_folder(f"model.path={path}", path)
    if messages:
        raise UserError("\n".join(messages))
    try:
        return files.recognise(str(place or path))
    except UserError as error:
        raise UserError(f"model.path={path}: {error}") from None


def look_from_afar(model: ModelConfig) -> Audit:
    """Like `look`, from a machine that may be unable to reach the checkpoint: remote files get half a minute."""
    try:
        return look_within(model, _SECONDS)
    except UserError as error:
        return Audit(notes=[f"{error}; training checks it before loading"])


def look_within(model: ModelConfig, seconds: float) -> Audit:
    """Like `look`, with a time limit for remote files.

    Raises:
      UserError: the checkpoint cannot be reached; gives the file system's reason.
    """
    if not is_remote(model.path or ""):
        return look(model)
    reason = f"no answer within {seconds:.0f} s"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(asdict(model))],
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return Audit(**json.loads(done.stdout))
        reason = done.stderr.strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        pass
    raise UserError(f"model.path={model.path}: not checked from this machine ({reason})")


def audit(base: Base) -> Audit:
    """Audits a base model; of random weights, only the tokenizer."""
    found, arch = Audit(), base.arch
    if base.folder is None:
        found.facts["model"] = f"{arch.name}, random weights"
    else:
        config = files.read_config(base.folder)
        found.facts["model"] = _model(arch, config)
        with found.collecting():
            _tensors(found, base, config)
        found.facts["RoPE"] = _rope(arch)
        if config.get("vision_config"):
            found.facts["pictures"] = _pictures(config)
    with found.collecting():
        ids = _vocabulary(found, base)
        if base.folder is not None:
            _stop_ids(found, base.folder, ids)
    return found


def _model(arch: Architecture, config: dict[str, Any]) -> str:
    classes = config.get("architectures")
    kind = classes[0] if isinstance(classes, list) and classes else "no class named"
    version = config.get("transformers_version")
    return f"{arch.name} ({kind}, saved by {f'transformers {version}' if version else 'an unnamed program'})"


def _tensors(found: Audit, base: Base, config: dict[str, Any]) -> None:
    arch, checkpoint = base.arch, base.checkpoint
    fitting = fit(arch, checkpoint)
    text = [full_name(fitting.prefix, name) for tensor in name_map(arch).values() for name in tensor.hf_names]
    dtypes = Counter(checkpoint.dtype(name).name for name in text)
    shards = f"{len(checkpoint.files)} file{'s' if len(checkpoint.files) > 1 else ''}"
    found.facts["tensors"] = (
        f"all {len(text):,} of the text model, as {' and '.join(sorted(dtypes))};"
        f" {len(fitting.passthrough):,} others, left as they are; in {shards}"
    )
    _parameters(found, base, fitting)
    _head(found, base, fitting, config)


def _parameters(found: Audit, base: Base, fitting: Match) -> None:
    arch, checkpoint = base.arch, base.checkpoint
    total = parameter_count(arch)
    told = f"{total:,} of the text model"
    if arch.num_experts:
        idle = (arch.num_experts - arch.experts_per_token) * 3 * arch.embed_dim * arch.expert_dim
        told += f", {total - arch.num_layers * idle:,} of them active"
    layers = f"{fitting.prefix}layers."
    others = [name for name in fitting.passthrough if name != fitting.head and not name.startswith(layers)]
    count = sum(math.prod(checkpoint.shape(name)) for name in others)
    released = _OTHER_PARAMETERS.get(arch.name)
    found.facts["parameters"] = f"{told}; {count:,} for images and audio" if count else f"{told}; text only"
    if count and released and count != released:
        found.notes.append(
            f"{base.folder}: {count:,} parameters for images and audio; {arch.name} as released has {released:,}"
        )


def _head(found: Audit, base: Base, fitting: Match, config: dict[str, Any]) -> None:
    found.facts["output matrix"] = "the embedding (tied)"
    if fitting.head is None:
        if any(part.get("tie_word_embeddings") is False for part in (config, text_config(config))):
            raise UserError(
                f"{base.folder}: config.json says tie_word_embeddings=false, but there is no lm_head.weight:"
                " transformers would initialise one at random; copy that tensor, or set it to true if none exists"
            )
        return
    rows = base.arch.vocab_size
    for row in range(0, rows, max(1, rows // _ROWS)):
        check_tied(base.checkpoint, fitting, (slice(row, row + 1), slice(None)))
    found.facts["output matrix"] = f"{fitting.head}, a copy of the embedding, judging by {_ROWS} rows"


def _rope(arch: Architecture) -> str:
    factor = f", divided by {arch.global_rope_factor:g}" if arch.global_rope_factor != 1 else ""
    return (
        f"base {arch.local_rope_base:,.0f} on sliding layers; {arch.global_rope_base:,.0f} on global ones, on"
        f" {arch.global_rope_proportion:.0%} of the head width{factor}"
    )


def _pictures(config: dict[str, Any]) -> str:
    try:
        return f"read with data.image_cache, as {vision(config).dim} features for each of their tokens"
    except UserError as refusal:
        return f"not read ({refusal})"


def _vocabulary(found: Audit, base: Base) -> dict[str, int]:
    """Checks the chat template, and that every token has an embedding; returns token → id of the tokenizer."""
    folder, arch = base.tokenizer_folder, base.arch
    if messages := files.no_tokenizer(folder, folder):
        raise UserError("\n".join(messages))
    template = files.chat_template(folder) or ""
    revision = templates.revision(template)
    found.facts["chat template"] = revision or f"not a known revision (sha256 {templates.sha256(template)})"
    if revision is None:
        found.notes.append(f"{folder}: the template is not a known revision; examples are verified all the same")
        if wrong := templates.syntax_problem(template):
            found.problems.append(f"{folder}: the chat template cannot be read ({wrong}); use the original one")
    ids = _token_ids(join(folder, files.TOKENIZER_NAME))
    size = arch.vocab_size
    if arch.per_layer_input_dim:
        size = min(size, arch.vocab_size_per_layer_input)
    found.facts["vocabulary"] = (
        f"{size:,} ids; the tokenizer knows {len(ids):,}, up to {max(ids.values(), default=0):,}"
    )
    if beyond := sorted((number, token) for token, number in ids.items() if number >= size):
        named = ", ".join(f"{token!r} {number}" for number, token in beyond[:3])
        raise UserError(
            f"{join(folder, files.TOKENIZER_NAME)}: {len(beyond):,} of its tokens have ids beyond the {size:,} rows of"
            f" the embedding ({named}{', …' if len(beyond) > 3 else ''}); use the checkpoint's own tokenizer"
            " (model.tokenizer=<folder>), or a checkpoint whose embedding was enlarged"
        )
    return ids


def _token_ids(path: str) -> dict[str, int]:
    """Token → id, from a `tokenizer.json`."""
    content = read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] in order of ids
            vocabulary = {token: number for number, (token, *_) in enumerate(vocabulary)}
        ids = {**vocabulary, **{str(token["content"]): token["id"] for token in content.get("added_tokens") or []}}
        if odd := [token for token, number in ids.items() if type(number) is not int]:
            raise ValueError(f"{odd[0]!r} has the id {ids[odd[0]]!r}")
        return ids
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a readable tokenizer ({error!r}); copy the file again") from None


def _stop_ids(found: Audit, folder: str, ids: dict[str, int]) -> None:
    """Checks the tokens at which servers and evaluations end an answer."""
    path = join(folder, files.GENERATION_NAME)
    given = read_json(path).get("eos_token_id") if files.GENERATION_NAME in list_folder(folder) else None
    stops = given if isinstance(given, list) else [] if given is None else [given]
    found.facts["stop ids"] = ", ".join(map(str, stops)) or f"none in {files.GENERATION_NAME}"
    if END_OF_TURN in ids and ids[END_OF_TURN] not in stops:
        found.notes.append(
            f"{path}: eos_token_id is {given!r}, without {END_OF_TURN} ({ids[END_OF_TURN]}): servers and evaluations"
            " would not stop at the end of a turn"
        )
