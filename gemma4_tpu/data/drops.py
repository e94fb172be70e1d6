"""Rows that cannot be trained on, counted by reason, with examples of their locations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gemma4_tpu.errors import UserError

EXAMPLES_KEPT = 5
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

REASONS = {
    "invalid_json": "the line is not valid JSON (truncated or garbled), or an object in it has the same key twice",
    "invalid_utf8": "the line is not valid UTF-8, or holds half of a surrogate pair",
    "not_an_object": "the row is not a JSON object",
    "invalid_csv": "the row has more or fewer cells than the header, or a quote that is never closed",
    "line_too_long": "the line is longer than 16 MiB; large pictures are given by their paths",
    "unknown_form": "the row's keys match no form, or several: `data.columns` says which column is which",
    "no_messages": "there are no turns, or no list of them",
    "bad_role": "a turn's role is unknown or missing",
    "bad_content": "a turn's content is not text (audio, a number, nothing; pictures need `data.image_cache`)",
    "missing_picture": "a picture does not exist, or the row has more or fewer pictures than places for them",
    "unreadable_picture": "a picture cannot be decoded, or its sides differ too much",
    "picture_too_large": "a picture has too many bytes or pixels",
    "picture_on_the_web": "a picture is an http(s) address, which is not fetched: download it and give its path",
    "bad_tool_call": "`tools` or `tool_calls` are malformed",
    "bad_weight": "a turn's `weight` or `train` is not 0, 1, false or true, or asks for loss outside an answer",
    "bad_order": "two assistant turns follow each other",
    "control_token": "a text, a key or a tool's definition holds one of the tokenizer's control tokens",
    "empty_answer": "an assistant turn is empty",
    "template_error": "the chat template refuses the conversation",
    "bad_rendering": "the chat template moves, changes or loses a message, or renders earlier turns as no server would "
    "send them",
    "no_target": "no token would carry loss",
    "no_text": "`text` is empty",
    "too_long": "longer than `data.sequence_length`",
    "no_prompt": "there is no prompt",
    "no_response": "there is no response",
    "equal_sides": "both sides of a pair are the same",
    "different_prompts": "the sides of a pair differ in more than their answers to the same prompt",
    "split_side": "a side of a pair has several answers, and the template renders earlier ones differently from how "
    "they are generated: `data.train_on=last` takes the last",
    "unclosed_think": "`<think>` is never closed: the text is a draft",
    "no_module": "the answer holds no Verilog module",
    "unbalanced_module": "`module` and `endmodule` do not pair up",
    "unterminated_comment": "a comment or string of the Verilog code is never closed",
    "conflicting_modules": "code fences define the same module in ways that cannot be joined",
    "syntax_error": "`iverilog -t null` rejects the code",
    "unreadable_row": "reading or rendering the row failed in a way that no other reason covers",
    "too_slow": "reading or rendering the row took longer than its time limit",
    "too_much_memory": "rendering the row took more memory than its limit",
}
"""Every reason for a drop → its meaning."""


class Origin(NamedTuple):
    """Where a row came from: a file (or data set) and the 1-based row number in it."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


def printable(text: str) -> str:
    """Text made safe for logs and files: half of a surrogate pair, or a character with which a row could control the
    terminal, becomes its escape.
    """
    text = _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class RowDropped(Exception):
    """Raised inside `data/` to drop one row, which is counted under `reason`."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in REASONS, reason
        detail = printable(detail)
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def unreadable(error: Exception) -> RowDropped:
    """The drop of a row on which third-party code failed in an unforeseen way."""
    return RowDropped("unreadable_row", f"{type(error).__name__}: {error}"[:120])


@dataclass
class Dropped:
    """The rows dropped for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first few locations, as `file:row (detail)`."""


@dataclass
class DropReport:
    """What happened to the rows of one set of sources."""

    rows_read: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    rows_split: int = 0
    """Rows that became one example per answer, because the template renders earlier answers differently from how they
    are generated.
    """
    examples_too_long: int = 0
    """Examples longer than `data.sequence_length`, of rows that also gave shorter ones."""

    @property
    def rows_dropped(self) -> int:
        return sum(drop.count for drop in self.dropped.values())

    @property
    def rows_kept(self) -> int:
        return self.rows_read - self.rows_dropped

    @property
    def fraction(self) -> float:
        """Rows dropped over rows read."""
        return self.rows_dropped / max(self.rows_read, 1)

    def drop(self, problem: RowDropped, origin: Origin) -> None:
        """Counts one dropped row."""
        entry = self.dropped.setdefault(problem.reason, Dropped())
        entry.count += 1
        if len(entry.examples) < EXAMPLES_KEPT:
            entry.examples.append(f"{origin} ({problem.detail})" if problem.detail else str(origin))

    def lines(self) -> list[str]:
        """One line per reason, the most frequent first, for logs and messages."""
        ordered = sorted(self.dropped.items(), key=lambda item: -item[1].count)
        rows = [f"{drop.count} × {reason}: {REASONS[reason]}; {', '.join(drop.examples)}" for reason, drop in ordered]
        examples = f"{self.examples_too_long} examples too long, of rows with other examples that fit"
        return [*rows, examples] if self.examples_too_long else rows

    def to_json(self) -> dict[str, Any]:
        """Counts and examples by reason, for `data.json`."""
        return {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "rows_dropped": self.rows_dropped,
            "dropped_fraction": self.fraction,
            "rows_split": self.rows_split,
            "examples_too_long": self.examples_too_long,
            "dropped": {
                reason: {"count": drop.count, "meaning": REASONS[reason], "examples": drop.examples}
                for reason, drop in self.dropped.items()
            },
        }

    def check(self, name: str, max_drop_fraction: float) -> None:
        """Refuses sources that lost too many rows, or all of them.

        Raises:
          UserError: nothing is left, or more than `max_drop_fraction` was dropped.
        """
        reasons = "".join(f"\n  {line}" for line in self.lines())
        if not self.rows_read:
            raise UserError(f"{name}: the sources contain no rows")
        if not self.rows_kept:
            raise UserError(f"{name}: none of the {self.rows_read} rows can be trained on:{reasons}")
        if self.fraction > max_drop_fraction:
            raise UserError(
                f"{name}: {self.rows_dropped} of {self.rows_read} rows dropped ({self.fraction:.1%}), more than "
                f"data.max_drop_fraction={max_drop_fraction}:{reasons}\nFix the rows (or, for too_long, raise "
                "data.sequence_length), or allow more drops with a larger data.max_drop_fraction."
            )
