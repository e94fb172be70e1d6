"""Where the code is in what models write."""

import time

import pytest

from gemma4_tpu.evals.verilog.extract import extract
from gemma4_tpu.evals.verilog.scan import canonical, forbidden, reachable, without_dumps

TOP = "module TopModule (input a, output y);\n  assign y = a;\nendmodule"
DRAFT = TOP.replace("= a", "= ~a")
PART = "module part (input a, output y);\n  assign y = a;\nendmodule"
BENCH = "module tb;\n  initial $finish;\nendmodule"


@pytest.mark.parametrize(
    "completion",
    [
        TOP,
        f"```verilog\n{TOP}\n```",
        f"```Verilog\n{TOP}\n```",
        f"```systemverilog\n{TOP}\n```",
        f"```SV\n{TOP}\n```",
        f"```v\n{TOP}\n```",
        f"```\n{TOP}\n```",
        f"````verilog\n{TOP}\n````",
        f"   ```verilog\n{TOP}\n   ```",
        f"Here: ```verilog\n{TOP}\n```",
        f"```verilog\n{TOP}```",
        f"```verilog\n{TOP}",
        f"Sure.\n\n{TOP}\n\nIt passes a through.",
        f"```bash\niverilog top.v\n```\n```verilog\n{TOP}\n```",
        f"```verilog\n{DRAFT}\n```\nNo, without the inversion:\n```verilog\n{TOP}\n```",
        f"<think>\n```verilog\n{DRAFT}\n```\n</think>\n```verilog\n{TOP}\n```",
        f"<think>maybe</think><answer>\n```verilog\n{TOP}\n```\n</answer>",
        f"<|channel>thought\n{DRAFT}\n<channel|>```verilog\n{TOP}\n```",
        f"<|channel>thought\n<channel|>{TOP}",
        f"```verilog\n{TOP}\n```\nA test:\n```verilog\nmodule tb;\n  initial",
        f"```verilog\r\n{TOP}\r\n```".replace("\n", "\r\n").replace("\r\r", "\r"),
    ],
)
def test_the_module_is_found(completion):
    assert extract(completion, "TopModule").strip() == TOP


def test_fences_with_different_modules_are_joined():
    user = TOP.replace("assign y = a;", "part p (a, y);")
    both = extract(f"```verilog\n{PART}\n```\nand\n```verilog\n{user}\n```", "TopModule")
    assert PART in both and user in both


def test_what_stands_before_a_bare_module_belongs_to_it():
    code = f"`timescale 1ns/1ps\n{TOP}"
    assert extract(f"The code:\n{code}", "TopModule") == code


def test_a_cut_off_module_is_left_to_the_compiler():
    cut = "module TopModule (input a, output y);\n  assign y"
    assert extract(f"```verilog\n{cut}", "TopModule") == cut
    assert extract(f"It is\n{cut}", "TopModule") == cut


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "I can't.",
        f"<|channel>thought\n{TOP}",
        f"<think>{TOP}",
        "```python\nprint('module')\n```",
        "```verilog\n```",
    ],
)
def test_there_is_no_code(completion):
    assert extract(completion, "TopModule") is None


def test_modules_that_the_design_does_not_use_are_left_out():
    used = TOP.replace("assign y = a;", "part p (a, y);")
    assert reachable(f"{used}\n{PART}\n{BENCH}", "TopModule").strip() == f"{used}\n{PART}"
    assert "package p" in reachable(f"package p; endpackage\n{TOP}\n{BENCH}", "TopModule")
    unbalanced = f"{TOP}\nmodule x;"
    assert reachable(unbalanced, "TopModule") == unbalanced


@pytest.mark.parametrize(
    "code",
    [
        "/* open",
        '"open',
        '"open\n"',
        '"over two\\\nlines"',
        '"""three"""',
        '"a\u0007"',
        '`include "x"',
        "`include <x>",
        "x\0y",
        "x\u00a0y",
        "x\u000by",
        "x\u200by",
        '\\a"b ',
        "\\a/*b ",
        "\\a\u2028b ",
    ],
)
def test_text_that_can_be_read_in_two_ways_is_refused(code):
    assert canonical(f"{TOP}\n{code}")[1]


def test_what_is_compiled_is_the_canonical_text():
    text, trouble = canonical('a // x \u00e9\u0001\rb\r\nc /* \u2028 */ d "\u00e9 // "')
    assert trouble is None
    assert [line.split() for line in text.split("\n")] == [["a"], ["b"], ["c", "d", '"\u00e9', "//", '"']]


@pytest.mark.parametrize(
    "code",
    [
        "$fopen",
        "#1$fopen",
        "12a$fclose",
        "4'h A$fclose",
        "'x$fclose",
        "1'b0$system",
        "$readmemh",
        "$root.tb",
        "$unit::x",
        "`define X",
        "`X",
        "force x = 0",
    ],
)
def test_forbidden_constructs_are_named(code):
    assert forbidden(f"{TOP}\n{code}")


def test_a_dollar_sign_within_a_name_and_an_odd_escaped_name_are_names():
    text, trouble = canonical("wire a$fopen, \\u/1 , \\force , \\$finish , \\{a}'b ; $dumpall; x = a$dumpall;")
    assert (trouble, forbidden(text)) == (None, None)
    assert without_dumps(text).count("dumpall") == 1


SOLUTION = "module TopModule (input a, output b);\n  assign b = ~a;\nendmodule"
SKELETON = "module TopModule (input a, output b);\n  wire unused;\n  // here\nendmodule"


@pytest.mark.parametrize(
    "answer",
    [
        f"```\n{SOLUTION}\n```\nIts interface, again:\n```\n{SKELETON}\n```",
        f"```\n{SOLUTION}\n\nThis inverts a; it's simple.\n```",
        f"The module TopModule (as asked) inverts.\n\n{SOLUTION}\n",
        f"module TopModule (the inverter) follows:\n\n{SOLUTION}\nDone.",
    ],
)
def test_what_only_speaks_of_the_module_is_not_taken_for_it(answer):
    assert extract(answer, "TopModule") == SOLUTION


def test_a_module_that_has_to_be_empty_is_found_and_what_stands_behind_modules_is_kept():
    assert extract(f"```\n{SKELETON}\n```", "TopModule") == SKELETON
    guarded = f"`ifndef A\n{SOLUTION} : TopModule\n`endif"
    assert extract(f"```\n{guarded}\n```", "TopModule") == guarded


def test_comments_and_strings_are_no_constructs():
    assert forbidden(f'{TOP}\n// $finish `X\n/* $fopen */ "$finish"; $display("x"); q[$]') is None


FENCES = ("```\n", "~~~\n", "> ```\n", "```\n~~~\n", "```\n`define A 1\n```\n")
MODULES = (
    "module x\n",
    "module x (",
    "module x #(a(b(c(",
    "module x (a); wire ",
    "module x;",
    "module ",
    "module a module ",
    "$dumpvars(",
    "$dumpvars" + " " * 64,
)


@pytest.mark.parametrize("repeated", FENCES + MODULES)
def test_a_model_that_repeats_itself_is_read_in_time_that_grows_with_its_length(repeated):
    """Seconds where it was minutes; the service reads completions in one process."""
    text = repeated * (200_000 // len(repeated))
    started = time.process_time()
    code = extract(f"```verilog\nmodule TopModule;\n{text}", "TopModule") or ""
    without_dumps(reachable(canonical(code)[0], "TopModule"))
    assert time.process_time() - started < 10
