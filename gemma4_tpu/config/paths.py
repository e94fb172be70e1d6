"""Paths and names in a configuration: their canonical spelling, their location, and problems with them.

Checks local files only; problems on gs:// or in a Hugging Face data set show when these are read.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gemma4_tpu import assets
from gemma4_tpu.errors import UserError
from gemma4_tpu.redact import redact

GCS = "gs://"
_SCHEMES = ("gs", "hf", "s3", "file", "https?")


def at_home(path: str | None) -> Any:
    """A path with `~` expanded; empty stays empty."""
    return str(Path(path).expanduser()) if path and path.startswith("~") else path


def folder_of(path: str | None) -> Any:
    """A path with `~` expanded and without a slash at the end."""
    return at_home(path).rstrip("/") or "/" if path else path


def not_unicode(text: str) -> str | None:
    """The refusal of a word or path with bytes that this locale can't decode; None: there are none.

    Python passes such bytes on as lone surrogates, which neither records nor the libraries that write checkpoints take.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="backslashreplace").decode()
        return f"{shown}: not UTF-8; give another name, or, if only this machine's locale is not UTF-8, PYTHONUTF8=1"
    return None


def name_problem(name: str) -> list[str]:
    """Problems with `name=`."""
    if redact(name) != name:
        return ["name: contains a secret, and names a folder; give another name"]
    if re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
        return []
    return [f"name={name}: part of a folder's name; give letters, digits and . _ + - only"]


def address_problems(key: str, url: str, example: str) -> list[str]:
    """Problems with the base URL of a server. `example`: one that would do."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half of an IPv6 address
        whole = False
    if whole and not parts.query and not parts.fragment and not re.search(r"\s", url):
        return []
    return [f"{key}={url}: not a server address; give its base URL, such as {example}"]


def secret_place(run_dir: str | None) -> list[str]:
    """Problems with a run folder whose name contains a secret."""
    return (
        ["run_dir: contains a secret, and everyone can see a folder's name; give another"]
        if run_dir and redact(run_dir) != run_dir
        else []
    )


def one_slash(values: Any, key: str = "") -> list[str]:
    """Problems with `gs:/bucket/run` and `gs//bucket/run`, which would be folders on this machine.

    Args:
      values: a configuration, as dicts and lists.
      key: of `values`, dotted.
    """
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return [problem for name, value in items for problem in one_slash(value, f"{key}.{name}" if key else str(name))]
    found = re.match(rf"({'|'.join(_SCHEMES)})(:/(?!/)|//)", values) if isinstance(values, str) else None
    if found is None:
        return []
    return [f"{key}={values}: an address is written {found[1]}://; give {key}={found[1]}://{values[found.end() :]}"]


def local_place(given: str, path: str) -> tuple[Path | None, list[str]]:
    """Location of a local or embedded path; None for gs:// and the like, whose problems show on reading."""
    if path.startswith(GCS) and importlib.util.find_spec("gcsfs") is None:
        return None, [f"{given}: gs:// needs gcsfs; run pip install 'gemma4-tpu[gcp]'"]
    if "://" in path:
        return None, []
    try:
        return Path(assets.resolve(path)).expanduser(), []
    except UserError as error:
        return None, [f"{given.split('=')[0]}={error}"]


def local_folder(given: str, path: str) -> tuple[Path | None, list[str]]:
    """The local folder of `path`; None if it is not local."""
    place, messages = local_place(given, path)
    if place is None or messages:
        return None, messages
    if place.is_dir():
        return place, []
    advice = "give a local or gs:// folder, or embedded:tiny"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        advice = f"if that is a model's name, download it first: hf download {path} --local-dir <folder>"
    return None, [f"{given}: {no_folder(place)}; {advice}"]


def remote_problem(given: str, path: str) -> list[str]:
    """Problems with the address of a remote run folder."""
    if not path.startswith(GCS) or not path.removeprefix(GCS).strip("/"):
        return [f"{given}: give a local run folder, or one on gs://<bucket>/<folder>"]
    return local_place(given, path)[1]


def no_folder(place: Path) -> str:
    """Why a place is not a folder, in words."""
    return "is a file, not a folder" if place.exists() else f"no such folder{sibling(place)}"


def sibling(place: Path) -> str:
    """A hint about the neighbours of a place that does not exist."""
    try:
        names = [entry.name for entry in place.parent.iterdir()]
    except OSError:
        return f" (nor is there a folder {place.parent})"
    near = difflib.get_close_matches(place.name, names, n=1)
    return f"; did you mean {place.parent / near[0]}?" if near else ""
