"""Plan checks: what the planner says of a job, and what is said where there is no planner."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma4_tpu.config.load import to_yaml
from gemma4_tpu.sweeping import plan_check
from gemma4_tpu.tracking.files import read_json
from gemma4_tpu.train import load_train

GIB = 2**30


@pytest.fixture
def installed(monkeypatch):
    """Says whether libtpu is."""
    find = importlib.util.find_spec

    def answer(there):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: there if name == "libtpu" else find(name, *more)
        )

    return answer


def job(*words: str):
    return load_train(["model.path=random:0", *words]).root


@pytest.mark.parametrize(
    ("used_gib", "fits", "told"),
    [
        (9, True, "fits: 9.00 GiB of 31.25 GiB HBM per chip (estimated by the TPU compiler)"),
        (40, False, "the step needs 40.0 GiB, there are 31.25 GiB of HBM per v6e chip (the compiler's figures)"),
    ],
)
def test_the_planner_decides(installed, monkeypatch, tmp_path, used_gib, fits, told):
    installed(True)
    planned = []

    def plan_one(given):
        planned.append(given.config)
        return SimpleNamespace(
            fits=fits, hbm_bytes_per_chip=used_gib * GIB, hbm_limit_bytes_per_chip=int(31.25 * GIB), slice="v6e-1",
            message="out of memory", rollouts={},
        )  # fmt: skip

    monkeypatch.setattr("gemma4_tpu.planning.attempt.plan_one", plan_one)
    config = job("hardware=v6e1", "lora.rank=48", "trainer.microbatches=2", "data.max_rows=100")
    (tmp_path / "job.yaml").write_text(to_yaml(config))
    plan_check.main(tmp_path / "job.yaml", tmp_path / "answer.json")
    assert read_json(tmp_path / "answer.json") == {"fits": fits, "told": told}
    (given,) = planned  # the job's own step, not that of the planner's defaults
    assert (given.lora, given.trainer, given.data) == (config.lora, config.trainer, config.data)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "hardware=local is not a slice"),
        (["hardware=h200"], "h200 has GPUs, for which there is no compiler here"),
        (["hardware=v6e1"], "libtpu is not installed (pip install 'gemma4-tpu[tpu]')"),
    ],
)
def test_what_can_not_be_planned_is_said(installed, words, told):
    installed(None)
    verdict = plan_check.check_fit(job(*words), "auto", Path("absent"), lambda: False)
    assert verdict == plan_check.Fit(None, f"not checked: {told}")
