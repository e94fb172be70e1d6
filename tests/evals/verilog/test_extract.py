"""Where the code is in what models write."""

import time
from dataclasses import replace

import pytest

from gemma4_tpu.evals.verilog.extract import code_of, extract
from gemma4_tpu.evals.verilog.scan import canonical, forbidden, reachable, without_dumps
from gemma4_tpu.evals.verilog.verilog_eval import make_problem

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
        '`include "x"',
        "`include <x>",
        '`define I `include "x"',
        'a```include "x"',
    ],
)
def test_forbidden_constructs_are_named(code):
    text, trouble = canonical(f"{TOP}\n{code}")
    assert trouble is None and forbidden(text)
    assert "`include" not in text


def test_a_dollar_sign_within_a_name_and_an_odd_escaped_name_are_names():
    text, trouble = canonical("wire a$fopen, \\u/1 , \\force , \\$finish , \\{a}'b ; $dumpall; x = a$dumpall;")
    assert (trouble, forbidden(text)) == (None, None)
    assert without_dumps(text).count("dumpall") == 1


def test_a_form_feed_is_white_space_and_a_pasted_name_is_no_directive():
    assert canonical("wire a;\fwire b; `define P(x) x``include")[0].split() == [
        "wire", "a;", "wire", "b;", "`define", "P(x)", "x``include",
    ]  # fmt: skip


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


LINE = "module TopModule(input a, output y); assign y = a; endmodule"
TICKED = TOP.replace("  assign", "  // as in ```verilog fences``` of Markdown\n  assign")
PASTED = "`define SUFFIX q\n`define NAME(a) a```SUFFIX\n" + TOP
NAMED = "`define NAME TopModule\n" + TOP.replace("TopModule", "`NAME")
COMPARED = TOP.replace("= a", "= (a\n> 1'b0)")


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        (f"Answer: ```verilog {LINE} ``` That's it.", LINE),
        (f"Answer: ```{LINE}```", LINE),
        (f"The ```TopModule``` module:\n```\n{TOP}\n```\nIts ```y``` is a net.", TOP),
        (f"```verilog\n{TICKED}\n```", TICKED),
        (f"```verilog\n{PASTED}\n```", PASTED),
        (f"```verilog\n{TOP}\n```".replace("\n", "\r"), TOP),
        (f"The code -> ```verilog\n{COMPARED}\n```", COMPARED),
        ("\n".join(f">> {line}" for line in f"```verilog\n{COMPARED}\n```".split("\n")), COMPARED),
        ("\n".join(f"> {line}" for line in f"~~~verilog\n{COMPARED}\n~~~".split("\n")), COMPARED),
        (f"~~~markdown\n# Answer\n```verilog\n{TOP}\n```\n~~~", TOP),
    ],
)
def test_fences_are_told_from_what_only_looks_like_them(completion, code):
    assert extract(completion, "TopModule").strip() == code


@pytest.mark.parametrize(
    "between",
    [
        "To avoid the inversion, drive y with a:",
        "The output is never inverted, so:",
        "We don't need the inversion. So the module is:",
        "That was wrong. Here it is again:",
        "Oops, the above is buggy: it inverts. New version:",
        "The first one was bad:",
    ],
)
def test_words_about_the_draft_before_are_no_warning_of_the_code_behind_them(between):
    assert extract(f"Draft:\n```\n{DRAFT}\n```\n{between}\n```\n{TOP}\n```", "TopModule") == TOP


@pytest.mark.parametrize(
    "before",
    [
        "Avoid this:",
        "**Don't** write:",
        "Note that you should not do this:",
        "Never invert here! It fails.",
        "The following would be incorrect, because it inverts:",
        "The version below is not correct:",
        "This is a common mistake:",
    ],
)
def test_code_that_the_words_before_it_warn_of_is_not_the_answer(before):
    assert extract(f"```\n{TOP}\n```\n{before}\n```\n{DRAFT}\n```", "TopModule") == TOP


USER = TOP.replace("= a", "= f(a)")
HELPERS = {
    "package": "package f_pkg;\n  function automatic f(input a); f = a; endfunction\nendpackage\nimport f_pkg::*;",
    "function": "function automatic logic f(input logic a);\n  return a;\nendfunction",
    "macro": "`define f(a) a",
    "parameter": "localparam ONE = 1;\nfunction f(input a);\n  f = a & ONE;\nendfunction : f",
    "type": "typedef struct packed { logic a; } s;\nfunction automatic logic f(input s a); return a.a; endfunction",
    "unit": "timeunit 1ns; timeprecision 1ps;\n/* f is\n   the identity */\nfunction f(input a); f = a; endfunction",
}


@pytest.mark.parametrize("helper", HELPERS.values(), ids=HELPERS)
def test_what_a_module_needs_from_its_file_is_found_in_a_fence_of_its_own_or_without_one(helper):
    whole = f"{helper}\n{USER}"
    user = USER.replace("f(a)", "f_pkg::f(a)") if "f_pkg" in helper else USER
    both = extract(f"First:\n```\n{helper}\n```\nThen:\n```\n{user}\n```", "TopModule")
    assert both == f"{helper}\n\n{user}"
    assert extract(f"The code:\n{whole}\n\nIt's done.", "TopModule") == whole


