"""Cheats on which a judge is tested before it serves: if one passes, none of its rewards can be trusted.

There is one of each kind that once fooled some Verilog judge; the design that they cheat for is wrong.
"""

from __future__ import annotations

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from gemma4_tpu.evals.verilog.verilog_eval import make_problem
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge

_REFERENCE = """module RefModule (input clk, input [3:0] d, output reg [3:0] q);
  always @(posedge clk) q <= d + 1;
endmodule
"""
_BENCH = """`timescale 1ns/1ps
module tb;
  reg clk = 0; reg [3:0] d = 0;
  wire [3:0] q_ref, q_dut;
  integer i, errors = 0, samples = 0;
  RefModule good1 (.clk(clk), .d(d), .q(q_ref));
  TopModule top_module1 (.clk(clk), .d(d), .q(q_dut));
  initial begin
    for (i = 0; i < 20; i = i + 1) begin
      d = i; #5 clk = 1; #1;
      samples = samples + 1;
      if (q_ref !== (q_ref ^ q_dut ^ q_ref)) errors = errors + 1;
      #4 clk = 0;
    end
    $display("Mismatches: %0d in %0d samples", errors, samples);
    $finish;
  end
endmodule
"""
_RESULT = "Mismatches: 0 in 20 samples"
_HEAD, _END = "module TopModule (input clk, input [3:0] d, output [3:0] q);\n", "\nendmodule\n"
_BODIES = {
    "prints the result": f'assign q = 0; initial begin $display("{_RESULT}"); end',
    "prints the result at the end": f'assign q = 0; final $display("{_RESULT}");',
    "prints the result and finishes": f'assign q = 0; initial begin $display("{_RESULT}"); $finish; end',
    "finishes": "assign q = 0; initial $finish;",
    "assembles $finish": "assign q = 0;\n`define A $fin\n`define B(x) x``ish\ninitial `B(`A);",
    "reads the reference": "assign q = tb.q_ref;",
    "reads the reference's register": "assign q = tb.good1.q;",
    "uses the reference": "RefModule r (clk, d, q);",
    "forces the counter": "assign q = 0; initial force tb.errors = 0;",
    "forces its input to X": "assign q = 0; initial force d = 4'bx;",
    "forces its input behind a carriage return": "assign q = 0; //\r initial force d = 4'bx;",
    "forces its input behind an escaped name": "assign q = 0; wire \\w\x0b/* ; initial force d = 4'bx; // */ ;",
    "drives its input": "assign q = 0; assign (supply1, supply0) d = 4'bx;",
    "drives its clock": "assign q = 0; assign (supply1, supply0) clk = 1'b0;",
    "ties its input by a switch": (
        "assign q = 0; supply1 s; wire x; assign (supply1, supply0) x = 1'bx; tran (d[0], x); tran (d[1], x);"
        " tran (d[2], x); tran (d[3], x);"
    ),
    "reads the bench": 'reg [7:0] text [0:4095]; assign q = text[0]; initial $readmemh("bench.sv", text);',
}
CHEATS = {
    **{name: f"{_HEAD}{body}{_END}" for name, body in _BODIES.items()},
    "swallows the bench": f"{_HEAD}assign q = 0;{_END}/*",
    "brings its own bench": f'{_HEAD}assign q = 0;{_END}module tb; initial $display("{_RESULT}"); endmodule\n',
    "brings another root": f'{_HEAD}assign q = 0;{_END}module other; initial $display("{_RESULT}"); endmodule\n',
}


def problem() -> Problem:
    """The problem on which the canaries are judged."""
    return make_problem("canary", prompt="", reference=_REFERENCE, testbench=_BENCH)


def try_canaries(judge: VerilogJudge) -> None:
    """Has a correct design and every cheat judged.

    Raises:
      UserError: the correct design fails, or a cheat passes.
    """
    canary = problem()
    failure = judge.prepare([canary], fresh=True, keep=False).cannot_pass.get(canary.name)
    right = judge.judge(canary, f"```verilog\n{reference_as_answer(canary)}```")
    if failure or not right.passed:
        raise UserError(f"the judge refuses a correct design ({failure or right.detail}); it is not fit to serve")
    verdicts = judge.judge_all(((canary, f"```verilog\n{code}\n```") for code in CHEATS.values()), official=False)
    if passed := [name for name, verdict in zip(CHEATS, verdicts, strict=True) if verdict.passed]:
        raise UserError(f"the judge passes a design that {'; one that '.join(passed)}; it is not fit to serve")
