"""Right answers that naive rules refuse: for a word in them, for what stands around them, for how they are written."""

import pytest

from experiments.verilog_smoke.design import Design, DesignPort
from experiments.verilog_smoke.testbench import make_testbench
from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog.smoke import REFERENCE_TOP
from gemma4_tpu.evals.verilog.verilog_eval import make_problem
from tests.evals.verilog.designs import fenced, needs_iverilog

pytestmark = needs_iverilog

ADDER = Design(
    family="adder",
    ports=(DesignPort(name="a", width=4), DesignPort(name="b", width=4), DesignPort(name="y", width=5, output=True)),
    behaviours=("",),
    summary="",
    body=("assign y = a + b;",),
)
HEAD = "module TopModule (input [3:0] a, input [3:0] b, output [4:0] y);"
PLAIN = f"{HEAD}\n  assign y = a + b;\nendmodule"
WRONG = f"{HEAD}\n  assign y = a - b;\nendmodule"
HALF = "module half(input a, b, output s, c); assign {c, s} = a + b; endmodule"
OWN_BENCH = """
`timescale 1ns/1ps
module tb;
  reg [3:0] a, b; wire [4:0] y;
  TopModule dut (.*);
  initial begin
    $dumpfile("waves.vcd"); $dumpvars(0, tb);
    a = 1; b = 2; #10 if (y !== 3) $display("Mismatches: 1 in 1 samples");
    $finish;
  end
endmodule
"""

