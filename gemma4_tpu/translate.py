"""`gemma4-tpu translate theirs.yaml`: a configuration of axolotl, TRL or MaxText as overrides of `train`.

    gemma4-tpu translate axolotl.yaml --devices 8

Prints the command, then every key that is not in it, with the reason. Nothing is guessed, and values that `train` would
refuse are listed as well. `config/synonyms.py` holds most of their words; docs/coming_from.md is made from both.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.lists import as_word
from gemma4_tpu.config.load import compose_all
from gemma4_tpu.config.synonyms import BY_VALUE, BY_WORD, SAME, SETTLED
from gemma4_tpu.errors import UserError, exit_code
from gemma4_tpu.train import TRAIN

MODELS = ("base_model", "model_name_or_path", "model_name")
ROWS = ("micro_batch_size", "per_device_train_batch_size", "per_device_batch_size")
ACCUMULATION = "gradient_accumulation_steps"
_LORA = {"adapter", "use_peft", "lora_r", "lora_rank", "load_in_4bit"}
_PLACE = re.compile(r"^(/|\.|~|gs://|hf:)|\.(jsonl?|csv|tsv|parquet|arrow)(\.gz|\.zst)?$")
"""A file or folder, where a name could stand."""


def translate(theirs: dict[str, Any], devices: int | None = None) -> tuple[list[str], dict[str, str]]:
    """(words for `train`, their key → why it, or part of it, is not among them)."""
    full = not any(theirs.get(key) for key in _LORA)  # without an adapter they train all weights
    words: dict[str, str] = {"lora=none": "no adapter"} if full else {}
    left: dict[str, str] = {}
    for key, value in theirs.items():
        try:
            for word in _words(key, value, theirs, devices):
                words[word] = key  # those before a reason are kept
        except UserError as reason:
            left[key] = str(reason)
    for word, key in list(words.items()) if _refused(list(words)) else []:  # which of them?
        if message := _refused([word]):
            left[key] = message
            del words[word]
    return sorted(words, key=lambda word: "." in word.partition("=")[0]), left  # groups first


def _refused(words: list[str]) -> str:
    root, _, problems = compose_all(words, TRAIN)
    return next(iter([problem.message for problem in problems] or limit_problems(TRAIN.normalise(root))), "")


def _words(key: str, value: Any, theirs: dict[str, Any], devices: int | None) -> Iterator[str]:
    """Raises: UserError: why there are none."""
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    ours, _, written = BY_WORD.get(key, ("", ""))[0].partition("=")
    if value in (None, "", [], {}):
        raise UserError("empty")
    if shown in BY_VALUE.get(key, {}):
        yield BY_VALUE[key][shown]
    elif key in SETTLED:
        raise UserError(SETTLED[key])
    elif key in MODELS:
        yield from _model(shown)
    elif ours == "data.train" or key == "hf_path":
        yield "data=chat_jsonl"
        for at, source in enumerate(value if isinstance(value, list) else [value]):
            yield from _source(f"data.train.{at}", source)
    elif key in (*ROWS, ACCUMULATION) and devices is None:
        raise UserError("counts per device, and the file does not say how many there were: give --devices N")
    elif key in ROWS and devices:
        rows = float(shown) * int(theirs.get(ACCUMULATION) or 1) * devices
        yield _word("trainer.global_batch_sequences", int(rows))
    elif ours == "lora.targets" and isinstance(value, list):
        yield _word(ours, [str(module).removesuffix("_proj") for module in value])
    elif key in BY_VALUE:
        raise UserError(
            "off, as here" if shown == "false" else f"{shown}: only {', '.join(BY_VALUE[key])} can be translated"
        )
    elif key in SAME:
        yield _word(f"{SAME[key]}.{key}", value)
    elif written == "{}":
        if ours.startswith("tracker."):
            yield "tracker=wandb"
        yield _word(ours, value[0] if isinstance(value, list) and len(value) == 1 else value)
    else:
        raise UserError(f"does not follow from {shown}: see {ours}" if ours else "no counterpart is known")


def _model(name: str) -> Iterator[str]:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    sizes = [size for size in ARCHITECTURES if size.startswith("gemma4") and size.replace("_", "") in plain]
    if not sizes:
        raise UserError(f"{name}: no size of Gemma 4 in that name; give model=<size> model.path=<folder>")
    yield f"model={max(sizes, key=len)}"
    if not _PLACE.search(name):
        raise UserError(f"{name} is a name, not a folder: download it, and give model.path=<folder>")
    yield _word("model.path", name)


def _source(key: str, source: Any) -> Iterator[str]:
    """One entry of axolotl's `datasets`, or a name; the form of the rows is recognised by their keys."""
    entry = source if isinstance(source, dict) else {"path": source}
    path = str(entry.get("data_files") or entry.get("path"))
    yield _word(f"{key}.path", path if _PLACE.search(path) else f"hf:{path}")
    for theirs, ours in (("name", "subset"), ("split", "split")):
        if entry.get(theirs):
            yield _word(f"{key}.{ours}", entry[theirs])


def _word(key: str, value: Any) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[\w./:@+-]+", value)
    return f"{key}={value}" if plain else as_word(key, value).replace("'", "" if isinstance(value, list) else "'")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 translated, 2 refused (one message on stderr)."""
    parser = argparse.ArgumentParser(prog="gemma4-tpu translate", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("file", type=Path, help="YAML of axolotl, TRL or MaxText")
    parser.add_argument("--devices", type=int, help="devices that the configuration was for: scales rows per device")
    given = parser.parse_args(argv)
    return exit_code(lambda: _tell(given.file, given.devices))


def _tell(file: Path, devices: int | None) -> int:
    try:
        theirs = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not a readable YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(theirs, dict):
        raise UserError(f"{file}: holds no keys; give a configuration of axolotl, TRL or MaxText")
    words, left = translate({str(key): value for key, value in theirs.items()}, devices)
    print(" \\\n    ".join([TRAIN.command, *map(shlex.quote, words)]))
    print("\nNot translated:" if left else "\nEvery key is translated.")
    for key, reason in left.items():
        print(f"  {key}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
