"""CodeV-R1 rows (`system`, `prompt`, `response`) to conversations whose answer is one clean Verilog fence.

The published responses have the form `<think>…</think> <answer>```verilog…```</answer>`, with every malformation that
sampled text can have. A row is kept only if what remains after cleaning is complete.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
from typing import Any

from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.errors import UserError
from gemma4_tpu.scratch import scratch_folder

PROMPT_KEYS = ("prompt", "question", "problem")
RESPONSE_KEYS = ("completion", "response", "answer")
COLUMNS = ("system", *PROMPT_KEYS, *RESPONSE_KEYS)
LANGUAGES = ("", "verilog", "systemverilog", "sv", "v")
FENCE, FENCE_END = "```verilog\n", "\n```"
SYNTAX_SECONDS = 10
_WITH_LIMIT = 'ulimit -t "$0" 2> /dev/null; exec "$@"'
"""Limits the CPU seconds of a compiler and its children, which nobody ends once this process is killed."""

THINK_TAG = re.compile(r"<(/?)think>", re.IGNORECASE)
ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
OPENING_FENCE = re.compile(r"```+[ \t]*(systemverilog|verilog|sv|v)(?=\s|$)", re.IGNORECASE)  # also after prose
FENCE_LINE = re.compile(r"\s*```+[ \t]*([\w+-]*)")
FENCE_BEHIND_CODE = re.compile(r"(.*\bendmodule\b[^`]*)```+\s*$")
NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(/\*|")', re.DOTALL)
MODULE_WORD = re.compile(
    r"(?<![\w$`.\\])(?:(endmodule)\b|module\b(?:\s+(?:automatic\s+|static\s+)?([A-Za-z_][\w$]*|\\\S+))?)"
)
FIRST_CODE_LINE = re.compile(r"^[ \t]*(?:`[a-z]\w*|module\b|package\b|interface\b|\(\*)", re.MULTILINE)
DIRECTIVE = re.compile(r"^[ \t]*`(?:define|timescale|default_nettype|ifdef|ifndef)\b", re.MULTILINE)


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of one row; the thinking goes into the answer's `reasoning`, which the policy keeps or drops.

    Raises:
      RowDropped: there is no prompt, no response, or no complete module.
    """
    turns, answered = _prompt_turns(row)
    response = next((row[key] for key in RESPONSE_KEYS if row.get(key)), answered)
    if isinstance(response, list):
        response = _last_answer(response)
    if not isinstance(response, str) or not response.strip():
        raise RowDropped("no_response")
    thought, answer = split_response(response.replace("\r\n", "\n"))
    code = extract_code(answer)
    answer_turn = {"role": "assistant", "content": f"{FENCE}{code}{FENCE_END}"}
    return [*turns, {**answer_turn, "reasoning": thought} if thought else answer_turn]


def fenced_code(messages: list[dict[str, Any]]) -> str:
    """The code of the answer that `to_messages` made."""
    return messages[-1]["content"].removeprefix(FENCE).removesuffix(FENCE_END)


def split_response(response: str) -> tuple[str, str]:
    """(thought, answer): the text before the last `</think>`, and the last `<answer>` after it, closed or not.

    Raises:
      RowDropped: a `<think>` is never closed.
    """
    tags = list(THINK_TAG.finditer(response))
    if tags and not tags[-1][1]:
        raise RowDropped("unclosed_think")
    thought, answer = "", response
    if tags:
        thought = THINK_TAG.sub("", response[: tags[-1].start()]).strip()
        answer = response[tags[-1].end() :]
    marks = list(ANSWER_TAG.finditer(answer))
    opened = next((i for i in reversed(range(len(marks))) if not marks[i][1]), None)
    if opened is not None:
        stop = marks[opened + 1].start() if opened + 1 < len(marks) else len(answer)
        answer = answer[marks[opened].end() : stop]
    return thought, answer


def extract_code(answer: str) -> str:
    """The Verilog code of an answer: its fences, joined if they define different modules, else its unfenced modules.

    A later fence replaces an earlier one that defines the same modules (a draft before the final version). Fences
    without a module count only if they contain compiler directives.

    Raises:
      RowDropped: there is no module, a module is incomplete, or the fences contradict each other.
    """
    kept: list[str] = []
    names: set[str] = set()
    for block in reversed(fenced_blocks(answer) or [_unfenced(answer)]):
        try:
            own = module_names(block) if "module" in block else set()
        except RowDropped:
            begun = {match[2] for match in MODULE_WORD.finditer(block) if match[2]}
            if names and begun <= names:  # a fragment of the complete code that follows
                continue
            raise
        if own and own <= names:
            continue
        if own & names:
            raise RowDropped("conflicting_modules", ", ".join(sorted(own & names)))
        if own or DIRECTIVE.search(block):
            kept.insert(0, block.strip("\n").rstrip())
            names |= own
    if not names:
        raise RowDropped("no_module")
    return "\n\n".join(kept)


