"""`python -m gemma4_tpu.evaluate eval=accuracy` on rows of a user; likelihoods: tests/serving/test_local.py."""

import json

import pytest

from gemma4_tpu.evals.scores import EvaluationOutcome
from gemma4_tpu.evaluate import main
from tests.evals.server import Server, completion

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}


@pytest.fixture
def evaluate(capsys):
    """Runs the command; returns (exit code, what it printed)."""

    def run(*words):
        capsys.readouterr()
        code = main(["eval=accuracy", *words])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(body):
    return body["messages"][-1]["content"].split()[-1].rstrip("?")


def test_answers_of_a_server_are_compared_stored_and_judged_anew(tmp_path, evaluate):
    rows = write(
        tmp_path / "rows.jsonl",
        [{"prompt": f"Which colour is {a}?", "completion": b, "where": "up" if a in ("sky", "snow") else "down"}
         for a, b in COLOURS.items()],
    )  # fmt: skip
    answers = {"sky": ("Blue", "stop"), "grass": ("green", "stop"), "snow": ("white", "length"), "coal": (" ", "stop")}

    def answer(body, _):
        text, finish = answers[asked(body)]
        return 200, completion(text, finish)

    folder = tmp_path / "first"
    with Server(answer) as server:
        words = [f"eval.problems_path={rows}", f"eval.endpoint={server.url}", "eval.answers.category=where"]
        code, said = evaluate(*words, f"run_dir={folder}")
        assert code == 0, said
        assert [body["temperature"] for body in server.bodies] == [0] * 4
        assert evaluate(*words, f"run_dir={folder}")[0] == 0
        assert len(server.bodies) == 4  # a second start asks nothing that is stored
    found = EvaluationOutcome.read(folder / "result.json")
    assert found.classes == {"pass": 1, "wrong": 1, "unanswered": 1, "cut off": 1}
    assert {name: round(score.value, 3) for name, score in found.categories().items()} == {"up": 0, "down": 0.5}
    assert "accuracy  0.250" in said
    report = (folder / "report.md").read_text()
    assert "and must then be equal" in report and "## By category" in report and "| official" not in report
    assert "'Blue', expected 'blue'" in report
    assert (folder / "plots/categories.png").stat().st_size > 5000
    assert json.loads((folder / "result.json").read_text())["categories"]["down"]["problems"] == 2

    code, said = evaluate(f"run_dir={folder}", "eval.resimulate=true", "eval.answers.compare=casefold")
    assert code == 0, said
    anew = EvaluationOutcome.read(folder / "result.json")
    assert anew.classes["pass"] == 2
    assert set(anew.categories()) == {"up", "down"}  # what the command line does not name stays as recorded

    with Server(lambda body, _: COLOURS[asked(body)].title()) as server:
        other = tmp_path / "other"
        words = [f"eval.problems_path={rows}", f"eval.endpoint={server.url}", "eval.answers.category=where"]
        assert evaluate(*words, f"run_dir={other}", "eval.answers.compare=casefold")[0] == 0
    code, said = evaluate(f"compare=[{other},{folder}]")
    assert code == 0
    assert "accuracy: A is 0.500 above B" in said and "so there is no sampling error" in said
    assert "of 2 categories the interval excludes 0" in said and "like-for-like" not in said


def test_the_first_20_wrong_answers_are_listed(tmp_path, evaluate):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"{n}?", "completion": str(n)} for n in range(25)])
    with Server(lambda *_: "x") as server:
        folder = tmp_path / "run"
        code, said = evaluate(f"eval.problems_path={rows}", f"eval.endpoint={server.url}", f"run_dir={folder}")
    assert code == 0, said
    assert (folder / "report.md").read_text().count("'x', expected '") == 20


def test_letters_are_generated_for_listed_choices(tmp_path, evaluate):
    choices = sorted(COLOURS.values())
    rows = write(
        tmp_path / "rows.jsonl", [{"question": f"{a}?", "options": choices, "answer": b} for a, b in COLOURS.items()]
    )
    with Server(lambda body, _: "B.") as server:
        words = [f"eval.problems_path={rows}", f"eval.endpoint={server.url}", "eval.answers.choices=options"]
        code, said = evaluate(*words, f"run_dir={tmp_path / 'run'}")
    assert code == 0, said
    found = EvaluationOutcome.read(tmp_path / "run/result.json")
    assert found.classes == {"pass": 1, "wrong": 3} and found.answers["chance"] == 0.25
    assert all(
        "\n\nA. black\nB. blue\nC. green\nD. white\n\n" in body["messages"][0]["content"] for body in server.bodies
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["eval.problems_path=absent.jsonl"], "eval.problems_path=absent.jsonl: no such file"),
        (["eval.answers.extract='('"], "eval.answers.extract=(: must be a regular expression"),
        (["eval.answers.compare=numbers"], "did you mean eval.answers.compare=number?"),
        (["eval.answers.choose=logprob"], "only with eval.answers.choices=<column>"),
        (["eval.answers.choices=c", "eval.answers.choose=logprob"], "give model.tokenizer="),
        (["eval.second_opinion=true"], "only for simulated designs"),
        (["selfcheck=true"], "simulates nothing"),
    ],
)
def test_refusals_name_the_key_and_what_would_work(evaluate, words, told):
    code, said = evaluate("eval.endpoint=http://127.0.0.1:9/v1", *words)
    assert code == 2 and told in said, said
