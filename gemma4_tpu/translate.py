"""`gemma4-tpu translate theirs.yaml`: a configuration of axolotl, TRL or MaxText as overrides of `train`.

    gemma4-tpu translate axolotl.yaml --devices 8

Prints the command, then every key that it leaves out, with the reason; this includes values that `train` would refuse.
`config/synonyms.py` holds the other tools' terms; docs/coming_from.md is generated from it.
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
from hydra.core.override_parser.types import Quote, QuotedString

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.lists import as_word
from gemma4_tpu.config.load import compose_all
from gemma4_tpu.config.synonyms import BY_VALUE, BY_WORD, SAME, SETTLED
from gemma4_tpu.errors import UserError, exit_code
from gemma4_tpu.train import TRAIN

ROWS = ("trainer.global_batch_sequences", "…")  # rows per device do not determine it alone
_PLACE = re.compile(r"^(/|\.|~|gs://|hf:)|\.(jsonl?|csv|tsv|parquet|arrow)(\.gz|\.zst)?$")  # not a Hub name
_PLAIN = re.compile(r"[\w./:@+-]+")


def translate(theirs: dict[str, Any], devices: int | None = None) -> tuple[list[str], dict[str, str]]:
    """Returns (overrides for `train`, {their key: why all or part of it was left out})."""
    words: dict[str, str] = {}
    left: dict[str, str] = {}
    for key, value in theirs.items():
        try:
            for word in _words(key, value, theirs, devices):
                words[word] = key  # keeps overrides yielded before a refusal
        except UserError as reason:
            left[key] = str(reason)
    switches = [theirs[key] for key in ("adapter", "use_peft") if key in theirs]
    if not any(switches or [theirs.get(key) for key in ("lora_r", "lora_rank", "r")]):  # a full fine-tune
        left |= {key: "there is no adapter" for word, key in words.items() if word.startswith("lora")}
        words = {word: key for word, key in words.items() if not word.startswith("lora")} | {"lora=none": "adapter"}
    ordered = sorted(words, key=lambda word: "." in word.partition("=")[0])  # groups first
    taken = ordered if not _refused(ordered) else []
    for word in ordered if not taken else []:
        if message := _refused([*taken, word]):
            left[words[word]] = message
        else:
            taken.append(word)
    return taken, left


def _refused(words: list[str]) -> str:
    root, _, problems = compose_all(words, TRAIN)
    return next(iter([problem.message for problem in problems] or limit_problems(TRAIN.normalise(root))), "")


def _words(key: str, value: Any, theirs: dict[str, Any], devices: int | None) -> Iterator[str]:
    """Yields the overrides for one of their keys; raises UserError with the reason where there is none."""
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    ours, _, written = (f"{SAME[key]}.{key}={{}}" if key in SAME else BY_WORD.get(key, ("", ""))[0]).partition("=")
    if value in (None, "", [], {}):
        raise UserError("empty")
    if shown in BY_VALUE.get(key, {}):
        yield BY_VALUE[key][shown]
    elif key in SETTLED:
        raise UserError(SETTLED[key])
    elif ours == "model.path":
        yield from _model(shown)
    elif ours == "data.train":
        yield from _sources(value if isinstance(value, list) else [value])
    elif (per_device := (ours, written) == ROWS or ours == "trainer.microbatches") and devices is None:
        raise UserError("counts rows per device, and the file does not give the number of devices: add --devices N")
    elif per_device and devices and ours == ROWS[0]:
        parts = [str(part) for part in (value, theirs.get("gradient_accumulation_steps") or 1)]
        if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
            raise UserError(f"{' × '.join(parts)} is not a number of rows")
        yield _word("trainer.global_batch_sequences", int(float(parts[0]) * float(parts[1]) * devices))
    elif ours == "lora.targets" and isinstance(value, list):
        yield _word(ours, [str(module).removesuffix("_proj") for module in value])
    elif key in BY_VALUE:
        raise UserError(
            "off, which is the default here" if shown == "false" else f"{shown}: not one of {', '.join(BY_VALUE[key])}"
        )
    elif written == "{}":
        if ours.startswith("tracker."):
            yield "tracker=wandb"
        yield _word(ours, value[0] if isinstance(value, list) and len(value) == 1 else value)
    else:
        raise UserError(f"no value of {ours} corresponds to {shown}" if ours else "no counterpart is known")


def _model(name: str) -> Iterator[str]:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    sizes = [size for size in ARCHITECTURES if size.startswith("gemma4") and size.replace("_", "") in plain]
    if not sizes:
        raise UserError(f"{name}: no size of Gemma 4 in that name; give model=<size> model.path=<folder>")
    yield f"model={max(sizes, key=len)}"
    if not _PLACE.search(name):
        raise UserError(f"{name} is a name, not a folder: download it, and give model.path=<folder>")
    yield _word("model.path", name)


def _sources(given: list[Any]) -> Iterator[str]:
    """Yields sources for entries of axolotl's `datasets`, or for names; `train` recognises the form of the rows."""
    yield "data=chat_jsonl"
    entries = [one if isinstance(one, dict) else {"path": one} for one in given]
    named = [(entry, entry.get("data_files") or entry.get("path")) for entry in entries]
    paths = [(entry, path) for entry, paths in named for path in (paths if isinstance(paths, list) else [paths])]
    for at, (entry, path) in enumerate(paths):
        if not path:
            raise UserError(f"{entry}: has no path")
        place = str(path) if _PLACE.search(str(path)) else f"hf:{path}"
        for ours, value in {"path": place, "subset": entry.get("name"), "split": entry.get("split")}.items():
            if value:
                yield _word(f"data.train.{at}.{ours}", value)


def _word(key: str, value: Any) -> str:
    """`key=value`; a string is quoted only where Hydra requires it, with the quotes that the shell leaves alone."""
    if isinstance(value, list):
        return f"{key}=[{','.join(_word('', item).removeprefix('=') for item in value)}]"
    if not isinstance(value, str):
        return as_word(key, value)
    return f"{key}={value if _PLAIN.fullmatch(value) else QuotedString(value, Quote.double).with_quotes()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 translated, 2 refused (one message on stderr)."""
    parser = argparse.ArgumentParser(prog="gemma4-tpu translate", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("file", type=Path, help="YAML configuration of axolotl, TRL or MaxText")
    parser.add_argument(
        "--devices", type=int, help="number of devices the configuration was written for; converts rows per device"
    )
    given = parser.parse_args(argv)
    return exit_code(lambda: _tell(given.file, given.devices))


def _tell(file: Path, devices: int | None) -> int:
    try:
        theirs = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not a readable YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(theirs, dict):
        raise UserError(f"{file}: not a mapping of keys; pass a YAML configuration of axolotl, TRL or MaxText")
    words, left = translate({str(key): value for key, value in theirs.items()}, devices)
    command = " \\\n    ".join([TRAIN.command, *map(shlex.quote, words)])
    reasons = ["Not translated:", *(f"  {key}: {reason}" for key, reason in left.items())]
    print("\n".join([command, "", *(reasons if left else ["Every key was translated."])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
