"""`python -m gemma4_tpu.evaluate` as a user runs it, with the real simulator: every form, kills, judging again."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma4_tpu.assets import ROOT
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.evals.scores import EvaluationOutcome
from gemma4_tpu.evals.verilog.mutants import mutants
from gemma4_tpu.evaluate import main
from tests.evals.server import Server, completion
from tests.export.runs import make_run

PROBLEMS = gzip.decompress((ROOT / "verilog_smoke/heldout_problems.jsonl.gz").read_bytes()).decode()
ROWS = [json.loads(line) for line in PROBLEMS.splitlines()]
COUNT = 6  # problems


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def evaluate(cache, capsys):
    """Runs the command; returns (exit code, what it printed)."""

    def run(*words):
        capsys.readouterr()
        code = main([*words, f"eval.judge.cache_dir={cache}", "eval.judge.workers=2"])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def fenced(module: str) -> str:
    return f"Here it is:\n```verilog\n{module}```\n"


def write_samples(path: Path, samples: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"problem": p, "completion": c}) + "\n" for p, c in samples))
    return path


def passes(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: (p.passed, p.n) for name, p in EvaluationOutcome.read(folder / "result.json").problems.items()}


@pytest.fixture
def judged(tmp_path, evaluate):
    """An evaluation of a file: the reference, a mutant of it and prose, for each problem but the last."""
    samples = []
    for row in ROWS[: COUNT - 1]:
        mutant = mutants(row["reference"])[0]
        samples += [(row["id"], fenced(text)) for text in (row["reference"], mutant)] + [(row["id"], "I don't know.")]
    path = write_samples(tmp_path / "made.jsonl", samples)
    folder = tmp_path / "judged"
    code, said = evaluate(f"eval.samples={path}", f"run_dir={folder}", f"eval.max_problems={COUNT}")
    assert code == 0, said
    return folder, said


def test_samples_from_elsewhere_are_judged_and_reported(judged):
    folder, said = judged
    names = [row["id"] for row in ROWS[:COUNT]]
    assert passes(folder) == {**dict.fromkeys(names[:-1], (1, 3)), names[-1]: (0, 3)}
    verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert sorted(v["kind"] for v in verdicts) == ["mismatch"] * 5 + ["no result"] * 5 + ["pass"] * 5
    assert {"problem", "sample", "kind", "official", "refused_by"} <= set(verdicts[0])
    report = (folder / "report.md").read_text()
    assert "Never obtained, and counted as failures: 3." in report
    assert f"pass@1  {5 / 18:.3f}" in said
    assert (folder / "plots/problems.png").stat().st_size > 5000
    assert json.loads((folder / "selfcheck.json").read_text())["simulator"].startswith("Icarus")
    assert json.loads((folder / "provenance.json").read_text())["fingerprints"]["problems"]


def test_stored_samples_are_judged_again(judged, evaluate):
    folder, _ = judged
    before, verdicts = passes(folder), folder / "verdicts.jsonl"
    lines = verdicts.read_text().splitlines()
    verdicts.write_text("\n".join(line.replace('"mismatch"', '"pass"') for line in lines) + "\n")
    code, said = evaluate(f"run_dir={folder}", "eval.resimulate=true")
    assert code == 0, said
    assert passes(folder) == before
    assert '"mismatch"' in verdicts.read_text()


def test_two_evaluations_are_compared_in_words(judged, tmp_path, evaluate):
    folder, _ = judged
    path = write_samples(tmp_path / "good.jsonl", [(row["id"], fenced(row["reference"])) for row in ROWS[:COUNT]] * 3)
    other = tmp_path / "other"
    assert evaluate(f"eval.samples={path}", f"run_dir={other}", f"eval.max_problems={COUNT}")[0] == 0
    code, said = evaluate(f"compare=[{other},{folder}]")
    assert code == 0
    assert f"A is {1 - 5 / 18:.3f} above B" in said
    assert "cannot be attributed to any of these" in said


def test_a_server_is_evaluated_and_what_never_came_counts_as_failed(tmp_path, evaluate):
    references = {row["prompt"].strip(): row["reference"] for row in ROWS[:COUNT]}
    lost = ROWS[1]["prompt"].strip()

    def answer(body, _):
        prompt = body["messages"][-1]["content"].strip()
        if prompt == lost:
            return 400, {"error": "too long"}
        return 200, completion(fenced(references[prompt]), finish="length" if body["seed"] % 2 else "stop")

    with Server(answer) as server:
        code, said = evaluate(
            f"eval.endpoint={server.url}", f"run_dir={tmp_path / 'served'}", f"eval.max_problems={COUNT}", "eval.n=2"
        )
    assert code == 0, said
    found = EvaluationOutcome.read(tmp_path / "served/result.json")
    assert [p.passed for p in found.problems.values()] == [2, 0, 2, 2, 2, 2]
    assert found.missing == 2
    cut_off = sum(body["seed"] % 2 for body in server.bodies if body["messages"][-1]["content"].strip() != lost)
    assert found.truncated == cut_off


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_result(tmp_path, cache):
    """kill -9 while a server answers; the second start asks only for what is not stored."""
    references = {row["prompt"].strip(): row["reference"] for row in ROWS[:COUNT]}

    def answer(body, _):
        reference = references[body["messages"][-1]["content"].strip()]
        return fenced(reference if body["seed"] % 3 else mutants(reference)[0])

    with Server(answer, delay_seconds=0.2) as server:
        command = [
            sys.executable, "-m", "gemma4_tpu.evaluate", f"eval.endpoint={server.url}", f"eval.max_problems={COUNT}",
            "eval.n=4", "eval.concurrency=1", f"eval.judge.cache_dir={cache}", "eval.judge.workers=2",
        ]  # fmt: skip
        folder = tmp_path / "killed"
        samples = folder / "samples.jsonl"
        process = subprocess.Popen([*command, f"run_dir={folder}"], stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 300
        while not (samples.exists() and samples.read_text().count("\n") >= 5) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        stored = samples.read_text().count("\n")
        with samples.open("a") as file:
            file.write('{"problem": "heldout_wi')
        asked = len(server.bodies)
        done = subprocess.run([*command, f"run_dir={folder}"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert 5 <= stored < 24
        bodies = server.bodies[asked:]
        different = {(body["messages"][-1]["content"], body["seed"]) for body in bodies}
        assert len(different) == 24 - stored
        assert len(bodies) - len(different) in (0, 1)  # the last request of the one that was killed may come late
        again = tmp_path / "whole"
        faster = ["eval.concurrency=8", f"run_dir={again}"]  # may change, as it decides nothing
        assert subprocess.run([*command, *faster], capture_output=True, timeout=300).returncode == 0
    assert passes(folder) == passes(again)
    assert EvaluationOutcome.read(folder / "result.json").missing == 0


@pytest.mark.slow
def test_a_run_is_evaluated_beside_its_base(tmp_path, evaluate):
    """Random adapters on the embedded base: both sides drawn, judged and paired; a second start has nothing to do."""
    run = make_run(tmp_path / "run", ROOT / "tiny", lora=LoraConfig(rank=4), name="tiny")
    words = [
        f"run={run}", f"run_dir={tmp_path / 'evaluation'}", "eval.max_problems=3", "eval.n=2", "eval.batch_size=4",
        "eval.max_new_tokens=24",
    ]  # fmt: skip
    code, said = evaluate(*words)
    assert code == 0, said
    folder = tmp_path / "evaluation"
    run_rows, base_rows = (
        [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
        for place in (folder, folder / "base")
    )
    for rows in (run_rows, base_rows):
        assert sorted((row["problem"], row["sample"]) for row in rows) == sorted(
            (row["id"], i) for row in ROWS[:3] for i in range(2)
        )
        assert all(row["tokens"] == 24 for row in rows if row["finish"] == "length")
    assert [r["completion"] for r in run_rows] != [r["completion"] for r in base_rows]
    report = (folder / "report.md").read_text()
    assert "<bos><|turn>user" in report and "What can be claimed" in report
    before = (folder / "samples.jsonl").read_bytes()
    assert evaluate(*words)[0] == 0
    assert (folder / "samples.jsonl").read_bytes() == before
    code, said = evaluate(*[w for w in words if not w.startswith("eval.n=")], "eval.n=3")
    assert code == 2 and "eval.n: 3 (the run has 2)" in said


def test_a_leaked_thought_is_a_class_of_its_own_and_never_code(tmp_path, evaluate):
    """A server without its reasoning parser: the channel's control tokens are gone, its text is not."""
    references = {row["prompt"].strip(): row["reference"] for row in ROWS[:2]}

    def answer(body, _):
        reference = references[body["messages"][-1]["content"].strip()]
        return 200, completion(f"thought\nSomething like {fenced('module TopModule; endmodule')}{fenced(reference)}")

    with Server(answer) as server:
        words = [f"eval.endpoint={server.url}", f"run_dir={tmp_path / 'served'}", "eval.max_problems=2", "eval.n=1"]
        code, said = evaluate(*words)
    assert code == 0, said
    assert passes(tmp_path / "served") == {row["id"]: (0, 1) for row in ROWS[:2]}
    assert EvaluationOutcome.read(tmp_path / "served/result.json").classes == {"leaked thought": 2}
    assert "--reasoning-parser gemma4" in (tmp_path / "served/report.md").read_text()


