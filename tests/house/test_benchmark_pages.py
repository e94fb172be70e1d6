"""The pages of benchmarks/: a block of figures names the command that made it, and is replaced as a whole."""

import subprocess
import sys

import pytest

from benchmarks import __main__, pages
from tests.house.scripts import ROOT


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "FOLDER", tmp_path / "benchmarks")
    pages.FOLDER.mkdir()
    path = pages.FOLDER / "speed.md"
    path.write_text(
        "# Speed\n\n<!-- measured: echo '| 7 |' -->\n\nold\n\n<!-- end -->\n\nProse.\n\n"
        "<!-- measured: sh -c 'exit 3' -->\n\nkept\n\n<!-- end -->\n"
    )
    return path


def test_what_a_command_prints_replaces_its_block_unless_it_fails(page, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "speed"])
    assert __main__.main() == 1
    assert page.read_text() == (
        "# Speed\n\n<!-- measured: echo '| 7 |' -->\n\n    echo '| 7 |'\n\n| 7 |\n\n<!-- end -->\n\nProse.\n\n"
        "<!-- measured: sh -c 'exit 3' -->\n\nkept\n\n<!-- end -->\n"
    )
    assert "exit code 3; the page keeps its figures" in capfd.readouterr().out


def test_what_needs_a_variable_is_left_out_without_it(page, monkeypatch, capfd):
    page.write_text("<!-- measured: echo $NOT_SET_HERE -->\n\nold\n\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert __main__.main() == 0 and "old" in page.read_text()
    assert "left out: speed.md, since NOT_SET_HERE is not set" in capfd.readouterr().out


def test_what_needs_a_variable_that_is_not_set_is_a_failure_where_it_was_named(page, monkeypatch, capfd):
    page.write_text("<!-- measured: echo $NOT_SET_HERE -->\n\nold\n\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "speed"])
    assert __main__.main() == 1 and "left out: speed.md, since NOT_SET_HERE" in capfd.readouterr().out


def test_optional_words_are_left_out_alone_and_said_at_the_end(page, monkeypatch, capfd):
    page.write_text("<!-- measured: echo ours [beside $PEER_HERE] -->\n\nold\n\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert __main__.main() == 0
    made = page.read_text()
    assert "\nours\n" in made and "Without `beside $PEER_HERE`" in made and "old" not in made
    assert capfd.readouterr().out.endswith("left out: speed.md: beside $PEER_HERE, since its variable is not set\n")
    monkeypatch.setenv("PEER_HERE", "theirs")
    assert __main__.main() == 0
    assert "\nours beside theirs\n" in page.read_text() and "Without" not in page.read_text()


def test_what_takes_hours_is_measured_only_if_it_is_named(page, monkeypatch, capfd):
    page.write_text("<!-- measured if named: echo new -->\n\nold\n\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert __main__.main() == 0 and "old" in page.read_text()
    assert "left out: speed.md, which takes hours" in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--list"])
    assert __main__.main() == 0 and "(takes hours: only if named)" in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks", "speed"])
    assert __main__.main() == 0 and "\nnew\n" in page.read_text()


def test_every_page_s_command_is_shown_on_it_and_takes_its_words():
    for block in pages.blocks():
        assert f"\n    {block.command}\n" in block.page.read_text(encoding="utf-8")
    listed = subprocess.run([sys.executable, "-m", "benchmarks", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0 and len(listed.stdout.splitlines()) >= 9


@pytest.mark.parametrize("command", ["python -m benchmarks.targets", "python -m benchmarks.slices --render"])
def test_a_table_of_committed_plans_is_as_its_command_prints_it(command):
    (block,) = (block for block in pages.blocks() if block.command == command)
    program = [sys.executable, *command.split()[1:]]
    told = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.strip() in block.page.read_text(), f"make it again: python -m benchmarks {block.page.stem}"
