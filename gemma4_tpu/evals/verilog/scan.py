"""What a design may not contain, seen in its text with comments and strings blanked out."""

from __future__ import annotations

import re

# Everything else that begins with `$` reaches out of the design: files, the simulation's end, the bench's random
# numbers, command-line arguments, names and values elsewhere.
_SYSTEM_TASKS = """
    $display $displayb $displayh $displayo $write $writeb $writeh $writeo $strobe $strobeb $strobeh $strobeo
    $monitor $monitorb $monitorh $monitoro $monitoron $monitoroff $error $warning $info
    $signed $unsigned $cast $clog2 $bits $size $left $right $low $high $increment $dimensions $unpacked_dimensions
    $countones $countbits $onehot $onehot0 $isunknown
    $ln $log10 $exp $sqrt $pow $floor $ceil $sin $cos $tan $asin $acos $atan $atan2 $hypot $sinh $cosh $tanh $abs $min
    $max $rtoi $itor $realtobits $bitstoreal $time $stime $realtime $sformat $sformatf $swrite $typename
"""
_DIRECTIVES = """
    timescale default_nettype line celldefine endcelldefine resetall unconnected_drive nounconnected_drive
    begin_keywords end_keywords
"""
SYSTEM_TASKS, DIRECTIVES = frozenset(_SYSTEM_TASKS.split()), frozenset(_DIRECTIVES.split())

_BLANKED = re.compile(
    r"""//[^\n]*|/\*.*?\*/|(?P<open_comment>/\*.*)|(?P<string>"(?:\\.|[^"\\\n])*")|(?P<open_string>".*)"""
    r"""|\\(?P<escaped>\S+)""",
    re.DOTALL,
)
_PLAIN_ESCAPED = re.compile(r"[\w$.\[\]:]+")
_SYSTEM_NAME = re.compile(r"\$[\w$]+")  # wherever it stands: `#1$finish` is a delay and a task
# An input port is one net with the bench's: forced inside of the design it holds still outside, for the reference too.
_STATEMENT = re.compile(r"\b(?:force|release|alias|bind)\b")
_DIRECTIVE = re.compile(r"`(\w*)")
_MODULE = re.compile(r"\b(?:macromodule|module)\s+(?:automatic\s+|static\s+)?([A-Za-z_][\w$]*)|\bendmodule\b")
_WORD = re.compile(r"[A-Za-z_][\w$]*")


def blank(code: str) -> tuple[str, str | None]:
    """(`code` with comments and strings replaced by spaces of the same length, what is never closed or oddly named)."""
    trouble: str | None = None

    def replace(match: re.Match[str]) -> str:
        nonlocal trouble
        if match["open_comment"]:
            trouble = trouble or "a comment is never closed"
        elif match["open_string"]:
            trouble = trouble or "a string is never closed"
        elif match["escaped"]:
            if not _PLAIN_ESCAPED.fullmatch(match["escaped"]):
                trouble = trouble or f"escaped name \\{match['escaped'][:40]}"
            return match[0]
        return re.sub(r"[^\n]", " ", match[0])

    return _BLANKED.sub(replace, code), trouble


def unreadable(code: str) -> str | None:
    """What keeps `code`, as it was written, from being read in only one way, if anything."""
    if "\0" in code:
        return "a NUL character"
    bare, trouble = blank(code)
    return trouble or ("directive `include" if re.search(r"`include\b", bare) else None)


def forbidden(expanded: str) -> str | None:
    """The first construct that a design may not have, in text that went through the preprocessor."""
    bare, trouble = blank(expanded)
    if trouble:
        return trouble
    for name in _SYSTEM_NAME.findall(bare):
        if name not in SYSTEM_TASKS:
            return f"system task {name}"
    if statement := _STATEMENT.search(bare):
        return f"statement {statement[0]}"
    return next((f"directive `{name}" for name in _DIRECTIVE.findall(bare) if name not in DIRECTIVES), None)


def defined_modules(code: str) -> list[str]:
    """Names of the modules in `code`, in their order."""
    return [match[1] for match in _MODULE.finditer(blank(code)[0]) if match[1]]


def reachable(code: str, top: str) -> str:
    """`code` without the modules that `top` does not lead to: an answer's own test bench is no part of the design.

    What stands outside of modules stays. Unbalanced modules stay as they are, for the compiler to complain of.
    """
    bare = blank(code)[0]
    spans: dict[str, tuple[int, int]] = {}
    opened: re.Match[str] | None = None
    for match in _MODULE.finditer(bare):
        if match[1]:
            if opened or match[1] in spans:
                return code
            opened = match
        elif opened is None:
            return code
        else:
            spans[opened[1]] = (opened.start(), match.end())
            opened = None
    if opened or top not in spans:
        return code
    kept, todo = {top}, [top]
    while todo:
        start, end = spans[todo.pop()]
        found = {name for name in _WORD.findall(bare[start:end]) if name in spans} - kept
        kept |= found
        todo += found
    for name, (start, end) in sorted(spans.items(), key=lambda item: -item[1][0]):
        if name not in kept:
            code = code[:start] + "\n" * code.count("\n", start, end) + code[end:]
    return code
