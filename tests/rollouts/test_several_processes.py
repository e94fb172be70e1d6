"""Roll-outs of several processes: the very numbers of one, and each answer judged once."""

import json

import pytest

from tests.rollouts.test_runs import FUNCTION, metrics
from tests.training.conftest import cache, shallow  # noqa: F401 (fixtures)
from tests.training.test_hosts import on_meshes, weights

MESH = "2x1x2x1"  # rows lie with either process, weights in two parts
RECORDS = ("certificate.json", "certificate.jsonl", "validation.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_draw_judge_and_learn_what_one_does(shallow, tmp_path, monkeypatch):  # noqa: F811
    """Answers are drawn by both, process 0 judges; exact, as `test_hosts.py` says why."""
    for count in (1, 2):
        monkeypatch.setenv("NOTES", str(tmp_path / f"notes_{count}"))
        on_meshes(shallow, tmp_path / str(count), count, 4, [MESH], *FUNCTION, "trainer.max_updates=3")
    judged = [sorted((tmp_path / f"notes_{count}").read_text().splitlines()) for count in (1, 2)]
    assert judged[0] == judged[1]
    one, two = tmp_path / "1" / MESH, tmp_path / "2" / MESH
    assert metrics(one) == metrics(two) and weights(one) == weights(two)
    assert json.loads((one / "certificate.json").read_text())["holds"]
    for path in (*RECORDS, *(path.relative_to(one) for path in (one / "rollouts").iterdir())):
        assert sorted((one / path).read_text().splitlines()) == sorted((two / path).read_text().splitlines()), path