def module_names(code: str) -> set[str]:
    """Names of the modules that `code` defines, ignoring comments and strings.

    Raises:
      RowDropped: a comment or string is not closed, a module is incomplete, or two modules share a name.
    """
    bare = []
    position = 0
    for match in NOT_CODE.finditer(code):
        if match[1]:
            raise RowDropped("unterminated_comment")
        bare.append(code[position : match.start()])
        position = match.end()
    bare.append(code[position:])
    names: set[str] = set()
    inside = False
    for match in MODULE_WORD.finditer(" ".join(bare)):
        closes = bool(match[1])
        if closes != inside:
            raise RowDropped("unbalanced_module")
        inside = not closes
        if closes:
            continue
        if not match[2]:
            raise RowDropped("unbalanced_module", "a module without a name")
        if match[2] in names:
            raise RowDropped("conflicting_modules", match[2])
        names.add(match[2])
    if inside:
        raise RowDropped("unbalanced_module")
    return names


def find_iverilog() -> str:
    """Path of the `iverilog` program.

    Raises:
      UserError: it is not installed.
    """
    program = shutil.which("iverilog")
    if program is None:
        raise UserError("data.check_syntax=true needs iverilog on the PATH: install Icarus Verilog, or set it to false")
    return program


def check_syntax(code: str, program: str) -> None:
    """Runs `iverilog -t null` on `code`, which writes no output files.

    Raises:
      RowDropped: the code is rejected, or takes longer than `SYNTAX_SECONDS`.
    """
    with scratch_folder() as scratch:
        file = scratch / "design.sv"
        file.write_text(code, encoding="utf-8")
        most = math.ceil(SYNTAX_SECONDS) + 1  # so that this process, while it lives, is the one that ends it
        command = ["/bin/sh", "-c", _WITH_LIMIT, str(most), program, "-g2012", "-t", "null", file.name]
        with subprocess.Popen(
            command,
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **dict.fromkeys(("TMP", "TMPDIR", "TEMP"), str(scratch))},
            start_new_session=True,  # elaboration runs in a grandchild, which only a signal to the group reaches
        ) as process:
            try:
                _, errors = process.communicate(timeout=SYNTAX_SECONDS)
            except subprocess.TimeoutExpired:
                raise RowDropped("syntax_error", f"no verdict in {SYNTAX_SECONDS} s") from None
            finally:  # also when this process is asked to end
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RowDropped("syntax_error", errors.decode("utf-8", "replace").strip().split("\n")[0][:120])


def _prompt_turns(row: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """(turns before the answer, the answer if the prompt's own messages contain one)."""
    prompt = next((row[key] for key in PROMPT_KEYS if row.get(key)), None)
    system = row.get("system")
    answered = None
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, dict)]
        roles = [turn.get("role") for turn in turns]
        if "assistant" in roles:
            answered = turns[roles.index("assistant")].get("content")
            turns = turns[: roles.index("assistant")]
        turns = [{"role": turn.get("role"), "content": turn.get("content")} for turn in turns]
    else:
        turns = [{"role": "user", "content": prompt}]
    if not turns or not all(isinstance(turn["content"], str) and turn["content"].strip() for turn in turns):
        raise RowDropped("no_prompt")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return turns, answered


def _last_answer(response: list[Any]) -> Any:
    """The text of a response given as chat messages, or as a list of one text."""
    last = response[-1] if response else None
    return last.get("content") if isinstance(last, dict) else last


def fenced_blocks(answer: str) -> list[str]:
    """Contents of Verilog fences (or unlabelled ones); the last can be unclosed."""
    blocks: list[tuple[str, list[str]]] = []  # (language, lines)
    inside = False
    for line in answer.split("\n"):
        mark = FENCE_LINE.match(line)
        opening = mark if mark and (mark[1] or not inside) else None
        if not mark and not inside:
            opening = OPENING_FENCE.search(line)
        if opening:
            line = line[opening.end() :].lstrip()
            blocks.append((opening[1].lower(), []))
        inside = bool(opening or (inside and not mark))
        if inside:
            last_line = FENCE_BEHIND_CODE.match(line) if "```" in line else None
            blocks[-1][1].append(last_line[1].rstrip() if last_line else line)
            inside = not last_line
    return [text for language, lines in blocks if language in LANGUAGES and (text := "\n".join(lines)).strip()]


def _unfenced(answer: str) -> str:
    """Unfenced code in prose: from the first line that begins like Verilog to the last `endmodule`."""
    first = FIRST_CODE_LINE.search(answer)
    last = answer.rfind("endmodule")
    if first is None or last < first.start():
        raise RowDropped("no_module")
    return answer[first.start() : last + len("endmodule")]
