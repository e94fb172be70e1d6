"""What a person sees of a benchmark: a bar on a terminal, a line for each cell."""

from __future__ import annotations

from typing import Any

from rich import progress

from gemma4_tpu.benching.cells import Cell
from gemma4_tpu.benching.one_cell import Told
from gemma4_tpu.tracking.logs import console


class Bar:
    """Progress over cells and the requests of the one that runs; nothing where there is no terminal."""

    def __init__(self, cells: int):
        self._bar = progress.Progress(
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
            console=console(),
            expand=True,
            disable=not console().is_terminal,
        )
        self._cells = self._bar.add_task("cells", total=cells)
        self._requests = self._bar.add_task("", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def cell(self, name: str, requests: int) -> Told:
        """Begins a cell; the function that it returns is told of requests."""
        self._bar.reset(self._requests, total=requests, description=name)

        def told(done: int, failed: int) -> None:
            text = f"{name}, {failed} failed" if failed else name
            self._bar.update(self._requests, completed=done, description=text)

        return told

    def done(self) -> None:
        """One more cell."""
        self._bar.advance(self._cells)


def told_of(cell: Cell, result: dict[str, Any]) -> str:
    """One line about a cell that has run."""
    if "reason" in result:
        return f"{cell.shown}: {result['state']}: {result['reason']}"
    facts = [f"{result['output_throughput']:,.1f} tok/s"]
    facts += [
        f"{label} {result[key]:,.1f} ms"
        for label, key in (("TTFT", "median_ttft_ms"), ("TPOT", "median_tpot_ms"))
        if result[key] is not None
    ]
    return f"{cell.shown}: {', '.join(facts)}"
