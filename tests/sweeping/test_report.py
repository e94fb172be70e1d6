"""`python -m gemma4_tpu.report sweep=<folder>`: any folder of run folders, any metric of result.json."""

import csv
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from gemma4_tpu.report import main
from gemma4_tpu.tracking.metrics import MetricsFile
from gemma4_tpu.tracking.result import Result

RUNS = {  # folder: (rank, learning rate, status, held-out loss, real tokens per second)
    "0": (8, "1e-4", "finished", 1.5, 900.0),
    "1": (8, "2e-4", "finished", 1.2, 800.0),
    "2": (16, "1e-4", "finished", 1.3, 700.0),
    "3": (16, "2e-4", "failed", None, None),
}


@pytest.fixture
def runs(tmp_path):
    """As another launcher leaves them: no record of the sweep."""
    for name, (rank, rate, status, loss, speed) in RUNS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text("{}")
        words = ["model=tiny", f"lora.rank={rank}", f"optimizer.learning_rate={rate}", f"run_dir='{folder}'"]
        (folder / "overrides.yaml").write_text(yaml.safe_dump(words))
        told = "it diverged" if status == "failed" else None
        Result(status=status, error=told, heldout_loss_last=loss, real_tokens_per_second=speed, real_tokens=5000).write(
            folder / "result.json"
        )
        metrics = MetricsFile(folder / "metrics.jsonl")
        for update, value in enumerate([3.0, 2.0, loss or float("nan")]):
            metrics.log({"heldout_loss": value}, update)
        metrics.close()
    return tmp_path


def test_a_folder_of_runs_gets_a_table_the_best_and_plots(runs, capsys):
    assert main([f"sweep={runs}"]) == 0
    out = capsys.readouterr().out
    assert "4 jobs: 3 finished, 1 failed." in out
    assert "Failed                  3: it diverged" in out
    assert "Best heldout_loss_last  1.2000  1" in out
    with (runs / "sweep.csv").open() as file:
        rows = {row["job"]: row for row in csv.DictReader(file)}
    assert list(rows["0"])[:4] == ["job", "lora.rank", "optimizer.learning_rate", "status"]  # model=tiny is no sweep
    assert (rows["1"]["optimizer.learning_rate"], rows["1"]["heldout_loss_last"]) == ("2e-4", "1.2")
    assert (rows["3"]["status"], rows["3"]["error"], rows["3"]["heldout_loss_last"]) == ("failed", "it diverged", "")
    table = [line for line in (runs / "sweep.md").read_text().splitlines() if line.startswith("|")]
    assert [line.split("|")[3].strip(" *") for line in table[2:]] == ["finished"] * 3 + ["failed"]
    assert table[2].startswith("| **8** | **2e-4** |")  # the best comes first, marked
    drawn = {path.name for path in (runs / "plots").iterdir()}
    assert drawn == {
        "parallel_coordinates.png", "lora.rank.png", "optimizer.learning_rate.png", "heldout_loss.png",
    }  # fmt: skip


def test_the_metric_decides_and_throughput_is_better_when_higher(runs, capsys):
    assert main([f"sweep={runs}", "metric=real_tokens_per_second"]) == 0
    assert "Best real_tokens_per_second  900  0" in capsys.readouterr().out
    assert main([f"sweep={runs}", "metric=heldout"]) == 2
    assert "metric=heldout: no run has it; there are " in capsys.readouterr().err


def test_a_bar_in_an_override_or_an_error_stays_in_its_cell(runs):
    for name, project in {"0": "a|b", "3": "*c*"}.items():
        path = runs / name / "overrides.yaml"
        path.write_text(yaml.safe_dump([*yaml.safe_load(path.read_text()), f"tracker.project='{project}'"]))
    Result(status="failed", error="shapes (2|3)\nand more").write(runs / "3/result.json")
    assert main([f"sweep={runs}"]) == 0
    table = MarkdownIt("commonmark").enable("table").render((runs / "sweep.md").read_text())
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
    head, *cells = rows
    assert {len(row) for row in rows} == {len(head)}
    found = {row[head.index("tracker.project")] for row in cells}
    assert found == {"a|b", "", "*c*"}
    assert cells[-1][-1] == "shapes (2|3) and more"


def test_what_is_no_sweep_is_refused(tmp_path, capsys):
    assert main([f"sweep={tmp_path}"]) == 2
    assert "has neither sweep.json nor run folders" in capsys.readouterr().err
    assert main([]) == 2
    assert "give exactly one of sweep=<folder>" in capsys.readouterr().err
    assert main([f"sweep={tmp_path}/absent"]) == 2
    assert "no such folder" in capsys.readouterr().err