def test_second_opinions_stand_beside_the_score_and_name_who_differs(tmp_path, evaluate):
    """A weak bench: one problem's stimulus is compared only at its first value, so that a mutant passes it."""
    row = next(row for row in ROWS if "_gate_" in row["id"])
    name, wrong = row["id"], mutants(row["reference"])[0]
    weak = row["testbench"].replace("if (!tb_match) begin", "if (!tb_match && stats1.clocks < 2) begin")
    assert weak != row["testbench"]
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({**row, "testbench": weak}) + "\n")
    path = write_samples(tmp_path / "made.jsonl", [(name, fenced(row["reference"])), (name, fenced(wrong))])
    folder = tmp_path / "run"
    code, said = evaluate(
        f"eval.samples={path}", f"run_dir={folder}", f"eval.problems_path={problems}", "eval.stimulus_seed=3",
        "eval.second_opinion=true",
        "eval.columns=[lint,size]",
    )  # fmt: skip
    assert code == 0, said
    found = EvaluationOutcome.read(folder / "result.json")
    assert (found.problems[name].passed, found.problems[name].confirmed) == (2, 1)
    assert [(row["sample"], row["second"]) for row in found.second["disagreements"]] == [(1, "differs")]
    assert found.second["seed"] == 3 and name in found.vacuous
    report = (folder / "report.md").read_text()
    assert "1 of 1 benches accept a design that does nothing" in report
    assert "of those that pass, 1 differ from it" in report and "| confirmed |" in report
    assert "1 samples pass but differ from the reference" in said


def test_the_selfcheck_shows_simulator_sandbox_and_references(evaluate):
    code, said = evaluate("selfcheck=true", f"eval.max_problems={COUNT}")
    assert code == 0
    assert "Icarus Verilog" in said
    assert f"{COUNT} of {COUNT}" in said
    assert f"0 of {COUNT} benches accept a design that does nothing" in said
    assert "mutants of the references pass" in said
    assert ("landlock" in said or "bubblewrap" in said) and "(limits: cpu_seconds=" in said