def test_a_helper_that_the_module_repeats_is_not_added():
    inside = "function f(input a); f = a; endfunction"
    code = USER.replace("  assign", f"  {inside}\n  assign")
    assert extract(f"```\n{inside}\n```\n```\n{code}\n```", "TopModule") == code


@pytest.mark.parametrize(
    "completion",
    [
        f"[BEGIN]\n{TOP}\n[DONE]\nA test bench:\n[BEGIN]\n{BENCH}\n[DONE]",
        f"First try:\n{DRAFT}\nThat inverts. Again:\n{TOP}\n",
        f'{TOP}\n\nThe module works (as asked) on 3" boards; see /* in the manual, and its endmodule.',
        f"<reasoning>\n{DRAFT}\n</reasoning>\n\n{TOP}",
        f"<thinking>\n```\n{DRAFT}\n```\n</thinking>\n\n{TOP}",
        f"[THINK]\n{DRAFT}\n[/THINK]{TOP}",
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{TOP}<|return|>",
        f"{TOP}\nAvoid this:\n{DRAFT}",
    ],
)
def test_without_fences_the_last_stretch_of_code_with_the_module_counts(completion):
    assert extract(completion, "TopModule") == TOP


@pytest.mark.parametrize(
    "code",
    [
        TOP.replace("TopModule ", "TopModule // the top\n"),
        TOP.replace("module TopModule ", "(* keep *)\nmodule /* the */ TopModule /* top */ "),
        TOP.replace("  assign", "  // endmodule?\n  /* endmodule\n  module x( */\n  assign"),
        TOP.replace("endmodule", '  initial $display("endmodule /* module x(");\nendmodule'),
        f"`ifndef TOP\n`define TOP\n{TOP}\n`endif // TOP",
        f"/* module TopModule (x); */\n{TOP} : TopModule",
    ],
)
def test_comments_strings_and_directives_belong_to_the_code_without_a_fence_too(code):
    for completion in (code, f"It's this:\n\n{code}\n\nThe `endmodule` ends the module (as always).\n"):
        assert extract(completion, "TopModule") == code


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        (f"[BEGIN]\n{TOP}\n[DONE]\nTo use it:\n```\nmodule user;\n  TopModule t ();\nendmodule\n```", TOP),
        (f"```\nHere it is (a wire):\n{TOP}\n```", TOP),
        (f"```\n{NAMED}\n```", NAMED),
    ],
)
def test_the_module_is_looked_for_wherever_it_may_be(completion, code):
    assert extract(completion, "TopModule") == code


def test_a_final_module_gets_what_it_uses_from_the_fence_of_its_draft():
    draft, final = DRAFT.replace("assign y = ~a;", "part p (~a, y);"), TOP.replace("assign y = a;", "part p (a, y);")
    for fence in (f"{PART}\n\n{draft}", f"{draft}\n\n{PART}"):
        code = extract(f"Draft:\n```\n{fence}\n```\nWithout the inversion:\n```\n{final}\n```", "TopModule")
        assert code.split() == f"{PART}\n{final}".split()


def test_an_escaped_name_of_the_module_is_its_name():
    escaped = TOP.replace("TopModule ", "\\TopModule ")
    assert extract(escaped, "TopModule") == escaped
    assert reachable(f"{escaped}\n{BENCH}", "TopModule").strip() == escaped


HEADER = "module TopModule (input a, output y);"
BODY = "  assign y = a;\nendmodule"


@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        TOP,
        f"```verilog\n{BODY}\n```",
        f"The body of module TopModule:\n```verilog\n{BODY}\n```",
        f"<|channel>thought\n{DRAFT}\n<channel|>{BODY}",
        f"<think>{HEADER}</think>\n```\n{BODY}\n```",
    ],
)
def test_a_body_follows_the_header_of_the_problem_unless_the_answer_has_one(completion):
    problem = make_problem("p", prompt="", reference="", testbench="")
    assert code_of(completion, replace(problem, header=HEADER)).split() == TOP.split()


FENCES = ("```\n", "~~~\n", "> ```\n", "```\n~~~\n", "```\n`define A 1\n```\n", "``` x ", "> > > ```\n", "~~~\n```\n")
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
    "module x;\nendmodule\n",
    "module x;\nendmodule\nprose\n",
)
WORDS = ("/* ", '"', '"\\"', "`include ", "(* ", "function f;\n", "typedef {", "parameter a", "<thinking>", "It is. ")


@pytest.mark.parametrize("repeated", FENCES + MODULES + WORDS)
def test_a_model_that_repeats_itself_is_read_in_time_that_grows_with_its_length(repeated):
    """Seconds where it was minutes; the service reads completions in one process."""
    text = repeated * (200_000 // len(repeated))
    started = time.process_time()
    code = extract(f"```verilog\nmodule TopModule;\n{text}", "TopModule") or ""
    without_dumps(reachable(canonical(code)[0], "TopModule"))
    assert time.process_time() - started < 10
