"""Extracts the Verilog code from a completion."""

from __future__ import annotations

import re
from bisect import bisect_left

from gemma4_tpu.data.codev import split_response
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.markup import CHANNEL, CHANNEL_END
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.scan import blank, defined_modules, without_modules
from gemma4_tpu.evals.verilog.unfenced import unfenced_code

_FENCE = re.compile(r"(?P<mark>`{3,}|(?<![^\n])[ \t>]*~{3,})(?P<rest>[^\n]*)")
_INFO = re.compile(r"[\w+#.{:-]\S*(?:\s.*[=\"}].*)?")
_CODE_ON_FENCE_LINE = re.compile(r"(?:^|(?<=\s))(?:macro)?module\s+\\?\w+\s*[(#;].*")
_QUOTED = re.compile(r"[ \t]*>[ \t>]*")
_BRACKETS = r"\((?:[^()]++|\((?:[^()]++|\((?:[^()]++|\([^()]*+\))*+\))*+\))*+\)"
_HEAD = re.compile(rf"\bmodule\s+(?:automatic\s+|static\s+)?\\?(\w+)\s*(?:#\s*{_BRACKETS}\s*)?(?:{_BRACKETS}\s*)?;")
_DECLARATION = re.compile(r"\s*(?:input|output|inout|wire|reg|logic|parameter|localparam)\b[^=]*|\W*")
_FILE_ITEM = re.compile(
    r"`(?!``)|\(\*|\$|\b(?:macromodule|module|package|interface|primitive|class|program|checker|config|bind|import"
    r"|typedef|function|task|parameter|localparam|let|timeunit|timeprecision|virtual|extern)\b"
)
_LAST_END = re.compile(r".*\bend(?:module|package|interface)\b(?:\s*:\s*\w+)?", re.DOTALL)
_DEFINED = re.compile(
    r"\b(?:macromodule|module|package|interface|primitive|class|program)\s+(?:automatic\s+|static\s+)?\\?(\w+)"
)
_MACRO = re.compile(r"`define[ \t]+(\w+)")
_HELPER = re.compile(  # functions, tasks and types, which need no module around them
    r"\b(?:function|task)\s[^;(]*?(\w+)\s*[;(]|\btypedef\b[^;{]*(?:\{[^}]*\}[^;{]*)*?\b(\w+)\s*(?:\[[^;]*)?;"
)
_MODULE_BEGINS, _MODULE_ENDS = re.compile(r"\b(?:macro)?module\b"), re.compile(r"\bendmodule\b")
_THOUGHT_ENDS = re.compile(
    r"</(?:\w+:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|analysis)>|\[/THINK\]", re.IGNORECASE
)
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])[\s*_]+")
_NOT_RIGHT = re.compile(r"\b(?:not|isn't) (?:correct|right|proper|valid)\b", re.IGNORECASE)
_WARNED = re.compile(
    r"\b(?:mistakes?|pitfalls?|wrong(?:ly)?|incorrect(?:ly)?|buggy|broken|faulty|bad|anti-?patterns?"
    r"|(?:won't|will not|would not|wouldn't|doesn't|does not) work|(?:should|must)(?:n't| not| never))\b"
    r"|^\W*(?:so |and |but |please |also )*(?:avoid|never|don't|do not|not do|not like)\b",
    re.IGNORECASE,
)
_MENDED = re.compile(
    r"\b(?:correct(?:ed|ly|ion)?|fix(?:ed|es)?|right|proper(?:ly)?|instead|mended|final)\b", re.IGNORECASE
)
_LOOKS_BACK = re.compile(r"\b(?:was|were|above|previous(?:ly)?|earlier|oops)\b", re.IGNORECASE)
_GOES_ON = re.compile(r"\W*(?:it|its|this|that|these|they|because|since|which)\b", re.IGNORECASE)


def code_of(completion: str, problem: Problem) -> str | None:
    """The code in an answer to `problem`, after the problem's header if the answer is a module's body alone."""
    code = extract(completion, problem.top)
    if not problem.header or (code is not None and problem.top in defined_modules(code)):
        return code
    answer = _answer(completion)
    if answer is None:
        return None
    bodies = [body for _, body in _fences(answer)] or [answer]
    return f"{problem.header.strip()}\n{bodies[-1]}".strip("\n")


def extract(completion: str, top: str) -> str | None:
    """The code in an answer; None if there is none.

    Thought channels do not count. Of the fences (however spelt, quoted or not, closed or not) that contain a complete
    `top`, the last one counts, unless the words before it present it as a mistake or it is a header without a body;
    other fences are added if they define what it uses. If none is complete, the last one that begins `top` is taken as
    it is, for the compiler to report what is wrong. Without a fence, each stretch of code between lines of prose counts
    as one (`unfenced.py`).
    """
    answer = _answer(completion)
    if answer is None:
        return None
    pieces = [(before, code) for before, code in _fences(answer) if _defined(code) or _helpers(code)]
    if not any(top in defined_modules(code) for _, code in pieces):
        unfenced = unfenced_code(answer)
        pieces = unfenced if any(top in defined_modules(code) for _, code in unfenced) else pieces or unfenced
    candidates = (
        [piece for piece in pieces if top in defined_modules(piece[1])]
        or [piece for piece in pieces if defined_modules(piece[1])]
        or [piece for piece in pieces if _MODULE_BEGINS.search(blank(piece[1])[0])]  # named by a macro
    )
    if not candidates:
        return None
    whole = [piece for piece in candidates if _is_whole(piece[1])]
    meant = [piece for piece in whole or candidates if not _is_warned_of(*piece)]
    filled = [piece for piece in meant if not _is_skeleton(piece[1], top)]
    chosen = _without_prose((filled or meant or whole or candidates)[-1][1])
    return _with_what_it_uses(chosen, [code for _, code in pieces]).strip("\n")


