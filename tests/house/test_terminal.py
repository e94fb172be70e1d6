"""What is read in a terminal: help that fits, and that can be cut short. Runs: tests/training, tests/tracking."""

import os
import subprocess
import sys

import pytest

from gemma4_tpu import __main__ as console_script
from gemma4_tpu.commands import COMMANDS as COMMANDS_BY_WORDS
from gemma4_tpu.commands import TOOLS
from gemma4_tpu.config.help import _WORD, help_text
from gemma4_tpu.launch.tpu_vm import TPU_VM
from tests.house.scripts import ROOT, script

COMMANDS = script("docs/make_configuration.py").COMMANDS


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {TPU_VM.name}))  # its keys are those of train and gke
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_help_fits_into_the_terminal(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = help_text(COMMANDS[name]).splitlines()
    words_alone_too_long = [line for line in lines if len(line) > min(columns, 110) and len(_WORD.findall(line)) > 1]
    assert words_alone_too_long == []
    assert "\x1b" not in "\n".join(lines)


def test_help_can_be_cut_short():
    """`--help | head -1`: no traceback when the reader has seen enough."""
    for words in ("gemma4_tpu.train --help", "gemma4_tpu"):
        command = ["bash", "-c", f"{sys.executable} -m {words} | head -1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ)
        assert done.stdout.startswith("Fine-tune Gemma 4") and done.stderr == ""


def test_gemma4_tpu_alone_is_a_map_on_one_screen(capsys):
    assert console_script.main([]) == console_script.main(["--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    shown = shown[: len(shown) // 2]
    assert len(shown) < 24 and max(map(len, shown)) <= 80
    for name in (*COMMANDS_BY_WORDS, *TOOLS):
        assert len([line for line in shown if line.startswith(f"  {name} ") and line.endswith(".")]) == 1
    assert console_script.main(["plna"]) == 2
    assert "plna: no such command; did you mean plan?" in capsys.readouterr().err
