"""`eval=accuracy` on rows with pictures: what a server is sent, what a model in this process answers, who refuses."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from gemma4_tpu import Gemma4
from gemma4_tpu.evals.scores import EvaluationOutcome
from gemma4_tpu.evaluate import main
from tests.evals.server import Server

ASK = "Which colour is it?"


@pytest.fixture
def evaluate(capsys):
    """Runs the command; returns (exit code, what it printed)."""

    def run(*words):
        capsys.readouterr()
        code = main(["eval=accuracy", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def _turned_photo(path):
    """A JPEG on its side, with the EXIF entry that says so."""
    exif = Image.Exif()
    exif[274] = 6
    Image.linear_gradient("L").resize((40, 20)).convert("RGB").save(path, exif=exif)


@pytest.fixture
def rows(tmp_path):
    """Of one picture each: a plain PNG, a transparent one, a photo on its side."""
    Image.new("RGB", (20, 30), (200, 30, 30)).save(tmp_path / "red.png")
    Image.new("RGBA", (20, 30), (30, 30, 200, 0)).save(tmp_path / "blue.png")
    _turned_photo(tmp_path / "grey.jpg")
    path = tmp_path / "rows.jsonl"
    with path.open("w") as out:
        for name in ("red.png", "blue.png", "grey.jpg"):
            content = [{"type": "image", "path": name}, {"type": "text", "text": ASK}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": name.partition(".")[0]}]
            row = {"messages": turns, "colours": ["red", "blue", "grey"], "kind": name[-3:]}
            out.write(json.dumps(row) + "\n")
    return path


def _sent(body):
    """The picture that a server would decode from a request."""
    picture, *texts = body["messages"][0]["content"]
    head, _, data = picture["image_url"]["url"].partition(",")
    assert picture["type"] == "image_url" and head.startswith("data:image/") and head.endswith(";base64")
    assert [part["type"] for part in texts] == ["text"] * len(texts) and texts[0]["text"] == ASK
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_server_is_sent_pictures_as_openai_has_them(tmp_path, evaluate, rows):
    def answer(body, _):
        image = _sent(body)
        assert image.mode in ("RGB", "L")  # nothing is left to how it treats transparency
        red, _, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
        return "red" if red > blue + 50 else "blue" if blue > red + 50 else f"grey {image.width}x{image.height}"

    with Server(answer) as server:
        words = [f"eval.problems_path={rows}", f"eval.endpoint={server.url}", "eval.answers.category=kind"]
        code, said = evaluate(*words, f"run_dir={tmp_path / 'free'}")
        assert code == 0, said
        found = EvaluationOutcome.read(tmp_path / "free/result.json")
        assert found.classes == {"pass": 2, "wrong": 1}
        assert "'grey 20x40', expected 'grey'" in (tmp_path / "free/report.md").read_text()  # turned upright
        assert "[picture]" in (tmp_path / "free/report.md").read_text()
        assert "'kind' not used" not in said and "'colours' not used" in said

        code, said = evaluate(*words, "eval.answers.choices=colours", f"run_dir={tmp_path / 'letters'}")
        assert code == 0, said
    assert "B. blue" in server.bodies[-1]["messages"][0]["content"][-1]["text"]


def test_a_server_that_reads_no_pictures_ends_the_evaluation_with_one_message(tmp_path, evaluate, rows):
    with Server(lambda *_: (400, {"error": {"message": "At most 0 image(s) may be provided"}})) as server:
        code, said = evaluate(f"eval.problems_path={rows}", f"eval.endpoint={server.url}", f"run_dir={tmp_path / 'e'}")
        assert code == 2 and "none of 3 answers arrived" in said and "At most 0 image(s)" in said, said
        likelihoods = ["eval.answers.choices=colours", "eval.answers.choose=logprob", "model.tokenizer=embedded:tiny"]
        asked = len(server.bodies)
        words = [f"eval.problems_path={rows}", f"eval.endpoint={server.url}", *likelihoods]
        code, said = evaluate(*words, f"run_dir={tmp_path / 'f'}")
    assert code == 2 and "these questions have pictures" in said and len(server.bodies) == asked, said


def test_a_model_of_text_refuses_pictures(tmp_path, evaluate, rows):
    words = [f"eval.problems_path={rows}", "model=tiny", "model.path=embedded:tiny", f"run_dir={tmp_path / 'e'}"]
    code, said = evaluate(*words)
    assert code == 2 and "pictures" in said, said
    code, said = evaluate(*words, f"eval.image_cache={rows}")
    assert code == 2 and f"eval.image_cache={rows}: is a file" in said, said


@pytest.mark.slow
def test_the_sampler_answers_and_scores_by_what_it_sees(tmp_path, evaluate, base):
    """As `Gemma4.generate` answers; likelihoods follow the picture; a second evaluation finds the features."""
    rng, names = np.random.default_rng(0), ["red circle", "blue square"]
    conversations, rows = [], []
    for number, name in enumerate(names):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (96 * (number + 1), 96, 3), np.uint8)).save(path)
        question = {"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": ASK}]}
        conversations.append([question])
        rows.append({"messages": [question, {"role": "assistant", "content": name}], "names": names})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"eval.problems_path={file}", "model=tiny_e2b", f"model.path={base}", f"eval.image_cache={tmp_path / 'c'}"]

    def samples(name, *more):
        code, said = evaluate(*words, f"run_dir={tmp_path / name}", *more)
        assert code == 0, said
        found = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        return said, sorted(found, key=lambda sample: sample["problem"])  # which begins with the row's number

    said, answers = samples("free", "eval.max_new_tokens=3")
    assert "2 made" in said and "[picture of 64 tokens]" in (tmp_path / "free/report.md").read_text()
    model = Gemma4.load(base, pictures=True)
    assert [one["completion"] for one in answers] == model.generate(conversations, max_new_tokens=3)
    said, scored = samples("scored", "eval.answers.choices=names", "eval.answers.choose=logprob")
    assert "0 made" in said
    first, second = ([choice["logprob"] for choice in one["choices"]] for one in scored)
    assert np.abs(np.subtract(first, second)).min() > 0.01  # nats; the texts are the same, the pictures are not
