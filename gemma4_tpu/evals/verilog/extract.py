"""Extracts the Verilog code from a completion."""

from __future__ import annotations

import re
from bisect import bisect_left

from gemma4_tpu.data.codev import fenced_blocks, split_response
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.markup import CHANNEL, CHANNEL_END
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.scan import blank, defined_modules

_FENCE = re.compile(r"(?P<mark>`{3,}|(?<![^\n])[ \t>]*~{3,})(?P<rest>[^\n]*)")
_INFO = re.compile(r"[\w+#.{:-]\S*(?:\s.*[=\"}].*)?")
_CODE_ON_FENCE_LINE = re.compile(r"(?:^|(?<=\s))(?:macro)?module\s+\w+\s*[(#;].*")
_QUOTE = re.compile(r"^[ \t]*>[ \t]?", re.MULTILINE)
_BARE_BEGINS = re.compile(
    r"^[ \t>]*(?:`[a-z]\w*|(?:macro)?module\b|package\s+\w+\s*;|interface\s+\w+\s*[;(#]"
    r"|typedef\s+(?:enum|struct|union|logic)|(?:\(\*(?!\))))|\b(?:macro)?module\s+\w+\s*[(#;]",
    re.MULTILINE,
)
_BRACKETS = r"\((?:[^()]++|\((?:[^()]++|\((?:[^()]++|\([^()]*+\))*+\))*+\))*+\)"
_HEAD = re.compile(rf"\bmodule\s+(?:automatic\s+|static\s+)?(\w+)\s*(?:#\s*{_BRACKETS}\s*)?(?:{_BRACKETS}\s*)?;")
_DECLARATION = re.compile(r"\s*(?:input|output|inout|wire|reg|logic|parameter|localparam)\b[^=]*|\W*")
_FILE_ITEM = re.compile(
    r"`|\(\*|\$|\b(?:macromodule|module|package|interface|primitive|class|program|checker|config|bind|import|typedef"
    r"|function|task|parameter|localparam|let|timeunit|timeprecision|virtual|extern)\b"
)
_LAST_END = re.compile(r".*\bend(?:module|package|interface)\b(?:\s*:\s*\w+)?", re.DOTALL)
_DEFINED = re.compile(
    r"\b(?:macromodule|module|package|interface|primitive|class|program)\s+(?:automatic\s+|static\s+)?(\w+)"
)
_MACRO = re.compile(r"`define[ \t]+(\w+)")
_BEGUN = re.compile(r"\bmodule\s+\w+\s*[(#;]")
_MODULE_BEGINS, _MODULE_ENDS = re.compile(r"\b(?:macro)?module\b"), re.compile(r"\bendmodule\b")
_WARNED = re.compile(
    r"\b(?:mistakes?|pitfalls?|wrong(?:ly)?|incorrect(?:ly)?|buggy|broken|faulty|bad|avoid|never|don't|do not|not do"
    r"|(?:won't|will not|would not|wouldn't|doesn't|does not) work|anti-?patterns?)\b",
    re.IGNORECASE,
)
_MENDED = re.compile(
    r"\b(?:correct(?:ed|ly|ion)?|fix(?:ed|es)?|right|proper(?:ly)?|instead|mended|final)\b", re.IGNORECASE
)


def code_of(completion: str, problem: Problem) -> str | None:
    """The code in an answer to `problem`, after the problem's header if the answer is a module's body alone."""
    begun = not problem.header or re.search(rf"\bmodule\s+{re.escape(problem.top)}\b", completion)
    return extract(completion if begun else _with_header(completion, problem.header), problem.top)


def _with_header(body: str, header: str) -> str:
    bodies = fenced_blocks(body) or [body]
    return f"```verilog\n{header.strip()}\n{bodies[-1]}\n```"


def extract(completion: str, top: str) -> str | None:
    """The code in an answer; None if there is none.

    Thought channels do not count. Of the fences (however spelt, quoted or not, closed or not) that contain a complete
    `top`, the last one counts, unless the words before it present it as a mistake or it is a header without a body;
    other fences are added if they define what it uses. If none is complete, the last one that begins `top` is taken as
    it is, for the compiler to report what is wrong. Without a fence, the code extends from the first words that look
    like code to the last `endmodule`.
    """
    *thoughts, last = completion.replace("\r\n", "\n").split(CHANNEL_END)
    if CHANNEL in last:
        return None  # cut off while thinking
    text = "".join(part.partition(CHANNEL)[0] for part in thoughts) + last
    try:
        _, answer = split_response(text)
    except RowDropped:
        return None
    pieces = [(before, code) for before, code in _fences(answer) if defined_modules(code) or _MACRO.search(code)]
    if not any(defined_modules(code) for _, code in pieces):
        pieces = [("", code) for code in _bare(answer)]
    candidates = [piece for piece in pieces if top in defined_modules(piece[1])] or [
        piece for piece in pieces if defined_modules(piece[1])
    ]
    if not candidates:
        return None
    whole = [piece for piece in candidates if _is_whole(piece[1])]
    meant = [piece for piece in whole or candidates if not _is_warned_of(*piece)]
    filled = [piece for piece in meant if not _is_skeleton(piece[1], top)]
    chosen = _without_prose((filled or meant or whole or candidates)[-1][1])
    return _with_what_it_uses(chosen, [code for _, code in pieces]).strip("\n")


