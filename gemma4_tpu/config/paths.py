"""Paths and names that a configuration gives: one spelling, where they lie, and what is wrong with them.

Looks at local files only: what is on gs:// or in a Hugging Face data set shows when it is read.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from typing import Any

from gemma4_tpu import assets
from gemma4_tpu.errors import UserError
from gemma4_tpu.redact import redact

GCS = "gs://"


def at_home(path: str | None) -> Any:
    """A path with `~` written out; nothing stays nothing."""
    return str(Path(path).expanduser()) if path and path.startswith("~") else path


def folder_of(path: str | None) -> Any:
    """The same without a slash at the end."""
    return at_home(path).rstrip("/") or "/" if path else path


def name_problem(name: str) -> list[str]:
    """What is wrong with `name=`, if anything."""
    if redact(name) != name:
        return ["name: holds a secret, and a folder is called after it; give another name"]
    if re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
        return []
    return [f"name={name}: part of a folder's name; letters, digits and . _ + - only"]


def secret_place(run_dir: str | None) -> list[str]:
    """What is wrong with a run folder that is called after a secret."""
    return (
        ["run_dir: holds a secret, and a folder's name is seen by all; give another"]
        if run_dir and redact(run_dir) != run_dir
        else []
    )


def local_place(given: str, path: str) -> tuple[Path | None, list[str]]:
    """Where a local or embedded path lies; None for gs:// and the like, whose files show when they are read."""
    if path.startswith(GCS) and importlib.util.find_spec("gcsfs") is None:
        return None, [f"{given}: gs:// needs gcsfs; pip install 'gemma4-tpu[gcp]'"]
    if "://" in path:
        return None, []
    try:
        return Path(assets.resolve(path)).expanduser(), []
    except UserError as error:
        return None, [f"{given.split('=')[0]}={error}"]


def local_folder(given: str, path: str) -> tuple[Path | None, list[str]]:
    """The local folder behind `path`; None for one that is not local."""
    place, messages = local_place(given, path)
    if place is None or messages:
        return None, messages
    if place.is_dir():
        return place, []
    what = "is a file, not a folder" if place.exists() else f"no such folder{sibling(place)}"
    advice = "give a local or gs:// folder, or embedded:tiny"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        advice = f"if that is a model's name, download it first: hf download {path} --local-dir <folder>"
    return None, [f"{given}: {what}; {advice}"]


def remote_problem(given: str, path: str) -> list[str]:
    """What is wrong with the address of a run folder that is not local, if anything."""
    if not path.startswith(GCS) or not path.removeprefix(GCS).strip("/"):
        return [f"{given}: a run folder is local or on gs://<bucket>/<folder>"]
    return local_place(given, path)[1]


def sibling(place: Path) -> str:
    """A hint at what is next to a place that does not exist."""
    try:
        names = [entry.name for entry in place.parent.iterdir()]
    except OSError:
        return f" (nor is there a folder {place.parent})"
    near = difflib.get_close_matches(place.name, names, n=1)
    return f"; did you mean {place.parent / near[0]}?" if near else ""
