"""The highest rate that keeps limits: on queues whose answer is known, and against a server of known capacity."""

import heapq
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from gemma4_tpu.bench import BENCH
from gemma4_tpu.benching import latencies
from gemma4_tpu.benching.cells import Cell, arrivals_seconds, generator
from gemma4_tpu.benching.client import TimedAnswer
from gemma4_tpu.benching.one_cell import measured
from gemma4_tpu.benching.rate_search import PRECISION, RateSearch, figures_of
from gemma4_tpu.benching.slo import limits_of
from gemma4_tpu.config.load import load
from gemma4_tpu.config.serving import BenchConfig
from gemma4_tpu.costing.read import read
from gemma4_tpu.errors import UserError
from gemma4_tpu.reporting.load_rates import rate_rows
from tests.benching.conftest import cell

CAPACITY, SLOTS = 20.0, 8
SERVICE = SLOTS / CAPACITY


def queue(times, slots=SLOTS, service=SERVICE):
    """Answers of a server that works on `slots` requests at a time, first come, first served: two chunks each."""
    free, answers = [0.0] * slots, []
    for time in times:
        begun = max(time, free[0])
        heapq.heapreplace(free, begun + service)
        first, last = begun + service / 2, begun + service
        answers.append(
            TimedAnswer(16, time, time, first, last, [service / 2], output_tokens=2, counted=True)
        )  # fmt: skip
    return answers


def simulated(config):
    """Runs a cell in no time; keeps what it ran."""

    def measure(asked):
        rng = generator(config, asked, 0)
        answers = queue(arrivals_seconds(rng, config.requests, asked.rate, config.arrivals))
        measure.results[asked] = measured(config, asked, answers, max(a.last_at for a in answers))
        return measure.results[asked]

    measure.results = {}
    return measure


def search(**config):
    config = BenchConfig(**config)
    measure = simulated(config)
    return RateSearch(measure, limits_of(config.slo), 16, 2).run(), measure.results


def test_requests_at_even_distances_find_the_capacity_itself():
    """Below the capacity nobody waits. At R above it the last of n waits n / C - n / R, and the p99 is over its limit,
    10 / C above the service, where 0.99 n (1 / C - 1 / R) > 10 / C: from 1.0102 C on for n = 1000.
    """
    limit_ms = 1000 * (SERVICE + 10 / CAPACITY)
    found, results = search(slo=f"e2e_p99<{limit_ms}ms", requests=1000, arrivals="fixed")
    assert CAPACITY / (1 + PRECISION) <= found.rate <= CAPACITY * 1.0103
    assert found.rate < found.breaks_at <= found.rate * (1 + PRECISION) and "p99_e2el_ms" in found.breaks_by
    assert found.trials == len(results) <= 20
    assert {results[c]["state"] for c in results if 1.06 * CAPACITY < c.rate < math.inf} == {"overloaded"}
    told = figures_of(found, results, usd_per_hour=36.0)
    assert told["request_goodput"] == pytest.approx(found.rate, rel=0.03)  # the last answer ends after the last arrival
    assert told["saturation_request_throughput"] == pytest.approx(CAPACITY, rel=0.03)
    assert told["usd_per_million_output_tokens"] == pytest.approx(0.01 * 1e6 / (2 * told["request_goodput"]))


def test_limits_that_no_rate_breaks():
    """Each of eight requests has its own slot. The steps upwards used to continue through 1e300 to infinity."""
    found, results = search(slo="e2e_p50<10s", requests=SLOTS, arrivals="fixed")
    assert (found.rate, found.breaks_at, found.trials) == (None, None, len(results))
    assert found.told.endswith("8 requests keep them even all at once; give more bench.requests, or lower limits")
    assert max(c.rate for c in results if not math.isinf(c.rate)) < 1e9
    assert rate_rows({"searches": [figures_of(found, results, usd_per_hour=36.0)]})[0][2] == "–"