def _answer(completion: str) -> str | None:
    """A completion without its thoughts; None if it was cut off while thinking. Lines end in line feeds."""
    *thoughts, last = completion.replace("\r\n", "\n").replace("\r", "\n").split(CHANNEL_END)
    if CHANNEL in last:
        return None
    try:
        _, answer = split_response("".join(part.partition(CHANNEL)[0] for part in thoughts) + last)
    except RowDropped:
        return None
    *_, behind = _THOUGHT_ENDS.split(answer)
    return behind if _MODULE_BEGINS.search(behind) else answer


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
        above = answer[answer.rfind("\n", 0, mark.start()) + 1 : mark.start()]
        at_line_start = not above.strip(" \t>*")
        if opened:
            if character != opened[2] or not (at_line_start or _closes(above, rest)):
                continue
            found += _fence(answer, prose, opened, mark.start())
            opened = None
            if not (at_line_start and _INFO.fullmatch(rest)):
                continue  # it closes; on its own line and followed by a language, it also opens another one
        code = _CODE_ON_FENCE_LINE.search(mark["rest"])
        inside = mark.start("rest") + code.start() if code else mark.end() + 1
        closed = mark["rest"].find("```", code.start() if code else 0)
        if closed < 0 or character == "~":
            opened = (mark.start(), inside, character)
        elif code:  # otherwise it is a word in the prose
            found += _fence(answer, prose, (mark.start(), inside, character), mark.start("rest") + closed)
    if opened:
        found += _fence(answer, prose, opened, len(answer))
    return found


def _closes(above: str, rest: str) -> bool:
    """Whether a mark between the words of a line closes a fence; in comments and macros, it does not."""
    return "endmodule" in above or not (rest or "//" in above)


def _fence(answer: str, prose: list[tuple[int, str]], opened: tuple[int, int, str], end: int) -> list[tuple[str, str]]:
    """The fence, or the fences with code within it."""
    start, inside, character = opened
    line = answer.rfind("\n", 0, start) + 1
    before, code = answer[line:start], answer[inside:end]
    if quoted := _QUOTED.match(answer, line, inside):
        code = re.sub(rf"^(?:[ \t]*>){{1,{quoted[0].count('>')}}}[ \t]?", "", code, flags=re.MULTILINE)
    if not re.search(r"\w", before):
        above = bisect_left(prose, (line, ""))
        before = prose[above - 1][1] if above else ""
    inner = [piece for piece in _fences(code) if _defined(piece[1])] if character == "~" and "```" in code else []
    return inner or [(before, code.rstrip())]


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
    """`code` without text before or after its modules that can't be part of a source file."""
    bare, trouble = blank(code)
    if not (trouble or _FILE_ITEM.match(bare.lstrip())):
        code = "\n".join(part for _, part in unfenced_code(code)) or code
        bare, trouble = blank(code)
    end = _LAST_END.match(bare)
    behind = bare[end.end() :].lstrip() if end else ""
    if end is None or trouble or not behind or _FILE_ITEM.match(behind):
        return code
    return code[: end.end()]


def _is_warned_of(before: str, code: str) -> bool:
    """Whether the words before some code, or its first comment, present it as a mistake."""
    first = code.strip().partition("\n")[0]
    return _warns(before) or (first.startswith(("//", "/*")) and _warns(first))


def _warns(said: str) -> bool:
    """The last sentence decides ("That was wrong. Here it is again:"), unless it only continues the one before it."""
    for sentence in reversed([part for part in _SENTENCE_ENDS.split(said) if re.search(r"\w", part)]):
        if _LOOKS_BACK.search(sentence):
            return False
        sentence = _NOT_RIGHT.sub("wrong", sentence)
        if _WARNED.search(sentence):
            return not _MENDED.search(sentence)
        if not _GOES_ON.match(sentence):
            return False
    return False


def _with_what_it_uses(chosen: str, pieces: list[str]) -> str:
    """`chosen` after the other pieces that define what it uses: modules, packages, macros; later ones come first."""
    parts = [chosen]
    words = set(re.findall(r"\w+", blank(chosen)[0]))
    defined = _defined(chosen) | _names_of_helpers(chosen)
    for piece in reversed(pieces):
        piece = without_modules(piece, defined & {*defined_modules(piece)})
        own = _defined(piece) | _helpers(piece)
        if own & words and not own & defined:
            parts.insert(0, piece)
            defined |= own
            words |= set(re.findall(r"\w+", blank(piece)[0]))
    return "\n\n".join(part.strip("\n") for part in parts)


def _defined(code: str) -> set[str]:
    bare = blank(code)[0]
    return {*_DEFINED.findall(bare), *_MACRO.findall(bare)}


def _helpers(code: str) -> set[str]:
    """Names of the functions, tasks and types in code that has no module."""
    bare = blank(code)[0]
    return set() if _DEFINED.search(bare) or not _FILE_ITEM.match(bare.lstrip()) else _names_of_helpers(code)


def _names_of_helpers(code: str) -> set[str]:
    return {name for names in _HELPER.findall(blank(code)[0]) for name in names if name}
