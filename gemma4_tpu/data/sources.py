"""Locates rows: files, folders, saved and Hugging Face data sets, local or remote; and selects their split.

A source with splits gives its training rows to `data.train` and its validation (else test) rows to held-out sources,
never the other way round.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gemma4_tpu import assets
from gemma4_tpu.config.schema import DataSource
from gemma4_tpu.data.checks import HUGGING_FACE
from gemma4_tpu.data.drops import Origin
from gemma4_tpu.data.readers import READERS, RawRow, endings, read_file
from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import answering, filesystem, is_remote

HUGGING_FACE_NAME = re.compile(r"hf:([^:]+)(?::([^:/]*))?(?::([^:/]+))?")  # hf:NAME[:SPLIT] or hf:NAME:SUBSET:SPLIT
METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # written by `datasets`

TRAIN, VALIDATION, TEST = "train", "validation", "test"
WORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev", "heldout"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
"""Kind of split → its usual names, as the Hugging Face Hub recognises them in file and folder names."""
KIND_OF = {word: kind for kind, words in WORDS.items() for word in words}
WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(KIND_OF, key=len, reverse=True))})(?![a-z])")
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b.*")


@dataclass(frozen=True)
class SourcePlace:
    """The rows of one source, not yet read."""

    name: str
    """As the user wrote it."""
    split: str | None
    """The selected split; None if the source has none."""
    others: dict[str, str | None]
    """The place's other splits, name → kind (`train`, `validation`, `test`)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Path in the file system → name as the user would write it; empty for Hugging Face data sets."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Files of the folder that are not read, counted by extension."""
    store: Any = None
    hub: tuple[str, str | None] | None = None
    """(name, subset) of a Hugging Face data set."""

    def rows(self) -> Iterator[RawRow]:
        """The rows in a fixed order: files by name, rows in file order.

        Raises:
          UserError: a file is truncated or not of the format its name says, or the data set cannot be loaded.
        """
        if self.hub is not None:
            yield from _read_hugging_face(self)
        for file, name in self.files.items():
            with answering(name), self.store.open(file, "rb") as stream:
                yield from read_file(stream, name)

    def heldout_splits(self) -> list[str]:
        """The other validation splits, else the test splits; if several have that kind, the one whose name matches."""
        kinds = [[name for name, own in self.others.items() if own == kind] for kind in (VALIDATION, TEST)]
        found = next(filter(None, kinds), [])
        return [name for name in found if WORD.sub("", name) == WORD.sub("", self.split or "")] or found

    def told(self) -> list[str]:
        """What is read and what is not, for the log."""
        lines = []
        if self.split is not None or self.others:
            left = f"; not read here: {', '.join(self.others)}" if self.others else ""
            lines.append(f"{self.name}: split {self.split or '(files without a split in their name)'}{left}")
        if self.passed_over:
            counts = ", ".join(f"{count} × {ending}" for ending, count in self.passed_over.most_common())
            lines.append(f"{self.name}: {len(self.files)} files read, skipped: {counts}")
        return lines


def read_rows(path: str) -> Iterator[RawRow]:
    """The training rows of a path; see `find`."""
    return find(DataSource(path=path)).rows()


def find(source: DataSource, *, heldout: bool = False) -> SourcePlace:
    """Looks up a source and selects its split.

    Args:
      source: `path` is a file (see `readers.READERS`), a folder of them, a folder saved by `datasets`,
        `hf:NAME[:SUBSET][:SPLIT]` or `embedded:FILE`; local or with a URL scheme such as gs:// or
        hf://datasets/NAME/FILE.
      heldout: the rows are to be held out: without `source.split`, select the validation (else test) split instead of
        the training split.

    Raises:
      UserError: nothing is there, the format is unknown, or the split is missing or ambiguous.
    """
    path = source.path
    if path.startswith(HUGGING_FACE) and "://" not in path:  # hf://datasets/… is a file system path
        return _find_hugging_face(source, heldout)
    with answering(path):
        return _find_in_store(source, heldout)


def _find_in_store(source: DataSource, heldout: bool) -> SourcePlace:
    path = source.path
    store, root = filesystem(assets.resolve(path))
    if source.subset:
        root, path = f"{root.rstrip('/')}/{source.subset}", f"{path.rstrip('/')}/{source.subset}"
    if store.isdir(root):
        return _find_in_folder(store, root.rstrip("/"), path.rstrip("/"), source, heldout)
    if not store.exists(root):
        raise UserError(f"{path}: no such file or folder")
    if source.split:
        raise UserError(f"{path}: split={source.split}: a single file has no splits; leave it out")
    if endings(root)[0] is None:
        raise UserError(f"{path}: unknown format; rows come from {', '.join(READERS)}, each also as .gz and .zst")
    return SourcePlace(path, None, {}, {root: path}, store=store)


