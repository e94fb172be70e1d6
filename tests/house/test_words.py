"""CONTRIBUTING's "Words": phrases that its list replaces are in no page, recipe, message, docstring or comment."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.house.scripts import ROOT

PHRASES = {
    r"(go|goes|went|going|gone) on (with|from|where|after)": "resume, continue",
    r"(same command|study|run) goes on": "resumes, continues",
    r"(a|one|each|every|another|the|this|that|its) training (is|was|has|had|ends|ended|that|which|learns|diverged)":
        "a training run",
    r"of (a|each|every|one|another) training\b(?! (run|step|row|set|job|process|loop))": "a training run",
    r"trainings": "training runs",
    r"to the bit|the same bits|in the same bits": "bit-identical",
    r"(lie|lies|lay|stand|stands|stood) (in|on|at|there|beside|behind|under|beneath)": "be, be in, exist",
    r"beside (the|its|their|a|it|them|each)\b": "compared with, alongside, next to",
    r"of (one|a kind)'?s? (of its )?own|of a kind of its own": "your own, a custom …",
    r"slice that is not (here|there)": "without TPU hardware",
    r"under the eyes": "with a stall watchdog",
    r"remed(y|ies)": "a fix",
    r"otherwise than": "differently from",
    r"likewise": "the number, the fact itself",
    r"without a word": "silently",
    r"passed over": "skipped",
    r"(is|are) no (object|JSON|list|folder|number|name|record|text|plan|key|pair)s?": "is not a …",
    r"(server|run|row|rows|file|function|model|problem)s? of (yours|theirs)": "your own …",
    r"for good": "permanently",
    r"held against": "compared with",
    r"under way": "in progress",
    r"the very (same|ids|numbers|values)": "exactly the same",
    r"what (comes|came|becomes|became) of (it|them|this|that|the|a)": "the result of, what happened to",
    r"(text|data|answers?|tensors?|it) (is|are) told": "given, reported",
}  # fmt: skip
"""Phrase → what to write instead; the longer list, for people, is in CONTRIBUTING.md."""
_BANNED = {re.compile(rf"\b({phrase})\b", re.I): instead for phrase, instead in PHRASES.items()}
_QUOTED = re.compile(r"```.*?```|`[^`]*`", re.S)


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of what users read: pages, comments of recipes, messages."""
    for pattern in ("README.md", "docs/**/*.md", "examples/*.md", "experiments/*/README.md", "benchmarks/*.md"):
        for path in ROOT.glob(pattern):
            yield str(path.relative_to(ROOT)), _QUOTED.sub("", path.read_text(encoding="utf-8"))
    for path in ROOT.glob("conf/**/*.yaml"):
        lines = [line.strip("# ") for line in path.read_text(encoding="utf-8").splitlines() if "#" in line]
        yield str(path.relative_to(ROOT)), "\n".join(lines)
    for path in ROOT.glob("gemma4_tpu/**/*.py"):
        for line, said in messages(path):
            yield f"{path.relative_to(ROOT)}:{line}", said
    for pattern in ("gemma4_tpu/**/*.py", "benchmarks/*.py", "experiments/**/*.py", "launch/*.py"):
        for path in ROOT.glob(pattern):
            for line, said in explanations(path):
                yield f"{path.relative_to(ROOT)}:{line}", _QUOTED.sub("", said)


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of a module's strings of several words, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        said = node.value if isinstance(node, ast.Constant) and id(node) not in statements else None
        if isinstance(said, str) and " " in said:
            yield node.lineno, said


def explanations(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of a module's docstrings and comments."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        said = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
        if isinstance(said, str):
            yield node.lineno, said
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def test_no_text_uses_a_phrase_that_the_list_replaces():
    found = [
        f"{where}: {' '.join(match[0].split())!r} → {instead}"
        for where, text in texts()
        for phrase, instead in _BANNED.items()
        if (match := phrase.search(text))
    ]
    assert found == []
