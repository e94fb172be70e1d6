"""The figures on the pages of benchmarks/: blocks between two comments, of which the first is the command that made it.

    <!-- measured: python -m benchmarks.training --updates 24 --rank 16 -->
    the command, as code, and what it printed
    <!-- end -->

So a page says how to measure it again, and `python -m benchmarks` does it.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
_BLOCK = re.compile(r"(?P<begin><!-- measured: (?P<command>.+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def measured(*packages: str, word: str = "Measured") -> str:
    """When and on what: the first line of a block. Called before the work, so that the load is that of others."""
    parts = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    machine = f"{cores} CPU cores ({platform.machine()}, load before {load:.1f})"
    return f"*{word}* on {datetime.now(UTC):%Y-%m-%d}, {machine}, {', '.join(parts)}."


def commands() -> Iterator[tuple[Path, str]]:
    """Each page with a block, and the block's command; words such as `$VERILOG_EVAL` are variables."""
    for page in sorted(FOLDER.glob("*.md")):
        for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            yield page, block["command"]


def replace(page: Path, command: str, figures: str) -> None:
    """Puts what `command` printed into its block of `page`."""

    def put(block: re.Match[str]) -> str:
        made = f"{block['begin']}\n    {command}\n\n{figures.strip()}\n\n{block['end']}"
        return made if block["command"] == command else block[0]

    page.write_text(_BLOCK.sub(put, page.read_text(encoding="utf-8")), encoding="utf-8")
