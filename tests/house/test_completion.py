"""Completion: installed by its one command, then asked by a key press in the real shells."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest

from gemma4_tpu import completion
from tests.house.scripts import ROOT

TYPED = {
    "gemma4-tpu ju": "gemma4-tpu judge ",
    "gemma4-tpu launch tp": "gemma4-tpu launch tpu_vm ",
    "gemma4-tpu train lora.al": "gemma4-tpu train lora.alpha=",
    "gemma4-tpu train data=chat": "gemma4-tpu train data=chat_jsonl ",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder where nothing is set up, and `gemma4-tpu` of this checkout on PATH."""
    program = tmp_path / "bin/gemma4-tpu"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m gemma4_tpu "$@"\n')
    program.chmod(0o755)
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return tmp_path


def pressed(command: list[str], line: str) -> str:
    """The command line that an interactive shell shows after `line` and Tab."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="dumb", COLUMNS="200")
        os.execvp(command[0], command)
    try:
        read_until(terminal, "> ")
        os.write(terminal, f"{line}\t".encode())
        return read_until(terminal, TYPED[line])
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def read_until(terminal: int, wanted: str, seconds: float = 120) -> str:
    shown, ends = "", time.monotonic() + seconds
    while wanted not in shown and time.monotonic() < ends:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace").replace("\a", "")  # bells
    return shown


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_tab_completes_after_one_command(shell, home, monkeypatch, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    startup = home / f".{shell}rc"
    startup.write_text("PS1='> '")
    assert completion.main(["--install"]) == completion.main(["--install"]) == 0
    assert "Open a new shell" in capsys.readouterr().out
    lines = startup.read_text().splitlines()
    assert lines[0] == "PS1='> '" and len(lines) == (1 if shell == "fish" else 2)
    for line, completed in TYPED.items():
        if shell == "fish":  # by the command that fish has for this: it asks a terminal more than a test can answer
            asked = ["fish", "-c", f"complete -C '{line}'"]
            said = subprocess.run(asked, capture_output=True, text=True, timeout=120).stdout.splitlines()
            assert [word.split("\t")[0] for word in said] == [completed.split()[-1]]
        else:
            flags = ["-i"] if shell == "bash" else ["-i", "-o", "no_global_rcs"]
            assert completed in pressed([shell, *flags], line)


def test_a_shell_that_is_not_known_is_one_message(monkeypatch, capsys):
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert completion.main(["--install"]) == 2
    assert "SHELL=/bin/tcsh: no completion for this shell; name bash, zsh, fish" in capsys.readouterr().err
