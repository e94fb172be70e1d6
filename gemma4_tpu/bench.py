"""`python -m gemma4_tpu.bench endpoint=<URL>`: load-tests a server; latency and throughput per cell. Imports no JAX.

Configuration → the server's model → cells, one file each → (the same with vLLM's own client) → tables, plots, page.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gemma4_tpu.benching.checks import BenchChecked, examine_bench, normalise_bench
from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.serving import BenchRoot
from gemma4_tpu.errors import exit_code, leave

if TYPE_CHECKING:
    from gemma4_tpu.benching.all_cells import Results
    from gemma4_tpu.benching.vllm_client import VllmClient
    from gemma4_tpu.prices import Price
    from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)
FAILED_REQUESTS = 1
MAY_CHANGE = ("endpoint", "served", "bench.request_timeout_seconds", "bench.cross_check")
"""Keys that can change when a benchmark resumes."""


BENCH: EntryPoint[BenchRoot, BenchChecked] = EntryPoint(
    name="bench",
    schema=BenchRoot,
    normalise=normalise_bench,
    examine=examine_bench,
    summary=(
        "Load-test a server: latency and throughput by rate and length. Defined as in `vllm bench serve`: request"
        " rates × lengths, or users × context, or the highest rate within limits on latency. Writes raw results of"
        " each cell, tables, plots and one HTML page."
    ),
    examples=(
        ("endpoint=http://127.0.0.1:8000 slice=v6e-8 architecture=gemma4_31b", "rates 1 to 64 and unbounded"),
        ("served=outputs/servings/<server> bench=matrix", "1 to 2048 users, 16 to 16,256 tokens"),
        ("endpoint=http://127.0.0.1:8000 'bench.lengths=[[1024,128]]' 'bench.rates=[2,inf]'", "your own cells"),
        (
            "endpoint=http://127.0.0.1:8000 bench=slo bench.slo='ttft_p99<500ms,tpot_p50<30ms'",
            "the highest rate within these limits",
        ),
        ("served=outputs/servings/<server> bench=vllm", "compared with `vllm bench serve` in the server's container"),
        ("endpoint=http://127.0.0.1:8000 run_dir=outputs/benchmarks/<run>", "resume; finished cells are kept"),
    ),
    as_written=frozenset({"bench.slo"}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 done, 1 requests failed, 2 refused (one message on stderr), 130 or 143 interrupted."""
    return exit_code(lambda: _run(load(list(sys.argv[1:] if argv is None else argv), BENCH)))


def _run(loaded: Loaded[BenchRoot, BenchChecked]) -> int:
    return _dry_run(loaded) if loaded.root.dry_run else _bench(loaded)


def _dry_run(loaded: Loaded[BenchRoot, BenchChecked]) -> int:
    """Prints the cells as comments, and the commands of a cross-check for a shell."""
    from gemma4_tpu.benching.cells import cells_of, is_search
    from gemma4_tpu.benching.cross_check import ROUNDS

    config, client = loaded.root.bench, _client(loaded)
    if is_search(config):
        for prompt, answer in config.lengths:
            print(f"# {prompt:,} in, {answer:,} out: the highest rate, by trials of {config.requests:,} requests")
    if client:
        print(f"# {ROUNDS} rounds of each cell, by this client and by vLLM's in turn; commands of the first round:")
    for cell in cells_of(config):
        print(f"# {cell.shown}: {cell.requests(config):,} requests")
        if client:
            print(client.shown(cell, loaded.checked.model or "<model>"))
    return 0


def _client(loaded: Loaded[BenchRoot, BenchChecked]) -> VllmClient | None:
    """The client of vLLM, if a cross-check is requested."""
    from gemma4_tpu.benching.vllm_client import VllmClient

    config, checked = loaded.root.bench, loaded.checked
    if not config.cross_check:
        return None
    assert checked.serving is not None  # ensured by the checks
    return VllmClient(checked.serving, config, checked.endpoint, checked.folder)


def _bench(loaded: Loaded[BenchRoot, BenchChecked]) -> int:
    """Runs the load test and keeps its record."""
    from gemma4_tpu.benching.all_cells import run_sweep, search_rates, slo_outcome
    from gemma4_tpu.benching.cells import is_search
    from gemma4_tpu.benching.cross_check import CrossCheck
    from gemma4_tpu.tracking import provenance, records
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.run import RunFolder

    setup_logging()
    config, checked, client = loaded.root, loaded.checked, _client(loaded)
    if client:
        client.check()
    record = RunFolder.open(
        "outputs", config.name, config.run_dir, "auto", config=asdict(config), kind=records.LOAD_TEST,
        overrides=loaded.overrides, resume_allow=MAY_CHANGE,
    )  # fmt: skip
    setup_logging(record.log_path)

    def job() -> int:
        captured = provenance.capture(
            hardware={"slice": checked.slice}, seeds={"bench": config.bench.seed}, fingerprints={}
        )
        provenance.record(record, captured)
        check = CrossCheck(client, record.path) if client else None
        if is_search(config.bench):
            results, found = search_rates(config.bench, checked, record.path)
        else:
            results, found = run_sweep(config.bench, checked, record.path, check), []
        compared = check.compared(results) if check else None
        searched = slo_outcome(config.bench, found, results, _price(checked.slice))
        return _report(record, results, compared, searched, checked)

    return record.work(job)


def _price(slice_: str) -> Price | None:
    """Hourly price of the server's slice."""
    from gemma4_tpu.hardware import SLICES
    from gemma4_tpu.prices import ON_DEMAND, slice_price

    return slice_price(SLICES[slice_], ON_DEMAND) if slice_ in SLICES else None


def _report(
    record: RunFolder, results: Results, compared: dict[str, Any] | None, searched: dict[str, Any] | None,
    checked: BenchChecked,
) -> int:  # fmt: skip
    """Writes `result.json`, `report.md`, `report.html`, and prints the coverage."""
    from gemma4_tpu.benching.all_cells import coverage_line, outcome_of
    from gemma4_tpu.reporting.load_test import write_report

    found = outcome_of(results, compared, searched)
    record.leave(found)
    print(write_report(record.path, results, compared, searched, checked))
    print(coverage_line(results))
    print(f"report: {record.path / 'report.html'}")
    return 0 if found["status"] == "finished" else FAILED_REQUESTS


if __name__ == "__main__":
    leave(main())
