"""Lines of progress where there is no terminal, and the summary."""

import logging

import pytest

from gemma4_tpu import prices
from gemma4_tpu.tracking.files import read_json, write_json
from gemma4_tpu.tracking.progress import Progress, format_seconds, print_summary
from gemma4_tpu.tracking.result import Result

METRICS = {"loss": 1.2345, "heldout_loss": 1.2345, "real_tokens_per_second": 123456.7, "mfu": 0.5}
RESULT = Result(
    status="finished",
    updates=1200,
    seconds=3723.4,
    real_tokens=123_456_789,
    target_tokens=23_456_789,
    fill=0.9634,
    real_tokens_per_second=33_157.2,
    heldout_loss_first=5.5,
    heldout_loss_last=3.25,
    heldout_loss_best=3.125,
    heldout_update_best=900,
    usd=17.37,
)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "gemma4_tpu.tracking.progress"]


def test_lines_are_rare_but_first_and_last_are_there(caplog):
    caplog.set_level(logging.INFO)
    with Progress(10_000) as progress:
        for update in range(1, 10_001):
            progress.advance(update)
            progress.log(METRICS, update)
    assert len(lines(caplog)) == 2  # ten thousand updates take far less than the five seconds between lines
    assert lines(caplog)[-1] == "10000/10000  loss 1.2345  held-out 1.2345  123,457 tok/s  ETA 0:00:00"
    assert all(len("00:00:00 " + line) <= 80 for line in lines(caplog))


def test_time_left_counts_from_the_end_of_the_first_update(monkeypatch):
    times = {51: 100.0, 52: 102.0, 61: 120.0}  # the first took 100 s (compilation), the others 2 s each
    progress = Progress(110, first_update=50, show=False)
    for update, seconds in times.items():
        monkeypatch.setattr("time.monotonic", lambda seconds=seconds: seconds)
        progress.advance(update)
    assert progress.seconds_left() == pytest.approx((110 - 61) * 2.0)


def test_other_processes_show_nothing(caplog):
    caplog.set_level(logging.INFO)
    with Progress(1, show=False) as progress:
        progress.log(METRICS, 1)
    assert lines(caplog) == []


def test_the_summary_says_where_what_and_what_next(run, capsys):
    print_summary(run, RESULT, ["look at plots/loss.png", "python -m gemma4_tpu.merge run=x"])
    text = capsys.readouterr().out
    for words in [
        str(run.path),
        "5.5000 → 3.2500  (best 3.1250 at update 900)",
        "123,456,789 real tokens (23,456,789 with loss), fill 96.3%",
        "1 h 02 min for 1,200 updates, 33,157 real tokens/s",
        "$17.37",
        "look at plots/loss.png\n               python -m gemma4_tpu.merge run=x",
    ]:
        assert words in text
    assert all(len(line) <= 80 for line in text.splitlines() if str(run.path) not in line)


def test_the_summary_of_a_run_that_failed_early(run, capsys):
    print_summary(run, Result(status="failed", error="loss is NaN"))
    text = capsys.readouterr().out
    assert "failed: loss is NaN" in text
    assert "None" not in text
    assert "Held-out" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4.2 s"), (59.9, "59.9 s"), (192.4, "3 min 12 s"), (18_420, "5 h 07 min")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_result_reads_back_and_skips_keys_of_newer_versions(tmp_path):
    path = tmp_path / "result.json"
    RESULT.write(path)
    assert Result.read(path) == RESULT
    write_json(path, read_json(path) | {"from_the_future": 1})
    assert Result.read(path) == RESULT


def test_cost():
    assert prices.usd(5400, 16.8) == pytest.approx(25.2)
    assert prices.usd(5400, None) is None
    assert prices.usd_per_million_tokens(36.0, 10_000) == pytest.approx(1.0)
    assert prices.usd_per_million_tokens(36.0, 0) is None
    assert [prices.format_usd(x) for x in (0, 0.001, 0.5, 1234.5)] == ["$0.00", "under $0.01", "$0.50", "$1,234.50"]
