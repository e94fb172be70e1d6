"""What the preview shows, with colour and without."""

import io
import re
import shutil

import numpy as np
import pytest
from rich.console import Console

from gemma4_tpu.assets import ROOT as ASSETS
from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.build import build_data
from gemma4_tpu.reporting import preview
from gemma4_tpu.train import main
from tests.data.conftest import chat_row
from tests.house.scripts import ROOT


@pytest.fixture
def built_data(tiny_tokenizer, write_jsonl):
    rows = [chat_row("Invert a. [bold]", "assign y = ~a;"), {"messages": []}, chat_row("Beep \x1b[2J", "No.")]
    data = DataConfig(
        train=[DataSource(path=write_jsonl(rows))], sequence_length=128, max_drop_fraction=0.5, packing="true"
    )
    return build_data(data, tiny_tokenizer), data


def shown(built_data, tokenizer, **console):
    out = io.StringIO()
    built, data = built_data
    preview.preview(
        built, data, tokenizer, rows_per_update=2, seed=0, console=Console(file=out, highlight=False, **console)
    )
    return out.getvalue()


def test_without_colour_marks_stand_around_what_is_trained(built_data, tiny_tokenizer):
    text = shown(built_data, tiny_tokenizer)
    assert "<|turn>model\n<|channel>thought\n<channel|>⟦assign y = ~a;<turn|>⟧\n" in text
    assert "[bold]" in text  # rows are text, not markup
    assert "\x1b" not in text  # nor may they steer the terminal
    assert "rows.jsonl:1 · " in text
    assert "training rows read: 3, dropped: 1 (33.3%)" in text
    assert "1 × no_messages" in text
    assert "one pass: 1 updates of 2 rows of 128 tokens; 2 visits" in text


def test_with_colour_it_is_green(built_data, tiny_tokenizer):
    text = shown(built_data, tiny_tokenizer, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;32massign y = ~a;<turn|>\x1b[0m" in text
    assert "⟦" not in text
    assert "\x1b[2J" not in text


def test_no_color_is_respected(built_data, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦assign" in shown(built_data, tiny_tokenizer, force_terminal=True)


def test_histogram_counts_every_length():
    text = preview.histogram(np.array([1, 1, 5, 31]), capacity=32)
    assert sum(int(line.rsplit(" ", 1)[1]) for line in text.splitlines()) == 4
    assert text.splitlines()[0].startswith(" 0-2  █")


def test_command_line(monkeypatch, tmp_path, capsys, write_jsonl):
    monkeypatch.chdir(tmp_path)
    model = "model.path=random:0"
    assert main(["preview=true", model]) == 0
    out = capsys.readouterr().out
    assert "training examples; tokens with loss are inside ⟦…⟧" in out
    assert "fill 9" in out
    assert (tmp_path / "outputs/preview/lengths.png").read_bytes().startswith(b"\x89PNG")
    bad = write_jsonl([chat_row("a", "b"), {}])
    words = [model, "data=chat_jsonl", f"data.train=[{{path: {bad}}}]", "data.heldout_fraction=0"]
    assert main(["preview=true", *words]) == 0
    assert "training would refuse this" in capsys.readouterr().out
    assert main(["preview=true", "data.train=[{path: nowhere.jsonl}]"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_what_is_odd_about_a_template_is_told_before_its_examples(monkeypatch, tmp_path, capsys, write_jsonl):
    folder = shutil.copytree(ASSETS / "tiny", tmp_path / "dated")
    template = folder / "chat_template.jinja"
    template.write_text("{%- set day = strftime_now('%d') -%}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = write_jsonl([chat_row("a", "b"), chat_row("c", "d")])
    words = ["preview=true", "model.path=random:0", "data=chat_jsonl", f"data.train={path}"]
    assert main(words) == 0
    assert "warning: " not in capsys.readouterr().err
    assert main([*words, f"model.tokenizer={folder}"]) == 0
    assert capsys.readouterr().err.count("warning: the chat template writes the time") == 1


def test_the_example_of_the_page_is_what_is_shown(monkeypatch, tmp_path, capsys):
    page = (ROOT / "docs/concepts/proof_of_examples.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^````\n(.*?)^````", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert main(["experiment=smoke", "preview=true"]) == 0
    assert example in capsys.readouterr().out


def test_of_an_on_policy_run_prompts_are_shown(capsys):
    words = ["rollouts.reward=a.b:c", "rollouts.validation_prompts=7", "data.heldout=[]", "data.max_rows=40"]
    assert main(["preview=true", "model.path=random:0", "objective=grpo", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "32 prompts; answers to each are drawn from the policy" in out and "⟦" not in out
    assert "<|turn>model" in out and "reference, which the policy does not see: ```verilog module TopModule" in out
    assert "one pass: 2 updates of 16 prompts × 8 answers of at most 128 tokens; set aside for validation: 7" in out
