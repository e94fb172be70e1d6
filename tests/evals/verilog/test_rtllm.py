"""A second benchmark through the same judge: folders as RTLLM has them."""

import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog.rtllm import RtllmFolders
from tests.evals.verilog.designs import fenced, needs_iverilog

DESCRIPTION = """Please act as a professional Verilog designer.

Implement a lookup of squares.

Module name:
    squares
Input ports:
    n [2:0]: the number.
Output ports:
    y [5:0]: its square.

Give me the complete code.
"""
REFERENCE = "module verified_squares (input [2:0] n, output [5:0] y);\n  assign y = n * n;\nendmodule\n"
ANSWER = "module squares (input [2:0] n, output [5:0] y);\n  wire [5:0] w = n;\n  assign y = w * w;\nendmodule\n"
TESTBENCH = """`timescale 1ns/1ns
module squares_tb;
  reg [2:0] n; wire [5:0] y;
  reg [7:0] expected [0:7];
  integer i, error = 0;
  squares uut (.n(n), .y(y));
  initial begin
    $readmemh("reference.dat", expected);
    for (i = 0; i < 8; i = i + 1) begin
      n = i; #10;
      error = (y !== expected[i][5:0]) ? error + 1 : error;
    end
    if (error == 0) $display("===========Your Design Passed===========");
    else $display("===========Test completed with %d /8 failures===========", error);
    $finish;
  end
endmodule
"""


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "Arithmetic/Other/squares"
    folder.mkdir(parents=True)
    (folder / "design_description.txt").write_text(DESCRIPTION)
    (folder / "testbench.v").write_text(TESTBENCH)
    (folder / "verified_squares.v").write_text(REFERENCE)
    (folder / "reference.dat").write_text("\n".join(f"{n * n:02x}" for n in range(8)))
    (folder / "makefile").write_text("vcs:\n\tvcs squares.v testbench.v\n")
    return tmp_path


def test_a_folder_becomes_a_problem(clone):
    (problem,) = RtllmFolders().load(clone)
    assert (problem.name, problem.top, problem.bench_top) == ("squares", "squares", "squares_tb")
    assert (problem.prompt, list(problem.files)) == (DESCRIPTION, ["reference.dat"])


def test_what_is_missing_is_named(clone, tmp_path):
    next(clone.rglob("testbench.v")).unlink()
    with pytest.raises(UserError, match=r"squares: testbench\.v or verified_\*\.v is missing"):
        RtllmFolders().load(clone)
    with pytest.raises(UserError, match=r"eval\.problems_path=.*clone of RTLLM"):
        RtllmFolders().load(tmp_path / "Arithmetic/Other/squares/nothing")


@needs_iverilog
def test_completions_are_judged(judge, clone):
    (problem,) = RtllmFolders().load(clone)
    assert judge.prepare([problem]).cannot_pass == {}
    right = judge.judge(problem, fenced(ANSWER))
    assert (right.passed, right.official, right.samples) == (True, True, None)
    wrong = judge.judge(problem, fenced(ANSWER.replace("w * w", "w + w")))
    assert (wrong.kind, wrong.official) == (VerdictClass.MISMATCH, False)
    forged = ANSWER.replace("w * w;", 'w + w; initial $display("===========Your Design Passed===========");')
    cheat = judge.judge(problem, fenced(forged))
    assert (cheat.passed, cheat.official) == (False, True)
    forced = ANSWER.replace("w * w;", "w + w; always #1 squares_tb.error = 0;")
    assert judge.judge(problem, fenced(forced)).kind is VerdictClass.ELABORATION
    for early in ("initial $finish;", "initial #0$finish;", "final $finish; initial $fatal;"):
        ended = judge.judge(problem, fenced(ANSWER.replace("w * w;", f"w * w; {early}")))
        assert (ended.kind, ended.refused_by) == (VerdictClass.RUNTIME, "run")


@needs_iverilog
def test_a_bench_without_the_result_line_is_no_crash(judge, clone):
    bench = next(clone.rglob("testbench.v"))
    bench.write_text(TESTBENCH.replace("Your Design Passed", "Well done"))
    (problem,) = RtllmFolders().load(clone)
    assert "never prints 'Your Design Passed'" in judge.prepare([problem]).cannot_pass["squares"]
    assert judge.judge(problem, fenced(ANSWER)).kind is VerdictClass.NO_RESULT
