"""The Verilog code in a completion."""

from __future__ import annotations

import re

from gemma4_tpu.data.codev import extract_code, fenced_blocks, split_response
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.markup import CHANNEL, CHANNEL_END
from gemma4_tpu.evals.verilog.scan import defined_modules

_CODE_BEGINS = re.compile(r"^[ \t]*(?:`[a-z]\w*|module\b|package\b|(?:\(\*(?!\))))", re.MULTILINE)
_LAST_END = re.compile(r".*\bend(?:module|package)\b", re.DOTALL)


def extract(completion: str, top: str) -> str | None:
    """The code of an answer; null where there is none.

    Thought channels do not count. All fences, however spelt and closed or not, are joined where they hold different
    modules; a later one replaces an earlier one of the same modules. Where that makes no whole modules, the last piece
    with `top` is taken as it is: the compiler will say what is wrong with it. Without a fence, it is what stands
    between the first line that begins like code and the last `endmodule`.
    """
    *thoughts, last = completion.replace("\r\n", "\n").split(CHANNEL_END)
    if CHANNEL in last:
        return None  # cut off while thinking
    text = "".join(part.partition(CHANNEL)[0] for part in thoughts) + last
    try:
        _, answer = split_response(text)
    except RowDropped:
        return None
    try:
        return extract_code(answer)
    except RowDropped:
        pieces = fenced_blocks(answer) or _bare(answer)
    for wanted in (lambda piece: top in defined_modules(piece), defined_modules):
        if chosen := [piece for piece in pieces if wanted(piece)]:
            return chosen[-1].strip("\n")
    return None


def _bare(answer: str) -> list[str]:
    """Code without a fence, up to its last `endmodule`, or to the end where it was cut off."""
    first = _CODE_BEGINS.search(answer)
    if first is None:
        return []
    code = answer[first.start() :]
    whole = _LAST_END.match(code)
    return [code if whole is None or defined_modules(code[whole.end() :]) else whole[0]]
