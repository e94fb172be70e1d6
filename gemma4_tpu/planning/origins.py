"""Maps operations of a compiled program to our source, by the stack frames in its text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

PACKAGE = "gemma4_tpu/"
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_NUMBER = re.compile(r"(\w+)=(\d+)")


@dataclass(frozen=True)
class Frame:
    """A line of a file that was running when the operation was traced."""

    file: str
    function: str
    line: int


@dataclass(frozen=True)
class Frames:
    """The tables of stack frames at the beginning of a module's text."""

    frames: dict[int, tuple[Frame, int]] = field(default_factory=dict)
    """Number → frame, and the number of its caller (0: none)."""

    def of(self, attributes: str) -> Iterator[Frame]:
        """The frames of an instruction, innermost first, by its `stack_frame_id` or its `source_file`."""
        if told := re.search(r"\bstack_frame_id=(\d+)", attributes):
            number = int(told[1])
            while number in self.frames:
                frame, number = self.frames[number]
                yield frame
        elif told := re.search(r'source_file="([^"]+)" source_line=(\d+)', attributes):
            yield Frame(told[1], "", int(told[2]))

    def place(self, attributes: str) -> str:
        """The innermost line of this package, such as `models/linear.py:73 (LinearMaps.plain)`; empty if none is."""
        for frame in self.of(attributes):
            _, inside, path = frame.file.rpartition(PACKAGE)
            if inside:
                return f"{path}:{frame.line}" + (f" ({frame.function})" if frame.function else "")
        return ""


def read(text: str) -> Frames:
    """Reads the tables; none where the text has none."""
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    current = None
    for line in text.splitlines():
        if line in tables:
            current = tables[line]
        elif current is not None and (entry := re.match(r"(\d+) (.*)", line)):
            current[int(entry[1])] = entry[2].strip('"')
        elif line.startswith(("%", "ENTRY")):
            break
    locations = {number: _numbers(words) for number, words in tables["FileLocations"].items()}
    frames = {}
    for number, words in tables["StackFrames"].items():
        told = _numbers(words)
        where = locations[told["file_location_id"]]
        frame = Frame(
            tables["FileNames"][where["file_name_id"]],
            tables["FunctionNames"].get(where.get("function_name_id", 0), ""),
            where["line"],
        )
        # A parent is told as its number plus one, so that 1 is none.
        frames[number] = (frame, told.get("parent_frame_id", 1) - 1)
    return Frames(frames)


def _numbers(entry: str) -> dict[str, int]:
    return {name: int(number) for name, number in _NUMBER.findall(entry)}