def _fences(answer: str) -> list[tuple[str, str]]:
    """(line of prose before it, contents) of each fence; the last one may be unclosed."""
    found: list[tuple[str, str]] = []
    prose, start = [], 0  # (start, text) of each line with a word
    for line in answer.split("\n"):
        if re.search(r"\w", line):
            prose.append((start, line))
        start += len(line) + 1
    opened: tuple[int, int, str] | None = None  # (position of the mark, start of the contents, character)
    for mark in _FENCE.finditer(answer):
        character, rest = mark["mark"].strip(" \t>")[0], mark["rest"].strip(" \t*`")
        if opened and character != opened[2]:
            continue
        if opened:
            found.append(_fence(answer, prose, opened, mark.start()))
            opened = None
            at_line_start = not answer[answer.rfind("\n", 0, mark.start()) + 1 : mark.start()].strip(" \t>*")
            if not (at_line_start and _INFO.fullmatch(rest)):
                continue  # it closes; on its own line and followed by a language, it also opens another one
        code = _CODE_ON_FENCE_LINE.search(mark["rest"])
        opened = (mark.start(), mark.start("rest") + code.start() if code else mark.end() + 1, character)
    if opened:
        found.append(_fence(answer, prose, opened, len(answer)))
    return found


def _fence(answer: str, prose: list[tuple[int, str]], opened: tuple[int, int, str], end: int) -> tuple[str, str]:
    start, inside, _ = opened
    line = answer.rfind("\n", 0, start) + 1
    before, code = answer[line:start], answer[inside:end]
    if ">" in before:
        code = _QUOTE.sub("", code)
    if not re.search(r"\w", before):
        above = bisect_left(prose, (line, ""))
        before = prose[above - 1][1] if above else ""
    return before, code.rstrip()


def _is_whole(code: str) -> bool:
    bare, trouble = blank(code)
    *ended, rest = _MODULE_ENDS.split(bare)
    return trouble is None and any(map(_MODULE_BEGINS.search, ended)) and not defined_modules(rest)


def _is_skeleton(code: str, top: str) -> bool:
    """Whether the module is only a header, as a reminder of the interface."""
    bare, _ = blank(code)
    head = next((head for head in _HEAD.finditer(bare) if head[1] == top), None)
    if head is None:
        return False
    body = bare[head.end() :].partition("endmodule")[0]
    return all(_DECLARATION.fullmatch(statement) for statement in body.split(";"))


def _without_prose(code: str) -> str:
    """`code` without text after its last `endmodule` that can't be part of a source file."""
    bare, trouble = blank(code)
    end = _LAST_END.match(bare)
    behind = bare[end.end() :].lstrip() if end else ""
    if end is None or trouble or not behind or _FILE_ITEM.match(behind):
        return code
    return code[: end.end()]


def _is_warned_of(before: str, code: str) -> bool:
    first = code.strip().partition("\n")[0]
    said = f"{before} {first if first.startswith(('//', '/*')) else ''}"
    return bool(_WARNED.search(said)) and not _MENDED.search(said)


def _with_what_it_uses(chosen: str, pieces: list[str]) -> str:
    """`chosen` after the other pieces that define a module, package or macro that it uses; later ones come first."""
    parts = [chosen]
    words = set(re.findall(r"\w+", blank(chosen)[0]))
    defined = _defined(chosen)
    for piece in reversed(pieces):
        own = _defined(piece)
        if own & words and not own & defined:
            parts.insert(0, piece)
            defined |= own
            words |= set(re.findall(r"\w+", blank(piece)[0]))
    return "\n\n".join(part.strip("\n") for part in parts)


def _defined(code: str) -> set[str]:
    bare = blank(code)[0]
    return {*_DEFINED.findall(bare), *_MACRO.findall(bare)}


def _bare(answer: str) -> list[str]:
    """Code without a fence, up to its last `endmodule`, or to the end if it was cut off."""
    begins = list(_BARE_BEGINS.finditer(answer))
    if not begins:
        return []
    heads = {head.start() for head in _HEAD.finditer(blank(answer)[0])}
    modules = [answer.find("module", begin.start(), begin.end()) for begin in begins]
    # "The module x (as asked) has …" does not begin the code if a module with a header follows.
    first = next((begin for begin, at in zip(begins, modules, strict=True) if at < 0 or at in heads), begins[0])
    code = answer[first.start() :]
    if code.lstrip(" \t").startswith(">"):
        code = _QUOTE.sub("", code)
    whole = _LAST_END.match(code)
    return [code if whole is None or _BEGUN.search(code, whole.end()) else whole[0]]
