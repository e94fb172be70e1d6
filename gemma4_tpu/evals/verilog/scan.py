"""Scans the text of a design, without comments, for constructs that it may not contain.

The verdict does not depend on it (`docs/judging.md`): this is a second line of defence, with clear messages.
"""

from __future__ import annotations

import re

# All other names that begin with `$` reach files or names elsewhere. These affect only the design's own simulation:
# they end, seed, print or describe it.
_SYSTEM_TASKS = """
    $display $displayb $displayh $displayo $write $writeb $writeh $writeo $strobe $strobeb $strobeh $strobeo
    $monitor $monitorb $monitorh $monitoro $monitoron $monitoroff $fflush $error $warning $info $fatal $finish $stop
    $dumpfile $dumpvars $dumpon $dumpoff $dumpall $dumpflush $dumplimit $timeformat $printtimescale
    $random $urandom $urandom_range $test$plusargs $value$plusargs
    $signed $unsigned $cast $clog2 $bits $size $left $right $low $high $increment $dimensions $unpacked_dimensions
    $countones $countbits $onehot $onehot0 $isunknown $past $rose $fell $stable
    $ln $log10 $exp $sqrt $pow $floor $ceil $sin $cos $tan $asin $acos $atan $atan2 $hypot $sinh $cosh $tanh $abs $min
    $max $rtoi $itor $realtobits $bitstoreal $shortrealtobits $bitstoshortreal
    $time $stime $realtime $sformat $sformatf $swrite $typename
    $setup $hold $setuphold $recovery $removal $recrem $skew $period $width $nochange
"""
_PASSED_ON = """
    timescale default_nettype line celldefine endcelldefine resetall unconnected_drive nounconnected_drive
    begin_keywords end_keywords
    delay_mode_distributed delay_mode_path delay_mode_unit delay_mode_zero default_decay_time default_trireg_strength
    suppress_faults nosuppress_faults enable_portfaults disable_portfaults protect endprotect uselib
"""
SYSTEM_TASKS, DIRECTIVES = frozenset(_SYSTEM_TASKS.split()), frozenset(_PASSED_ON.split())

_NOT_CODE = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<open_comment>/\*.*)|(?P<string>"(?:\\[^\n]|[^"\\\n])*")"""
    r"""|(?P<open_string>".*)|\\(?P<escaped>[^ \t\n]+)""",
    re.DOTALL,
)
_UNREADABLE = re.compile(r"[^\n\t -~]")  # outside comments and strings
_UNREADABLE_IN_STRING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_PLAIN_ESCAPED = re.compile(r"[\w$]+", re.ASCII)
_INCLUDE = re.compile(r"(?<!`)(?:``)*(`)include\b")
_NOT_INCLUDED = "$include"  # no directive, but refused like one if it is still there after the preprocessor
_READ_OTHERWISE = re.compile(r"[\"`]|//|/\*|[^!-~]")  # by a preprocessor, which does not support escaped names
# A `$` within a name is part of it. `#1$finish` is a delay and a task, `4'h A$finish` a number and a task.
_TOKEN = re.compile(
    r"\\[^ \t\n]+|'\w*(?:\s+[\w?]++(?=\$))?|\d[\w.]*"
    r"|`(?P<directive>\w*)|(?P<word>[A-Za-z_][\w$]*)|(?P<system>\$[\w$]+)",
    re.ASCII,
)
_STATEMENTS = frozenset({"force", "release", "alias", "bind"})
_NAME = r"(?:automatic\s+|static\s+)?\\?([A-Za-z_][\w$]*)"
_MODULE = re.compile(rf"\b(?:macromodule|module)\s+{_NAME}|\bendmodule\b", re.ASCII)
_MODULE_OR_PROGRAM = re.compile(rf"\b(?:macromodule|module|program)\s+{_NAME}|\bend(?:module|program)\b", re.ASCII)
_ARGUMENTS_OR_END = re.compile(r"\s*[(;]")
_WORD = re.compile(r"[A-Za-z_][\w$]*", re.ASCII)