def _find_in_folder(store: Any, root: str, path: str, source: DataSource, heldout: bool) -> SourcePlace:
    splits: dict[str | None, list[str]] = {}
    passed_over: Counter[str] = Counter()
    if not is_remote(path):
        _list_all(root)
    for file in sorted(store.find(root)):
        inside = file[len(root) :].lstrip("/")
        parts = inside.split("/")
        if any(part.startswith((".", "_")) for part in parts):
            passed_over["hidden"] += 1
        elif endings(file)[0] is None or parts[-1] in METADATA or re.fullmatch(r"cache-\w+\.arrow", parts[-1]):
            ending = re.search(r"(\.[^./]*)(\.gz|\.zst)?$", parts[-1])
            passed_over[parts[-1] if parts[-1] in METADATA else ending[0] if ending else "(no ending)"] += 1
        else:
            splits.setdefault(_split_of(parts, source.split), []).append(file)
    if not splits:
        told = f" (it holds {', '.join(f'{n} × {ending}' for ending, n in passed_over.items())})" if passed_over else ""
        raise UserError(f"{path}: the folder contains no {', '.join(READERS)} file, nor a .gz or .zst of one{told}")
    chosen = _choose(splits, source.split, heldout, path)
    others = {name: kind_of(name) for name in splits if name is not None and name != chosen}
    if chosen is not None and None in splits:
        passed_over["files without a split in their name"] += len(splits[None])
    files = {file: path + file[len(root) :] for file in splits[chosen]}
    return SourcePlace(path, chosen, others, files, passed_over, store)


def _list_all(root: str) -> None:
    """Raises the OSError of a folder that can't be listed, which fsspec would take for an empty one."""

    def refuse(error: OSError) -> None:
        raise error

    for _ in os.walk(root, onerror=refuse):
        pass


def _split_of(parts: list[str], wanted: str | None) -> str | None:
    """The split of a file: the wanted one by name, else the one named by the last part of its path that names any."""
    shard = SHARD.match(parts[-1])
    if wanted and (wanted in parts[:-1] or (shard and shard[1] == wanted)):
        return wanted
    if shard and kind_of(shard[1]) is not None:
        return shard[1]
    if (kind := kind_of(parts[-1])) is not None:
        return kind
    return next((part for part in reversed(parts[:-1]) if kind_of(part) is not None), None)


def kind_of(name: str | None) -> str | None:
    """`train`, `validation` or `test` for a split of this name; None if the name says nothing."""
    words = WORD.findall((name or "").lower())
    return KIND_OF[words[-1]] if words else None


def _choose(names: Iterable[str | None], wanted: str | None, heldout: bool, path: str) -> str | None:
    """Selects the wanted split, else one by kind; without training splits, names of no kind count as training rows."""
    of_kind: dict[str | None, list[str | None]] = {}
    for name in names:
        of_kind.setdefault(kind_of(name), []).append(name)
    every = [name for some in of_kind.values() for name in some]
    listed = ", ".join(name for name in every if name) or "none"
    if wanted:
        fitting = [wanted] if wanted in every else of_kind.get(KIND_OF.get(wanted.lower(), wanted), [])
        if not fitting:
            raise UserError(f"{path}: no split {wanted} (there are: {listed})")
    elif heldout:
        fitting = of_kind.get(VALIDATION) or of_kind.get(TEST) or (every if of_kind.keys() == {None} else [])
    else:
        fitting = of_kind.get(TRAIN) or of_kind.get(None) or []
    if len(fitting) != 1:
        trouble = (
            "several splits could be meant" if fitting else f"no split can be {'held out' if heldout else 'trained on'}"
        )
        raise UserError(
            f"{path}: {trouble} (there are: {listed}); name one next to the path: {{path: '{path}', split: <name>}}"
        )
    return fitting[0]


def _find_hugging_face(source: DataSource, heldout: bool) -> SourcePlace:
    import datasets

    parts = HUGGING_FACE_NAME.fullmatch(source.path)
    if parts is None:
        raise UserError(f"{source.path}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:SUBSET:SPLIT")
    name, first, second = parts.groups()
    subset, split = (first, second) if second else (None, first)
    subset, split = source.subset or subset or None, source.split or split or None
    with _hub_errors(source.path):
        names = datasets.get_dataset_split_names(name, subset)
    chosen = _choose(names, split, heldout, source.path)
    others = {one: kind_of(one) for one in names if one != chosen}
    return SourcePlace(source.path, chosen, others, hub=(name, subset))


def _read_hugging_face(place: SourcePlace) -> Iterator[RawRow]:
    import datasets

    assert place.hub is not None
    with _hub_errors(place.name):
        dataset = datasets.load_dataset(place.hub[0], place.hub[1], split=place.split, trust_remote_code=False)
        for name, feature in dataset.features.items():  # as files, so that our own limits and hashes apply
            kept = _undecoded(feature)
            dataset = dataset if kept is feature else dataset.cast_column(name, kept)
    for number, value in enumerate(dataset, start=1):
        yield RawRow(Origin(place.name, number), value, columnar=True)


def _undecoded(feature: Any) -> Any:
    """A column's type with pictures left as bytes and paths; unchanged if it has none."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        kept = _undecoded(feature.feature)
        return feature if kept is feature.feature else type(feature)(kept)
    if isinstance(feature, dict):
        inside = {name: _undecoded(one) for name, one in feature.items()}
        return feature if all(inside[name] is one for name, one in feature.items()) else inside
    return feature


@contextmanager
def _hub_errors(path: str) -> Iterator[None]:
    """The Hub client raises many kinds of errors; each means that this name gives no rows."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path}: cannot load the data set ({type(error).__name__}: {error})") from error
