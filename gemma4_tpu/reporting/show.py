"""`python -m gemma4_tpu.report run=…`: finds the records, writes the page as Markdown and as HTML."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from gemma4_tpu.config.tasks import ReportRoot
from gemma4_tpu.reporting.html import html_page
from gemma4_tpu.reporting.markdown import shown
from gemma4_tpu.reporting.page import markdown_page
from gemma4_tpu.reporting.records import KINDS, OUTPUTS, Records, find
from gemma4_tpu.tracking.files import write_text

log = logging.getLogger(__name__)


def show_runs(root: ReportRoot) -> int:
    """Writes the page of `root.run`, and says where. Returns 0.

    Raises:
      UserError: no run folder, a given folder without a record, a damaged record.
    """
    several = find(root.run, root.records)
    page = Path(root.out).expanduser().absolute() if root.out else _default(several)
    page.parent.mkdir(parents=True, exist_ok=True)
    text = markdown_page(several, root, page, page.with_name(f"{page.stem}_plots"))
    write_text(page, text)
    write_text(page.with_suffix(".html"), html_page(text, page.parent))
    for records in several:
        print(f"{shown(records.run.address)}: {_counted(records)}")
    print(f"report: {shown(page)}\n        {shown(page.with_suffix('.html'))}")
    return 0


def _default(several: list[Records]) -> Path:
    """In the run's folder; of several runs in one of its own."""
    if len(several) == 1:
        return several[0].run.path / "report.md"
    return Path(OUTPUTS).absolute() / "reports" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S") / "report.md"


def _counted(records: Records) -> str:
    counts = [f"{len(records.by_kind[kind])} {kind}{'s' * (len(records.by_kind[kind]) != 1)}" for kind in KINDS]
    return ", ".join(counts)
