"""Code without a fence: finds modules, and what belongs to them, between lines of prose."""

from __future__ import annotations

import re

_SPACE = r"(?:\s|//[^\n]{0,400}+$|/\*(?:[^*]|\*(?!/)){0,400}+\*/)"
_NAME = rf"(?:automatic{_SPACE}++|static{_SPACE}++)?\\?[A-Za-z_][\w$]*+{_SPACE}*+"
_BEGIN = (
    rf"(?P<begin>\b(?:macro)?module{_SPACE}++{_NAME}(?:[(#;]|import\b)"
    r"|^[ \t]*(?:package\s+\w+\s*;|(?:interface|program)\s+\w+\s*[(#;]|primitive\s+\w+\s*\())"
)
_UNIT = re.compile(_BEGIN, re.MULTILINE)
_STEP = re.compile(
    rf'//[^\n]*|(?P<comment>/\*)|"(?:\\[^\n]|[^"\\\n])*+"?|\\[^ \t\n]+|{_BEGIN}'
    r"|\bend(?P<end>module|package|interface|program|primitive)\b(?:\s*:\s*\w+)?",
    re.MULTILINE,
)
_KIND = re.compile(r"module|package|interface|program|primitive")
_ITEMS = re.compile(  # what a source file contains outside of modules
    r"(?:\s|//[^\n]*+|/\*(?:[^*]|\*(?!/)){0,1000}+\*/"
    r"|^[ \t]*`define\b(?:[^\n]*\\\n)*[^\n]*|^[ \t]*`[a-z]\w*[^\n`]*+$|^[ \t]*\(\*(?!\))[^\n]*?\*\)"
    r"|^[ \t]*(?:parameter|localparam)\b[^;=]*=[^;]*;|^[ \t]*import\s+\w+::[^;]*;"
    r"|^[ \t]*time(?:unit|precision)\b[^\n]*;"
    r"|^[ \t]*typedef\b[^;{]*(?:\{[^}]*\}[^;{]*)*;"
    r"|^[ \t]*(?P<routine>function|task)\s[^;]*;(?s:.*?)\bend(?P=routine)\b(?:\s*:\s*\w+)?)++",
    re.MULTILINE,
)
_LONGEST_PREAMBLE = 4096
_QUOTED = re.compile(r"^[ \t]*>[ \t>]*(?:`|\(\*|(?:macro)?module\b)", re.MULTILINE)
_QUOTE = re.compile(r"^[ \t]*>[ \t]?", re.MULTILINE)


def unfenced_code(answer: str) -> list[tuple[str, str]]:
    """(line of prose before it, code) of each stretch of code; in the last one, a module may be cut off.

    A stretch is a series of modules, packages and the like with nothing but directives, declarations and comments
    between and before them.
    """
    if _QUOTED.search(answer):
        answer = _QUOTE.sub("", answer)
    found: list[tuple[str, str]] = []
    start, end, prose = 0, None, ""  # of the stretch so far; `end` None: there is none yet
    for begin, stop in _units(answer):
        gap = answer[end or 0 : begin]
        preamble = _preamble(gap)
        if end is None or preamble:
            if end is not None:
                found.append((prose, answer[start : end + _postamble(gap)]))
            start = (end or 0) + preamble
            prose = _last_line(gap[:preamble]) or prose
        end = stop
    if end is not None:
        found.append((prose, answer[start : end + _postamble(answer[end:])]))
    return found


def _units(text: str) -> list[tuple[int, int]]:
    """(start, end) of each module, package, …; the last one may be cut off.

    "The module x (as asked) has …" begins no module if another one begins before the next `endmodule`.
    """
    found: list[tuple[int, int]] = []
    unit, at = _UNIT.search(text), 0
    while unit:
        begin, kind, at = unit.start(), _KIND.search(unit[0]), unit.end()
        while step := _STEP.search(text, at):
            at = step.end()
            if step["comment"]:
                closed = text.find("*/", at)
                at = closed + 2 if closed >= 0 else len(text)
            elif step["begin"]:
                begin, kind = step.start(), _KIND.search(step[0])
            elif step["end"] and kind and step["end"] == kind[0]:
                found.append((begin, at))
                break
        else:
            return [*found, (begin, len(text))]
        unit = _UNIT.search(text, at)
    return found


def _preamble(gap: str) -> int:
    """Start of the directives, declarations and comments at the end of the text between two modules."""
    first = max(0, len(gap) - _LONGEST_PREAMBLE)
    return next((items.start() for items in _ITEMS.finditer(gap, first) if items.end() == len(gap)), len(gap))


def _postamble(gap: str) -> int:
    """End of the directives at the start of the text after a module."""
    items = _ITEMS.match(gap, 0, _LONGEST_PREAMBLE)
    return items.end() if items and "`" in items[0] else 0


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.split("\n")) if re.search(r"\w", line)), "")