def _spaces(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def blank(code: str) -> tuple[str, str | None]:
    """(`code` with comments and strings replaced by spaces of the same length, what is unclosed or oddly named)."""
    return _without_comments(code, keep_strings=False)


def canonical(code: str) -> tuple[str, str | None]:
    """(text to scan and compile, what makes it ambiguous).

    Lines end in a line feed, comments become spaces, and everything outside strings is printable ASCII. Nothing is
    included: what remains of an `include` is refused by `forbidden`, unless it is conditional or in an unused module.
    """
    lines = code.replace("\r\n", "\n").replace("\r", "\n").replace("\f", " ")
    text, trouble = _without_comments(lines, keep_strings=True)
    bare, _ = blank(text)
    if trouble is None and (found := _UNREADABLE.search(bare)):
        trouble = f"the character U+{ord(found[0]):04X} outside comments and strings"
    kept, at = [], 0
    for found in _INCLUDE.finditer(bare):
        kept += [text[at : found.start(1)], "$"]
        at = found.end(1)
    return "".join([*kept, text[at:]]), trouble


def _without_comments(code: str, *, keep_strings: bool) -> tuple[str, str | None]:
    trouble: str | None = None
    last_string_end = -1

    def replace(match: re.Match[str]) -> str:
        nonlocal trouble, last_string_end
        found = None
        if match["open_comment"]:
            found = "a comment is never closed"
        elif match["open_string"]:
            found = "a string is never closed"
        elif match["escaped"]:
            if _READ_OTHERWISE.search(match["escaped"]):
                found = f"escaped name \\{match['escaped'][:40]}"
        elif match["string"]:
            if match.start() == last_string_end:  # newer simulators read `\"\"\"` as one quote
                found = "two strings without a space between them"
            elif control := _UNREADABLE_IN_STRING.search(match["string"]):
                found = f"the character U+{ord(control[0]):04X} in a string"
            last_string_end = match.end()
        trouble = trouble or found
        if keep_strings and (match["string"] or match["open_string"] or match["escaped"]):
            return match[0]
        if match["escaped"]:  # words in it are not words of the code
            return match[0] if _PLAIN_ESCAPED.fullmatch(match["escaped"]) else "\\" + "_" * len(match["escaped"])
        return _spaces(match[0])

    return _NOT_CODE.sub(replace, code), trouble


def without_dumps(code: str) -> str:
    """`code` without statements that dump waveforms: there is no file for them, and some simulators end there."""
    bare, _ = blank(code)
    kept, at = [], 0
    for task in _TOKEN.finditer(bare):
        if task.start() < at or not (task["system"] or "").startswith("$dump"):
            continue
        end = bare.find(";", task.end()) if _ARGUMENTS_OR_END.match(bare, task.end()) else -1
        if end >= 0:
            kept += [code[at : task.start()], ";"]
            at = end + 1
    return "".join([*kept, code[at:]])


def has_macros(text: str) -> bool:
    """Whether the preprocessor would change `text`: it has directives that are not passed on to the compiler."""
    tokens = _TOKEN.finditer(blank(text)[0])
    return any(token["directive"] is not None and token["directive"] not in DIRECTIVES for token in tokens)


def forbidden(expanded: str) -> str | None:
    """The first forbidden construct in preprocessed text, or None."""
    bare, trouble = blank(expanded)
    if trouble:
        return trouble
    return next(filter(None, map(_refused, _TOKEN.finditer(bare))), None)


def _refused(token: re.Match[str]) -> str | None:
    if token["system"] == _NOT_INCLUDED:
        return "directive `include"
    if token["system"] and token["system"] not in SYSTEM_TASKS:
        return f"system task {token['system']}"
    if token["word"] in _STATEMENTS:
        return f"statement {token['word']}"
    if token["directive"] is not None and token["directive"] not in DIRECTIVES:
        return f"directive `{token['directive']}"
    return None


def defined_modules(code: str) -> list[str]:
    """Names of the modules in `code`, in order."""
    return [match[1] for match in _MODULE.finditer(blank(code)[0]) if match[1]]


def reachable(code: str, top: str) -> str:
    """`code` without modules and programs that `top` does not use: an answer's own test bench is not of the design.

    Text outside modules stays. Unbalanced modules stay as they are, for the compiler to report.
    """
    bare, spans = blank(code)[0], _spans(code)
    if top not in spans:
        return code
    kept, todo = {top}, [top]
    while todo:
        start, end = spans[todo.pop()]
        found = {name for name in _WORD.findall(bare[start:end]) if name in spans} - kept
        kept |= found
        todo += found
    return without_modules(code, {*spans} - kept)


def without_modules(code: str, names: set[str]) -> str:
    """`code` without these modules, if they are balanced; lines keep their numbers."""
    for name, (start, end) in sorted(_spans(code).items(), key=lambda item: -item[1][0]):
        if name in names:
            code = code[:start] + "\n" * code.count("\n", start, end) + code[end:]
    return code


def _spans(code: str) -> dict[str, tuple[int, int]]:
    """Module or program → (start, end); empty if they are unbalanced or share names."""
    spans: dict[str, tuple[int, int]] = {}
    opened: re.Match[str] | None = None
    for match in _MODULE_OR_PROGRAM.finditer(blank(code)[0]):
        if match[1]:
            if opened or match[1] in spans:
                return {}
            opened = match
        elif opened is None:
            return {}
        else:
            spans[opened[1]] = (opened.start(), match.end())
            opened = None
    return {} if opened else spans
