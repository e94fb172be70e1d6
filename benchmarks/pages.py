"""The figures on the pages of benchmarks/: blocks between two comments, of which the first is the command that made it.

    <!-- measured: python -m benchmarks.training --updates 24 --rank 16 -->
    the command, as code, and what it printed
    <!-- end -->

So a page says how to measure it again, and `python -m benchmarks` does it; what begins with `measured if named:`, since
it takes hours, only if its page is named. Words in brackets, such as `[--trl "$TRL_PYTHON"]`, are left out while their
variable is not set; a command whose other words need one is left out as a whole.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
_BLOCK = re.compile(
    r"(?P<begin><!-- measured(?P<named> if named)?: (?P<command>.+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)
_OPTIONAL = re.compile(r" \[(.+?)\]")


@dataclass(frozen=True)
class Block:
    """Figures on a page."""

    page: Path
    command: str
    """As on the page: with variables such as `$VERILOG_EVAL`, and optional words in brackets."""
    only_if_named: bool
    """Whether it is measured only if its page is asked for by name."""

    def resolved(self) -> tuple[str, list[str], list[str]]:
        """(command without the optional words that need a variable that is not set, these words, other variables that
        are not set).
        """
        optional = _OPTIONAL.findall(self.command)
        dropped = [words for words in optional if _unset(words)]
        command = _OPTIONAL.sub(lambda found: "" if found[1] in dropped else f" {found[1]}", self.command)
        return command, dropped, _unset(command)


def _unset(text: str) -> list[str]:
    return [name for name in re.findall(r"\$(\w+)", text) if name not in os.environ]


def measured(*packages: str, word: str = "Measured") -> str:
    """When and on what: the first line of a block. Called before the work, so that the load is that of others."""
    parts = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    machine = f"{cores} CPU cores ({platform.machine()}, load before {load:.1f})"
    return f"*{word}* on {datetime.now(UTC):%Y-%m-%d}, {machine}, {', '.join(parts)}."


def blocks() -> Iterator[Block]:
    """Those of every page."""
    for page in sorted(FOLDER.glob("*.md")):
        for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            yield Block(page, found["command"], found["named"] is not None)


def replace(block: Block, figures: str) -> None:
    """Puts what its command printed into it."""

    def put(found: re.Match[str]) -> str:
        made = f"{found['begin']}\n    {block.command}\n\n{figures.strip()}\n\n{found['end']}"
        return made if found["command"] == block.command else found[0]

    block.page.write_text(_BLOCK.sub(put, block.page.read_text(encoding="utf-8")), encoding="utf-8")
