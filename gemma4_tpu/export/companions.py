"""A checkpoint's files besides its weights: tokenizer, chat template and stop ids, copied byte for byte;
`config.json`.
"""

from __future__ import annotations

import json

from gemma4_tpu.checkpoint_folder import INDEX_NAME, PROBE_NAME, SINGLE_NAME
from gemma4_tpu.export.place import JOURNAL, Place
from gemma4_tpu.export.trained import Trained
from gemma4_tpu.hf_config import with_both_key_sets
from gemma4_tpu.new_tokens import rewritten
from gemma4_tpu.storage import filesystem, join, list_folder, open_bytes, read_json

COPY_BYTES = 16 << 20  # copied at a time
_TOKENIZER = ("tokenizer", "chat_template", "special_tokens_map", "added_tokens", "vocab", "merges")
_OTHER_WEIGHTS = (
    ".bin",
    ".pth",
    ".pt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".safetensors",
    ".safetensors.index.json",
)


def companions(trained: Trained) -> tuple[dict[str, str], list[str]]:
    """Name → path of the files that belong to the checkpoint besides its weights, and the names of unrelated ones.

    They are the base's, except tokenizer and chat template, which come from the folder that the run used.
    """
    assert trained.base.folder is not None
    folder, tokenizer = trained.base.folder, trained.base.tokenizer_folder
    found, left = {}, []
    for name in list_folder(folder):
        if name.startswith(".") or name in trained.checkpoint.files:
            continue
        if name in (PROBE_NAME, JOURNAL):  # the base is itself a merged model, and these are about its own merge
            continue
        index = name == INDEX_NAME and SINGLE_NAME not in trained.checkpoint.files  # else it lists other files
        if (name.endswith(_OTHER_WEIGHTS) and not index) or not _is_file(join(folder, name)):
            left.append(name)
        elif tokenizer == folder or not name.startswith(_TOKENIZER):
            found[name] = join(folder, name)
    if tokenizer != folder:
        found |= {name: join(tokenizer, name) for name in list_folder(tokenizer) if name.startswith(_TOKENIZER)}
    return found, left


def copy_file(path: str, place: Place, name: str, renamed: dict[str, str]) -> None:
    """Copies a file byte for byte, except that tokenizer files get the `renamed` tokens."""
    data = open_bytes(path)
    with place.create(name) as out:
        if renamed and name.startswith(_TOKENIZER):
            out.write(rewritten(name, data.read(0, data.size_bytes), renamed))
            place.finish(name, out)
            return
        for at in range(0, data.size_bytes, COPY_BYTES):
            out.write(data.read(at, min(at + COPY_BYTES, data.size_bytes)))
        place.finish(name, out)


def write_config(path: str, place: Place) -> None:
    """Writes the base's `config.json`, with the keys of transformers before 5.15 and those of later versions."""
    text = json.dumps(with_both_key_sets(read_json(path)), indent=2, ensure_ascii=False)
    with place.create("config.json") as out:
        out.write(f"{text}\n".encode())
        place.finish("config.json", out)


def _is_file(path: str) -> bool:
    fs, place = filesystem(path)
    return bool(fs.isfile(place))
