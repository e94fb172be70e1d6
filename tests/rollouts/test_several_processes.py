"""Roll-outs of several processes: the very numbers of one, and each answer judged once."""

import json

import pytest

from tests.rollouts.test_runs import FUNCTION, metrics
from tests.training.conftest import cache, shallow  # noqa: F401 (fixtures)
from tests.training.test_hosts import on_meshes, weights

MESHES = ("2x1x1x1", "1x1x2x1")
RECORDS = ("certificate.json", "certificate.jsonl", "validation.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_draw_judge_and_learn_what_one_does(shallow, tmp_path, monkeypatch):  # noqa: F811
    """Answers are drawn by both, on rows that lie with either or with parts of a model in each; process 0 judges."""
    for count in (1, 2):
        monkeypatch.setenv("NOTES", str(tmp_path / f"notes_{count}"))
        on_meshes(shallow, tmp_path / str(count), count, 2, MESHES, *FUNCTION, "trainer.max_updates=3")
    judged = [sorted((tmp_path / f"notes_{count}").read_text().splitlines()) for count in (1, 2)]
    assert judged[0] == judged[1]
    for mesh in MESHES:
        one, two = tmp_path / "1" / mesh, tmp_path / "2" / mesh
        assert metrics(one) == metrics(two) and weights(one) == weights(two), mesh
        assert json.loads((one / "certificate.json").read_text())["holds"]
        for path in (*RECORDS, *(path.relative_to(one) for path in (one / "rollouts").iterdir())):
            assert sorted((one / path).read_text().splitlines()) == sorted((two / path).read_text().splitlines()), path