HONEST = {
    "plain": fenced(PLAIN),
    "signal_named_error": fenced(f"{HEAD} wire [4:0] error_sum = a + b; assign y = error_sum; endmodule"),
    "signals_named_as_in_the_bench": fenced(
        f"{HEAD} wire [4:0] tb_match = a + b; wire [4:0] stats1 = tb_match; assign y = stats1; endmodule"
    ),
    "modules_named_as_in_the_bench": fenced(
        f"{HEAD} stimulus_gen good1 (a, b, y); endmodule\n"
        "module stimulus_gen(input [3:0] a, b, output [4:0] y); assign y = a + b; endmodule"
    ),
    "forbidden_words_in_comments": fenced(f'// no $finish, no `include, tb.good1.y\n{PLAIN}\n/* $fopen("x") */'),
    "forbidden_words_in_a_string": fenced(f'{HEAD} initial $display("$finish `include"); assign y = a + b; endmodule'),
    "debug_output": fenced(f'{HEAD} always @* $display("y=%d at %0t", y, $time); assign y = a + b; endmodule'),
    "talks_like_the_bench": fenced(
        f'{HEAD} initial $display("Mismatches: 3 in 3 samples"); assign y = a + b; endmodule'
    ),
    "allowed_functions": fenced(
        f"{HEAD} localparam W = $clog2(32); wire signed [W-1:0] s = $signed({{1'b0, a}}) + $signed({{1'b0, b}});"
        " assign y = $unsigned(s); endmodule"
    ),
    "directives": fenced(
        f"`timescale 1ns/1ps\n`default_nettype none\n{PLAIN.replace('input', 'input wire')}\n`resetall"
    ),
    "macros": fenced(f"`define ADD(x, y) ((x) + (y))\n{HEAD} assign y = `ADD(a, b); endmodule"),
    "guard": fenced(f"`ifndef TOP_V\n`define TOP_V\n{PLAIN}\n`endif"),
    "two_versions_by_macro": fenced(f"`ifdef FAST\n{WRONG}\n`else\n{PLAIN}\n`endif"),
    "submodules": fenced(
        f"{HEAD} wire [3:0] s, c, d; wire [3:0] k;\n"
        "  genvar i; generate for (i = 0; i < 4; i = i + 1) begin : stage\n"
        "    half h1 (a[i], b[i], s[i], c[i]); half h2 (s[i], i ? k[i-1] : 1'b0, y[i], d[i]);\n"
        "    assign k[i] = c[i] | d[i];\n"
        f"  end endgenerate assign y[4] = k[3]; endmodule\n{HALF}"
    ),
    "own_bench_behind": fenced(PLAIN + OWN_BENCH),
    "own_bench_in_another_fence": fenced(PLAIN) + "To test it:\n" + fenced(OWN_BENCH),
    "own_bench_cut_off": fenced(PLAIN) + "To test it:\n```verilog\nmodule tb;\n  initial begin",
    "old_style_ports": fenced(
        "module TopModule(a, b, y);\n input [3:0] a, b;\n output [4:0] y;\n reg [4:0] y;\n"
        " always @(a or b) y = a + b;\nendmodule"
    ),
    "functions_of_a_package": fenced(
        "package adding;\n  typedef logic [4:0] sum_t;\n"
        "  function automatic sum_t add(logic [3:0] x, logic [3:0] y); return x + y; endfunction\nendpackage\n"
        "module TopModule import adding::*; (input logic [3:0] a, b, output sum_t y); assign y = add(a, b); endmodule"
    ),
    "types_of_the_file": fenced(
        "typedef enum {IDLE, BUSY} state_t;\nparameter EXTRA = 1;\n"
        "module TopModule #(parameter W = 4) (input [W-1:0] a, b, output logic [W-1+EXTRA:0] y);\n"
        "  state_t s; typedef struct packed { logic c; logic [3:0] s; } sum_t; sum_t t;\n"
        "  always_comb begin s = BUSY; t = a + b; y = s == BUSY ? t : '0; end\nendmodule"
    ),
    "module_that_uses_itself": fenced(
        f"{HEAD} add #(4) top (a, b, y); endmodule\n"
        "module add #(parameter N = 1) (input [N-1:0] a, b, output [N:0] y); generate if (N == 1) assign y = a + b;\n"
        "  else begin : g wire [N-1:0] low; add #(N-1) rest (a[N-2:0], b[N-2:0], low);\n"
        "    assign y = {{{1'b0, a[N-1]} + {1'b0, b[N-1]} + low[N-1]}, low[N-2:0]}; end endgenerate endmodule"
    ),
    "primitive_and_wired_net": fenced(
        "primitive carry(o, a, b); output o; input a, b; table 11:1; 0?:0; ?0:0; endtable endprimitive\n"
        f"{HEAD} wire [3:0] s, c; wor [4:0] all; assign s = a ^ b; assign all = 0;\n"
        "  carry k0(c[0], a[0], b[0]), k1(c[1], a[1], b[1]), k2(c[2], a[2], b[2]), k3(c[3], a[3], b[3]);\n"
        "  assign all = s + {c, 1'b0}; assign y = all; endmodule"
    ),
    "macromodule_with_specify": fenced(
        f"macro{HEAD} assign y = a + b; specify (a *> y) = (0, 0); (b *> y) = 0; endspecify endmodule"
    ),
    "names_of_the_player": fenced(
        f"{HEAD} reg [4:0] judge_last; wire [3:0] judge_line = a; always @* judge_last = judge_line + b;"
        " assign y = judge_last; endmodule"
    ),
    "signed_numbers": fenced(
        f"{HEAD} wire signed [5:0] p = $signed({{2'b0, a}}); wire signed [5:0] m = -6'sd1 * $signed({{2'b0, b}});"
        " wire signed [5:0] d = p - m; assign y = d[4:0]; endmodule"
    ),
    "in_a_list": "1. The module:\n\n   ```verilog\n   " + PLAIN.replace("\n", "\n   ") + "\n   ```\n2. Done.",
    "systemverilog": fenced(f"{HEAD.replace('output', 'output logic')} always_comb y = a + b; endmodule : TopModule"),
    "assertion": fenced(f'{HEAD} assign y = a + b; always @* if (^y === 1\'bx) $error("unknown"); endmodule'),
    "attributes_and_escaped_name": fenced(
        f'(* top = "yes" *)\n{HEAD} (* keep *) wire [4:0] \\sum[0] ; assign \\sum[0] = a + b;'
        " assign y = \\sum[0] ; endmodule"
    ),
    "final_words": fenced(f"{PLAIN} // TopModule"),
    "windows_lines": fenced(PLAIN).replace("\n", "\r\n"),
    "other_alphabets": fenced(f"// сложение, 加法, 𝛴\n{PLAIN}"),
    "escaped_name_of_the_module": fenced(PLAIN.replace("TopModule ", "\\TopModule ")),
    "form_feeds": fenced(PLAIN.replace("\n", "\n\f")),
    "include_for_a_formal_tool": fenced(f'`ifdef FORMAL\n`include "props.svh"\n`endif\n{PLAIN}'),
    "include_in_its_own_bench": fenced(PLAIN + OWN_BENCH.replace("module tb;", 'module tb;\n`include "tasks.vh"')),
    "program_as_its_own_bench": fenced(
        f'{PLAIN}\nprogram test; reg m [0:3]; initial $readmemh("m.hex", m); endprogram'
    ),
    "directives_that_icarus_ignores": fenced(
        f"`suppress_faults\n`delay_mode_zero\n`default_decay_time 10\n`protect\n{PLAIN}\n`endprotect"
    ),
    "fence_in_a_comment": fenced(PLAIN.replace("  assign", "  // ```verilog``` is the language\n  assign")),
    "package_in_another_fence": fenced("package adding;\n  localparam W = 4;\nendpackage")
    + fenced(PLAIN.replace("[3:0]", "[adding::W-1:0]")),
    "two_drivers_that_agree": fenced(PLAIN.replace("endmodule", "  assign y = b + a;\nendmodule")),
    "draft_before": fenced(WRONG) + "That subtracts. Corrected:\n" + fenced(PLAIN),
    "draft_in_thoughts": f"<|channel>thought\n{fenced(WRONG)}<channel|>{fenced(PLAIN)}",
    "no_fence": f"The module adds:\n\n{PLAIN}\n\nThat is all.",
    "unclosed_fence": f"```SystemVerilog\n{PLAIN}",
}


