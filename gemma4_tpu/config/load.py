"""Turns a command line into a typed, checked configuration, before JAX is imported.

Hydra composes `conf/` onto the dataclasses of `schema.py`. Every word of the command line is first tried on its own, so
one message can list all problems.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, cast

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import gemma4_tpu
from gemma4_tpu.config import recorded
from gemma4_tpu.config.conf import composing, config_dir, defaults, groups_of
from gemma4_tpu.config.entry import Checks, EntryPoint, Root
from gemma4_tpu.config.help import help_text
from gemma4_tpu.config.hydra_flags import of_one_run, search_path, serve, with_config_dir
from gemma4_tpu.config.keys import field_types, unknown_key
from gemma4_tpu.config.lists import extended
from gemma4_tpu.config.overrides import Groups, check_file, check_overrides, groups_in, one_length
from gemma4_tpu.config.paths import not_unicode, one_slash, secret_place
from gemma4_tpu.config.refusals import Refusal, refusal
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.config.values import empty_keys
from gemma4_tpu.errors import UserError, bad_place, tell


@dataclass(frozen=True)
class Loaded(Generic[Root, Checks]):
    """A configuration that passed every check."""

    root: Root
    overrides: list[str]
    """The `key=value` words of the command line, as composed."""
    checked: Checks


def load(argv: list[str], entry: EntryPoint[Root, Checks]) -> Loaded[Root, Checks]:
    """Reads the command line of an entry point (without the program's name).

    `--help`, `--version` and Hydra's own flags (`--cfg`, `--info`, `--multirun`, …) are served here and end the
    process.

    Raises:
      UserError: lists every problem of the command line, the files it selects, and their values.
      SystemExit: a flag was served.
    """
    try:
        return _load(argv, entry)
    except OSError as error:
        if (where := bad_place(error)) is None:
            raise
        told = next((word for word in argv if _is_about(word, str(error.filename))), None)
        where = f"{told}: {error.strerror}" if told is not None else where
        raise UserError(
            f"{where}; give another path, or allow access to it\n({entry.command} --help lists every key)"
        ) from None


def _is_about(word: str, place: str) -> bool:
    """Whether a word of the command line gives this path, or a folder above it."""
    value = word.partition("=")[2].strip("'\"")
    return bool(value) and Path(place).absolute().is_relative_to(Path(value).expanduser().absolute())


def _load(argv: list[str], entry: EntryPoint[Root, Checks]) -> Loaded[Root, Checks]:
    if odd := [problem for word in argv if (problem := not_unicode(word)) is not None]:
        raise refusal([Refusal(problem) for problem in odd])
    given, flags, passed_on = _split(argv, entry)
    if flags is not None and flags.shell_completion:  # its words are not keys
        serve(entry, ["--shell-completion"], flags.overrides)
    words = [entry.in_full(word) for word in given]
    if flags is None or not flags.multirun:
        words = of_one_run(words, entry.schema)
    composed, good, problems = compose_all(words, entry, multirun=bool(flags and flags.multirun))
    if flags is not None and not problems:
        serve(entry, passed_on, good if flags.multirun else [*good, *one_length(good)])
    checked = None
    if composed is not None and flags is None:
        problems += [Refusal(f"{key}=: empty; give a value, or {key}=null", (key,)) for key in empty_keys(composed)]
        root = entry.normalise(composed)
        checked, found = entry.examine(root)
        found += [Refusal(problem) for problem in secret_place(getattr(root, "run_dir", None))]
        found += [Refusal(problem) for problem in one_slash(asdict(cast(Any, root)))]
        problems += [p for p in found if not any(earlier.clouds(p.message) for earlier in problems)]
    if problems or checked is None:
        raise UserError(f"{refusal(problems)}\n({entry.command} --help lists every key)")
    return Loaded(root, good, checked)


def compose_all(words: list[str], entry: EntryPoint, *, multirun: bool = False) -> tuple[Any, list[str], list[Refusal]]:
    """Composes the valid words; returns (root dataclass or None, those words, problems of the others)."""
    options, folders = groups_of(entry), search_path(words)
    for folder in filter(None, folders):
        for group, added in groups_in(folder).items():
            if group in options:
                options[group] += [option for option in added if option not in options[group]]
    groups = Groups(options, open=None in folders)
    good, problems = check_overrides(words, schema=entry.schema, groups=groups, multirun=multirun)
    if multirun:
        return None, extended(good, entry.schema, lambda some: defaults(entry, some)), problems
    name, taken = entry.name, [*good, *one_length(good)]
    # `good` is what the user wrote, which is recorded; `taken` is what Hydra composes for it.
    if (run := recorded.replayed(good, entry.schema)) is not None:
        started, found = recorded.start_from(run, entry.name, entry.schema, lambda: defaults(entry))
        taken, refused = recorded.over_recorded(taken, groups)
        if started is None or refused:
            return None, good, problems + found + refused
        name = started
    with composing(entry) as compose:
        try:
            taken = extended(taken, entry.schema, lambda some: compose(name, overrides=some))
            root = OmegaConf.to_object(compose(name, overrides=taken))
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            found = _file_problems(good, entry, groups, [config_dir(), *filter(None, folders)])
            return None, good, problems + (found or [Refusal(_plain(error, entry.schema))])
    return root, good, problems


def to_yaml(root: Any) -> str:
    """The resolved configuration as YAML, with every key."""
    return OmegaConf.to_yaml(OmegaConf.structured(root))


def from_yaml(text: str, schema: type = TrainRoot) -> Any:
    """The inverse of `to_yaml`.

    Raises:
      UserError: keys are not in the schema, or values have another type; names all of them.
    """
    try:
        content = OmegaConf.create(text)
    except (YAMLError, RecursionError) as error:
        raise UserError(f"config.yaml: damaged, not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, DictConfig):
        raise UserError("config.yaml: contains a list instead of keys; copy the file again")
    problems = check_file(content, label="config.yaml", prefix="", schema=schema)
    if problems:
        raise refusal(problems)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), content))


def _split(argv: list[str], entry: EntryPoint) -> tuple[list[str], Any, list[str]]:
    """(`key=value` words, flags for Hydra or None, the flags as written); serves --help and --version itself."""
    if not any(word.startswith("-") for word in argv):
        return argv, None, []
    if "--version" in argv:
        _tell(f"gemma4-tpu {gemma4_tpu.__version__}")
    if "--help" in argv or "-h" in argv:
        _tell(help_text(entry))
    parser = get_args_parser()
    parser.exit_on_error = parser.allow_abbrev = False  # `--multi` is a misspelling, `--config` not a flag of Hydra
    argv = _joined(argv, {flag for action in parser._actions for flag in action.option_strings})
    try:
        flags, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} ({entry.command} --help)") from None
    words = [*flags.overrides, *rest]
    written = [word for word in argv if word not in words]
    if flags.config_dir is not None:
        written = [w for w in written if w != flags.config_dir and not w.startswith(("--config-dir", "-cd"))]
        words = with_config_dir(flags.config_dir, words)
    if not (flags.multirun or flags.cfg or flags.info or flags.hydra_help or flags.shell_completion):
        if written:
            raise UserError(f"{' '.join(written)}: not supported; extend conf/ with --config-dir <folder>")
        return words, None, []
    return words, flags, written


def _joined(argv: list[str], flags: Collection[str]) -> list[str]:
    """The words, with `--lr 1e-4` as `--lr=1e-4`, so that it is one mistake, not two. `flags`: Hydra's, left as they
    are.
    """
    words: list[str] = []
    for word in argv:
        last = words[-1] if words else ""
        a_value = "=" not in word and (not word.startswith("-") or word[1:2].isdigit())
        if a_value and last.strip("-") and last.startswith("-") and "=" not in last and last not in flags:
            words[-1] = f"{last}={word}"
        else:
            words.append(word)
    return words


def _tell(text: str) -> NoReturn:
    """Prints the requested text and ends the process."""
    tell(text)
    raise SystemExit(0)


def _file_problems(words: list[str], entry: EntryPoint, groups: Groups, folders: list[Path]) -> list[Refusal]:
    """Finds problems in the files that the words select, when composing them failed."""
    chosen = [("local", "default")]
    for word in words:
        override = OverridesParser.create().parse_override(word)
        option = override.value()
        if override.key_or_group in groups.options and isinstance(option, str):
            chosen.append((override.key_or_group, option))
    problems = []
    schema: type = entry.schema
    for group, option in chosen:
        path = next((p for folder in folders if (p := folder / group / f"{option}.yaml").is_file()), None)
        if path is None:
            continue
        label = f"{group}/{path.name}"
        try:
            content = OmegaConf.load(path)
        except (YAMLError, OmegaConfBaseException) as error:
            problems.append(Refusal(f"{label}: {' '.join(str(error).split())}"))
            continue
        if not isinstance(content, DictConfig):
            continue
        values = OmegaConf.create({key: value for key, value in content.items() if key != "defaults"})
        prefix = group if group in field_types(schema) else ""  # experiment and local contain changes to the whole tree
        problems += check_file(values, label=label, prefix=prefix, schema=schema)
    return problems


def _plain(error: Exception, schema: type) -> str:
    """An error of Hydra or OmegaConf on one line, without their internals."""
    text = str(error)
    item = re.search(r"Error merging override \+*((\S+?)\.(\d+)\S*)", text)
    if item:
        word, key, index = item.groups()
        return f"{word}: {key} has no item {index}; write the whole list: '{key}=[…]'"
    chain = [error, error.__cause__, error.__context__]
    key = next((found[1] for e in chain if (found := re.search(r"full_key: (\S+)", str(e)))), "")
    key = re.sub(r"\[(\d+)\]", r".\1", key)  # of a list, as we write it
    file = re.match(r"In '([^']+)'", text)
    where = f"{file[1]}.yaml: " if file else ""
    message = unknown_key(schema, key) if key else None
    if message:
        return f"{where}{key}: {message}"
    lines = [line.strip() for line in text.splitlines()]
    internals = ("full_key", "object_type", "reference_type", "In '")
    told = " ".join(line for line in lines if not line.startswith(internals))
    told = re.sub(r"^\w+ raised while resolving interpolation: ", "", told)
    return f"{where}{key + ': ' if key else ''}{told}"