def test_a_poisson_process_finds_the_rate_of_a_long_run():
    """What a p99 of 1,000 says lies between p98.4 and p99.6 of the truth (a share of 1% ± 1.96 × 0.31%), three such
    trials have to hold, and bisection leaves 2%: by rates of a long run that is the band.
    """
    limit = SERVICE + 12 / CAPACITY
    found, _ = search(slo=f"e2e_p99<{limit}s,tpot_median<{SERVICE}s", requests=1000)
    times = np.cumsum(np.random.default_rng(5).exponential(size=20_000))

    def beyond(rate):
        return np.mean([a.latency_seconds > limit for a in queue(times / rate)])

    low, high = CAPACITY / 2, CAPACITY
    while high / low > 1.002:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if beyond(middle) <= 0.01 else (low, middle)
    assert found.rate == pytest.approx(low, rel=0.05)


def test_a_server_that_stumbles_once_is_found_all_the_same():
    """One trial far below the rate that it keeps says that it doesn't: the search would stay below that."""
    config = BenchConfig(slo=f"e2e_p90<{SERVICE + 0.1}s", requests=300)
    calm, limits = simulated(config), limits_of(config.slo)
    stumbled = []

    def measure(asked):
        result = calm(asked)
        if asked.rate < 0.6 * CAPACITY and not stumbled:
            stumbled.append(asked)
            return {**result, "p90_e2el_ms": 10_000.0}
        return result

    wanted, found = RateSearch(calm, limits, 16, 2).run(), RateSearch(measure, limits, 16, 2).run()
    assert stumbled[0].rate < 0.8 * wanted.rate
    assert found.rate == pytest.approx(wanted.rate, rel=0.05)


def test_limits_that_no_rate_keeps_say_so():
    found, results = search(slo="ttft_p99<1ms", requests=100, arrivals="fixed")
    assert found.rate is None and "p99_ttft_ms 200.0, more than 1" in found.told
    assert figures_of(found, results, 1.0)["usd_per_million_output_tokens"] is None


@pytest.mark.parametrize(("requests", "share"), [(30, 0.9), (1000, 0.9), (30, 2.0), (1000, 1.1)])
def test_arrivals_that_outrun_completions_are_told_from_chance(requests, share):
    told = []
    for seed in range(10):
        times = arrivals_seconds(np.random.default_rng(seed), requests, share * CAPACITY, "poisson")
        told.append(latencies.is_overloaded(latencies.latency_growth(queue(times)), requests))
    assert set(told) == {share > 1}


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize(
    ("share", "requests", "least", "most"),
    [(0.95, 30, 0, 0.05), (0.95, 100, 0, 0), (0.95, 1000, 0, 0), (1.1, 30, 0.2, 0.25), (1.1, 100, 0.5, 0.52),
     (1.1, 1000, 1, 1), (2.0, 30, 1, 1), (2.0, 100, 1, 1), (2.0, 1000, 1, 1)],
)  # fmt: skip
def test_overload_is_called_as_often_as_the_page_says(share, requests, least, most, slots):
    """docs/benchmarking.md: of 60 cells."""

    def is_called(seed):
        times = arrivals_seconds(np.random.default_rng(seed), requests, share * CAPACITY, "poisson")
        growth = latencies.latency_growth(queue(times, slots, slots / CAPACITY))
        return latencies.is_overloaded(growth, requests)

    assert least <= np.mean([is_called(seed) for seed in range(60)]) <= most


def test_a_burst_that_all_are_answered_in_time_is_no_overload():
    """Latency is longer than the load lasts, and the same for all."""
    answers = queue(np.arange(30) / 100, slots=30, service=5.0)
    assert not latencies.is_overloaded(latencies.latency_growth(answers), 30)


def test_goodput_and_the_best_second():
    answers = queue([0.0, 0.0, 0.0], slots=1, service=0.6)  # chunks at 0.3, 0.6; 0.9, 1.2; 1.5, 1.8
    found = latencies.summary(answers, 1.8, 2, "ttft_p99<1s,itl_mean<1ms,e2e_p90<1.3s")
    assert found["request_goodput"] == pytest.approx(2 / 1.8)  # 0.3 and 0.9; the third begins after 1.5
    assert found["max_output_tokens_per_s"] == 3
    assert found["p90_e2el_ms"] == pytest.approx(np.percentile([600, 1200, 1800], 90))
    plain = latencies.summary(answers, 1.8, 3, "")
    assert plain["request_goodput"] is None and plain["short_answers"] == 3
    several = [replace(answer, output_tokens=8) for answer in answers]  # four tokens a chunk
    assert latencies.summary(several, 1.8, 8, "")["max_output_tokens_per_s"] == 12


