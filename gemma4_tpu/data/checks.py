"""Checks of `data=` before JAX starts: known form, existing sources, sensible lengths."""

from __future__ import annotations

from gemma4_tpu.config.limits import MAX_WEIGHT
from gemma4_tpu.config.paths import local_place, sibling
from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.forms import AUTO, FORMS

CHOICES = {"data.format": (AUTO, *FORMS)}
HUGGING_FACE = "hf:"


def data_problems(data: DataConfig) -> list[str]:
    """Problems with rows and packing, as far as local files show."""
    messages = []
    if not data.train:
        messages.append("data.train=[]: no training rows; give data.train='[{path: rows.jsonl}]'")
    for split, sources in (("train", data.train), ("heldout", data.heldout)):
        for index, source in enumerate(sources):
            messages += source_problem(f"data.{split}.{index}", source)
    if data.buckets is not None:
        if data.packing != "buckets":
            messages.append(f"data.buckets={data.buckets}: only with data.packing=buckets (it is {data.packing})")
        if not data.buckets or any(not 2 <= bucket <= data.sequence_length for bucket in data.buckets):
            messages.append(
                f"data.buckets={data.buckets}: needs lengths between 2 and data.sequence_length={data.sequence_length}"
            )
    if data.image_cache is not None:
        messages += cache_messages(f"data.image_cache={data.image_cache}", data.image_cache)
    if data.check_syntax and data.format != "codev_r1":
        messages.append(f"data.check_syntax=true: only with data.format=codev_r1 (it is {data.format})")
    return messages


def cache_messages(said: str, folder: str) -> list[str]:
    """What is wrong with the place of pictures' features; `said` is how it was given."""
    place, messages = local_place(said, folder)
    return [*messages, f"{said}: is a file; give a folder"] if place is not None and place.is_file() else messages


def source_problem(key: str, source: DataSource) -> list[str]:
    """Problems with one data source; `key` is its place, such as `data.train.0`."""
    fits = 0 < source.weight <= MAX_WEIGHT
    messages = [] if fits else [f"{key}.weight={source.weight}: must be more than 0 and at most {MAX_WEIGHT}"]
    path = source.path
    if not path:
        return [
            *messages,
            f"{key}.path is empty; give {key}.path=<rows.jsonl, .json, .csv, .parquet, a folder or hf:NAME>",
        ]
    if path.startswith(HUGGING_FACE) and "://" not in path:
        wanted = f"{key}.path={path}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:SUBSET:SPLIT"
        return messages if path != HUGGING_FACE else [*messages, wanted]
    place, found = local_place(f"{key}.path={path}", path)
    messages += found
    if place is not None and not place.exists():
        hub = f"; a Hugging Face data set is written hf:{path}" if path.count("/") == 1 and not place.suffix else ""
        messages.append(f"{key}.path={path}: no such file or folder{sibling(place)}{hub}")
    elif place is not None and place.is_file() and (source.split or source.subset):
        given = "split" if source.split else "subset"
        messages.append(
            f"{key}.{given}={getattr(source, given)}: {path} is a single file, which has none; leave it out"
        )
    elif place is not None and source.subset and not (place / source.subset).is_dir():
        messages.append(f"{key}.subset={source.subset}: no such folder in {path}{sibling(place / source.subset)}")
    return messages
