"""The distillation of experiments/distill_smoke in short form, and what its record says."""

import json
import re
from pathlib import Path

import pytest

from experiments.distill_smoke.divergence import divergences
from tests.training.conftest import cache, train  # noqa: F401 (fixtures)

FOLDER = Path(__file__).parents[2] / "experiments/distill_smoke"
SHORT = ["data.heldout=[]", "data.max_rows=200", "optimizer.warmup_updates=0", "checkpoint.keep_best=false"]


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_on_prompts_that_it_has_not_seen(train, tmp_path):  # noqa: F811
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    train(*SHORT, "trainer.max_updates=8", "optimizer.learning_rate=1e-2", f"run_dir={teacher}", cwd=tmp_path)
    train(
        *SHORT, "objective=distill", f"objective.teacher={teacher}", "rollouts.prompts=8", "rollouts.samples=2",
        "rollouts.new_tokens=32", "rollouts.slots=16", "rollouts.max_kl=null", "trainer.max_updates=4",
        "trainer.global_batch_sequences=8", "trainer.microbatches=2", "lora.rank=4", "optimizer.learning_rate=1e-2",
        f"run_dir={student}", cwd=tmp_path,
    )  # fmt: skip
    assert json.loads((student / "certificate.json").read_text())["holds"]
    found = divergences(["embedded:tiny", str(student)], str(teacher), prompts=16, new_tokens=32)
    before, after = found["embedded:tiny"], found[str(student)]
    assert after["kl"] < 0.9 * before["kl"]  # 0.64 → 0.14 in the full form


def test_the_record_says_what_its_page_says():
    record, page = json.loads((FOLDER / "record.json").read_text()), (FOLDER / "README.md").read_text()
    for name in ("start", "distilled", "tuned"):
        kl, score = record["divergence"][name], record["pass_at_1"][name]
        assert f"{kl['kl']:.3f}" in page and f"[{kl['low']:.3f}, {kl['high']:.3f}]" in page
        assert f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in page


def test_what_docs_show_of_the_certificate_is_in_it():
    record = json.loads((FOLDER / "certificate.json").read_text())
    (shown,) = re.findall(r"```json\n(.*?)```", (FOLDER.parents[1] / "docs/concepts/certificate.md").read_text(), re.S)
    for name, value in json.loads(shown).items():
        assert record[name] == (record[name] | value if isinstance(value, dict) else value), name
    assert record["holds"]