@pytest.mark.slow
def test_a_server_of_known_capacity_is_found_within_5_percent(played, bench):
    """100 requests/s by the clock. Above it the median of 150 waits 75 (1 / C - 1 / R): over its 20 ms from 1.028 C on.
    Below it nobody waits, and a busy machine may add those 20 ms. Bisection leaves 2%: 5% on either side. One that
    adds more is no error of the search: the best of six counts.
    """
    server = played(slots=4, first_seconds=0.02, chunk_seconds=0.02)
    words = ["bench=slo", "bench.lengths=[[16,2]]", "bench.requests=150", "bench.arrivals=fixed", "slice=v6e-8"]
    words.append("bench.slo=ttft_p50<40ms")
    rates = []
    for attempt in range(6):
        code, folder, out, err = bench(server, *words, run_dir=f"run{attempt}")
        assert code == 0, err
        result = json.loads((folder / "result.json").read_text())
        (found,) = result["slo"]["searches"]
        rates.append(found["rate"])
        if found["rate"] == pytest.approx(100, rel=0.05):
            break
    else:
        pytest.fail(f"found {rates}")
    assert found["usd_per_million_output_tokens"] == pytest.approx(
        result["slo"]["price"]["usd_per_hour"] / 3600 / (2 * found["request_goodput"]) * 1e6
    )
    assert result["ok"] + result["overloaded"] == result["cells"] == found["trials"]
    assert len(list((folder / "cells").iterdir())) == found["trials"]
    pictures = [path.name for path in (folder / "plots").iterdir()]
    assert sorted(pictures) == ["tpot_over_throughput.png", "ttft_over_throughput.png"]
    report = (folder / "report.md").read_text()
    assert "The highest rate that keeps the limits" in report
    assert re.search(rf"\| +{found['rate']:g} \|", report)
    points = [float(point.name.split(", ")[2].split()[0]) for point in read([str(folder)]).points]
    assert points == sorted(points) and points[-1] == math.inf

    before = len(server.answers)  # the trials are there: the search comes to the same without asking
    code, _, again, _ = bench(server, *words, run_dir=folder.name)
    assert (code, again, len(server.answers)) == (0, out, before)


def test_an_overloaded_cell_is_marked_and_in_no_picture_of_latencies(played, bench):
    """Twice as many requests come as are answered: its latencies are the queue's."""
    server = played(slots=1, first_seconds=0.05, chunk_seconds=0.05)
    words = ["bench.lengths=[[16,2]]", "bench.rates=[20]", "bench.arrivals=fixed", "bench.requests=40"]
    code, folder, out, _ = bench(server, *words, "slice=v6e-8", "architecture=gemma4_31b")
    assert code == 0 and "1 of 1 cells measured (1 overloaded)" in out
    found = cell(folder, "in16_out2_rate20")
    assert found["state"] == "overloaded" and found["latency_growth"] == pytest.approx(1.0, abs=0.2)  # 20 / 10 - 1
    assert re.search(r"overloaded +\|.*each second of load adds \d\.\d+ s of latency", out)
    assert [path.name for path in (folder / "plots").iterdir()] == ["throughput.png"]
    (point,) = read([str(folder)]).points
    assert point.ttft_seconds is None and point.output_tokens_per_second == found["output_throughput"]


