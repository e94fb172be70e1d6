"""What is scanned is what the simulator reads: random texts through its own preprocessor."""

import re
import subprocess
from random import Random

from gemma4_tpu.evals.verilog.iverilog import find_tools
from gemma4_tpu.evals.verilog.scan import blank, canonical, forbidden
from tests.evals.verilog.designs import needs_iverilog

PIECES = (
    "force x;", "wire a;", " ", "\n", "\r", "\r\n", "\t", "\f", "\v", "\\", '"', '""', '"a"', '"//"', '"/*"', '"\\""',
    '"\\\\"', "//", "/*", "*/", "/", "*", "(*", "*)", "'", "\\a ", "\\a\n", '\\a" ', "\\a// ", "\\a/*", "\u2028",
    "\x85", "\xa0", "\x1c", "\ufeff", "é", "\\\n", "$x", "#1", "8'hff", "// note\n", "/* note */", "/*\n*/", "`", "``",
)  # fmt: skip
COUNT = 200


def readable_texts(rng):
    """Random texts that the scanner takes as readable in only one way."""
    found = []
    while len(found) < COUNT:
        text, trouble = canonical("".join(rng.choice(PIECES) for _ in range(rng.randrange(2, 12))))
        if trouble is None and "`" not in blank(text)[0]:
            found.append(text)
    return found


@needs_iverilog
def test_the_preprocessor_finds_nothing_to_take_out_of_the_canonical_text(tmp_path):
    """It takes out comments and directives: where it saw one, scanner and simulator would disagree on what is code."""
    iverilog = find_tools(None).iverilog
    for number, text in enumerate(readable_texts(Random(0))):
        (tmp_path / "in.sv").write_text(text + "\nEND_OF_TEXT\n", encoding="utf-8", newline="")
        command = [iverilog, "-g2012", "-E", "-o", "out.sv", "in.sv"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False)
        out = (tmp_path / "out.sv").read_text(encoding="utf-8")
        kept = re.sub(r"^`line .*\n", "", out, flags=re.MULTILINE)
        assert done.returncode == 0, (number, text, done.stderr)
        assert kept.split() == [*text.split(), "END_OF_TEXT"], (number, text)


@needs_iverilog
def test_the_compiler_sees_every_statement_that_the_scanner_sees(tmp_path):
    """`force` of an unknown name is a word that the compiler complains of: both find it in the same texts."""
    iverilog, rng = find_tools(None).iverilog, Random(1)
    seen = 0
    around = ("", "//", "/* */", "/*", "*/", '"', '\\" ', '"a"', "\n", "\r", "\\a ", "\\a\u2028", "(* b *)", '"\\\\"')
    for _ in range(150):
        before, behind = ("".join(rng.choice(around) for _ in range(rng.randrange(4))) for _ in range(2))
        text, trouble = canonical(f"module m;\n{before} initial force hidden = 1; {behind}\nendmodule\n")
        if trouble:
            continue
        (tmp_path / "in.sv").write_text(text, encoding="utf-8", newline="")
        command = [iverilog, "-g2012", "-t", "null", "-s", "m", "in.sv"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False)
        if "hidden" in done.stderr:
            assert forbidden(text) == "statement force", text
            seen += 1
        elif done.returncode == 0:
            assert forbidden(text) is None, text
    assert seen >= 10