@pytest.fixture(scope="module")
def adder():
    reference = ADDER.module(REFERENCE_TOP)
    return make_problem("adder", prompt="", reference=reference, testbench=make_testbench(ADDER))


@pytest.fixture(scope="module")
def verdicts(judge, adder):
    judge.prepare([adder])
    return dict(zip(HONEST, judge.judge_all((adder, text) for text in HONEST.values()), strict=True))


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_design_passes(verdicts, name):
    assert verdicts[name].passed, verdicts[name]


def test_the_benchmarks_own_rule_refuses_some_of_them(verdicts):
    """The strict verdict is not only stricter."""
    refused = {name for name, verdict in verdicts.items() if not verdict.official}
    assert {"modules_named_as_in_the_bench", "own_bench_behind"} <= refused
    assert "two_drivers_that_agree" in refused  # the bench connects variables, which can't have two drivers


@pytest.mark.parametrize(
    ("name", "completion", "kind"),
    [
        ("wrong", fenced(WRONG), VerdictClass.MISMATCH),
        (
            "wrong_by_macro",
            fenced(f"`define FAST\n`ifdef FAST\n{WRONG}\n`else\n{PLAIN}\n`endif"),
            VerdictClass.MISMATCH,
        ),
        ("outputs_undriven", fenced(f"{HEAD} endmodule"), VerdictClass.MISMATCH),
        ("cut_off", f"```verilog\n{HEAD}\n  assign y =", VerdictClass.SYNTAX),
        ("no_semicolon", fenced(PLAIN.replace("b;", "b")), VerdictClass.SYNTAX),
        ("other_name", fenced(PLAIN.replace("TopModule", "adder")), VerdictClass.ELABORATION),
        ("other_ports", fenced(PLAIN.replace("y", "z")), VerdictClass.ELABORATION),
        ("missing_submodule", fenced(f"{HEAD} full f (a, b, y); endmodule"), VerdictClass.ELABORATION),
        ("unknown_name", fenced(PLAIN.replace("a + b", "a + c")), VerdictClass.ELABORATION),
        (
            "file_access",
            fenced(f'{HEAD} reg [3:0] m [0:3]; initial $readmemh("x", m); endmodule'),
            VerdictClass.FORBIDDEN,
        ),
        (
            "endless",
            fenced(f"{HEAD} reg r = 0; assign y = a + b; initial forever #0 r = ~r; endmodule"),
            VerdictClass.TIMEOUT,
        ),
        (
            "endless_without_a_delay",
            fenced(f"{HEAD} assign y = a + b; always begin end endmodule"),
            VerdictClass.ELABORATION,
        ),
        (
            "too_large",
            fenced(f"{HEAD} assign y = a + b; wire [3:0] w = {{2000000000{{1'b1}}}}; endmodule"),
            VerdictClass.ELABORATION,
        ),
        ("flood", fenced(f'{HEAD} initial forever $display("flood"); endmodule'), VerdictClass.RUNTIME),
        ("no_code", "I'm sorry, I can't do that.", VerdictClass.NO_RESULT),
        ("nothing", "", VerdictClass.NO_RESULT),
        ("cut_off_in_thoughts", f"<|channel>thought\nI could write\n{fenced(PLAIN)}", VerdictClass.NO_RESULT),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_the_class_of_what_does_not_pass(judge, adder, name, completion, kind):
    judge.prepare([adder])
    verdict = judge.judge(adder, completion)
    assert verdict.kind is kind, verdict
    assert verdict.detail
    assert not verdict.official