def test_loads_come_as_numbers(played, bench):
    server = played()
    words = ["bench.lengths=[[16,4],[9,4]]", "bench.rates=[1000,200,inf]", "bench.requests=3"]
    code, folder, _, _ = bench(server, *words)
    assert code == 0
    names = [point.name for point in read([str(folder)]).points]
    assert names == [
        f"{n} in, 4 out, {rate} requests/s" for n in (9, 16) for rate in ("200.0", "1000.0", "inf")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bench=slo"], "or give limits, such as bench.slo='ttft_p99<500ms'"),
        (
            ["bench=slo", "bench.slo=ttft_p99<500ms", "bench.requests=99"],
            "bench.requests=99: p99_ttft_ms of so few is that of the slowest; give at least 100, better 1,000",
        ),
    ],
)
def test_refusals(words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load(["endpoint=http://127.0.0.1:1", *words], BENCH)


@pytest.mark.parametrize(
    ("slo", "limits"),
    [
        ("ttft_p99<500ms,tpot_p50<30ms", {"p99_ttft_ms": 500, "median_tpot_ms": 30}),
        (
            " TTFT_p99 < .5 s , e2e_p99<2s,itl_mean<7.25MS ",
            {"p99_ttft_ms": 500, "p99_e2el_ms": 2000, "mean_itl_ms": 7.25},
        ),
        ("'e2el_p5<1s'", {"p5_e2el_ms": 1000}),  # quoted twice, as for Hydra
        ("", {}),
    ],
)
def test_limits_are_read_as_written(slo, limits):
    """As a shell hands it over, without a second pair of quotes for Hydra."""
    root = load(["endpoint=http://127.0.0.1:1", f"bench.slo={slo}", "bench.rates=[1]"], BENCH).root
    assert {limit.key: limit.ms for limit in limits_of(root.bench.slo)} == limits


@pytest.mark.parametrize(
    ("slo", "told"),
    [
        (
            "p99_ttft_ms<500ms",
            "no such figure; did you mean ttft_p99? (mean, median or p1 to p99 of ttft, tpot, itl, e2e",
        ),
        ("tfft_p99<500ms", "no such figure; did you mean ttft_p99"),
        ("ttft<500ms", "ttft<500ms: no such figure"),
        ("ttft_p100<1s", "no such figure"),
        ("ttft_p99.9<1s", "no such figure"),
        ("throughput<5s", "no such figure"),
        ("ttft_p99>500ms", "> is not an operator here; latencies have upper limits: ttft_p99<500ms"),
        ("ttft_p99<=500ms", "<= is not an operator here; latencies have upper limits: ttft_p99<500ms"),
        ("ttft_p99=500ms", "= is not an operator here"),
        ("ttft_p99", "bench.slo=ttft_p99: there is no limit; latencies have upper limits: ttft_p99<500ms"),
        ("ttft_p99<", "nothing is not a time in ms or s; such as ttft_p99<500ms"),
        ("ttft_p99<500", "500 is not a time in ms or s; write ttft_p99<500ms or ttft_p99<500s"),
        ("ttft_p99<500us", "500us is not a time in ms or s; such as ttft_p99<500ms"),
        ("ttft_p99<1e3ms", "1e3ms is not a time in ms or s"),
        ("ttft_p99<-5ms", "-5ms is not a time in ms or s"),
        ("ttft_p99<infs", "infs is not a time"),
        ("ttft_p99<0s", "0s must be more than 0 and finite"),
        (f"ttft_p99<{'9' * 400}s", "must be more than 0 and finite"),
        ("ttft_p99<1s,", "nothing next to a comma: not a limit; separate limits by commas and write each as"),
        ("ttft_p99<1s;tpot_p50<3ms", "not a limit; separate limits by commas and write each as ttft_p99<500ms"),
        ("ttft_p50<1s,ttft_median<2s", "two limits for median_ttft_ms; give one"),
        ("{p99_ttft_ms: 500}", "no such figure"),
        ("it's", "bench.slo=it's: no such figure"),
    ],
)
def test_what_is_no_limit_is_refused_in_one_message(slo, told):
    with pytest.raises(UserError) as caught:
        load(["endpoint=http://127.0.0.1:1", "bench=slo", f"bench.slo={slo}"], BENCH)
    assert told in str(caught.value) and "problems" not in str(caught.value)


def test_names_of_trials_are_apart():
    assert len({Cell(1, 2, rate=rate, round=n).name for rate in (1.001, 1.002, math.inf) for n in (1, 2)}) == 6
