"""Design and bench in two processes: what one sees of the other is what it would see beside it."""

import re
import subprocess
from dataclasses import replace

import pytest

from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog.mutants import mutants
from gemma4_tpu.evals.verilog.rtllm import RtllmFolders
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from gemma4_tpu.evals.verilog.verilog_eval import make_problem
from tests.evals.verilog.designs import fenced, needs_iverilog, smoke_problem

pytestmark = needs_iverilog

DESIGN = """`timescale 1ns/1ps
module serve #(parameter WIDTH = 4, parameter LATENCY = 3) (
  input clk, input rst, input go, input [WIDTH-1:0] a, output reg done, output reg [WIDTH-1:0] y);
  reg [7:0] left;
  always @(posedge clk or posedge rst)
    if (rst) begin left <= 0; done <= 0; y <= 0; end
    else begin
      done <= 0;
      if (go) left <= LATENCY;
      else if (left == 1) begin done <= 1; y <= a + 1; left <= 0; end
      else if (left != 0) left <= left - 1;
    end
endmodule
"""
# It waits for the design: what it gives depends on what the design does, and when.
BENCH = """`timescale 1ns/1ps
module serve_tb;
  parameter W = 8;
  reg clk = 0, rst, go = 0; reg [W-1:0] a; wire done; wire [W-1:0] y;
  integer i, wrong = 0;
  serve #(PARAMETERS) uut (CONNECTIONS);
  always #5 clk = ~clk;
  initial begin
    rst = 1; #12 rst = 0;
    for (i = 0; i < 8; i = i + 1) begin
      @(negedge clk); a = $random; go = 1;
      @(negedge clk) go = 0;
      wait (done);
      #1 if (y !== a + 8'd1) wrong = wrong + 1;
    end
    if (wrong == 0) $display("===========Your Design Passed===========");
    else $display("===========%0d failures===========", wrong);
    $finish;
  end
endmodule
"""
POSITIONS, NAMES = "clk, rst, go, a, done, y", ".clk(clk), .rst(rst), .go(go), .a(a), .done(done), .y(y)"


def serve(folder, parameters=".WIDTH(W)", connections=NAMES):
    """A problem whose prompt has the module's name wrong."""
    folder = folder / "serve_slowly"
    folder.mkdir()
    (folder / "design_description.txt").write_text("Module name:\n    server\n")
    bench = BENCH.replace("PARAMETERS", parameters).replace("CONNECTIONS", connections)
    (folder / "testbench.v").write_text(bench)
    (folder / "verified_serve.v").write_text(DESIGN.replace("serve", "verified_serve"))
    return RtllmFolders().load(folder)[0]


@pytest.mark.parametrize(
    ("parameters", "connections"), [(".WIDTH(W)", NAMES), ("8, 2", POSITIONS), (".WIDTH(W), .LATENCY(W / 2)", ".*")]
)
def test_a_bench_that_waits_for_its_design_is_judged_whatever_its_latency(judge, tmp_path, parameters, connections):
    problem = serve(tmp_path, parameters, connections)
    assert problem.top == "serve"
    assert judge.prepare([problem]).cannot_pass == {}
    for latency in ("LATENCY", "LATENCY + 2", "1"):
        code = DESIGN.replace("left <= LATENCY", f"left <= {latency}")
        assert judge.judge(problem, fenced(code)).passed, latency
    assert judge.judge(problem, fenced(DESIGN.replace("a + 1", "a + 2"))).kind is VerdictClass.MISMATCH


def test_delays_of_the_design_arrive_in_the_bench(judge, tmp_path):
    problem = serve(tmp_path)
    judge.prepare([problem])
    assert judge.judge(problem, fenced(DESIGN.replace("y <= a", "y <= #0.5 a"))).passed
    assert not judge.judge(problem, fenced(DESIGN.replace("y <= a", "y <= #1.5 a"))).passed
    in_seconds = DESIGN.replace("`timescale 1ns/1ps\n", "")
    assert judge.judge(problem, fenced(in_seconds)).passed
    assert not judge.judge(problem, fenced(in_seconds.replace("y <= a", "y <= #0.9 a"))).passed


def test_a_bench_that_waits_for_ever_is_ended(judge, tmp_path):
    problem = serve(tmp_path)
    judge.prepare([problem])
    verdict = judge.judge(problem, fenced(DESIGN.replace("done <= 1", "done <= 0")))
    assert (verdict.kind, verdict.refused_by) == (VerdictClass.NO_RESULT, "replay")
    assert verdict.detail == "the bench does not end with this design"


@pytest.mark.parametrize("family", ["adder", "counter"])
def test_counts_are_those_of_a_simulation_by_hand(judge, tmp_path, family):
    problem, tools = smoke_problem(family), judge.tools
    judge.prepare([problem])
    right = reference_as_answer(problem)
    for code in (right, *mutants(right)[:3]):
        files = {"bench.sv": problem.testbench, "reference.sv": problem.reference, "design.sv": code}
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        for command in (tools.build(problem.bench_top, "by_hand.vvp", [*files]), tools.simulate("by_hand.vvp")):
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        errors, samples = re.search(r"Mismatches: (\d+) in (\d+) samples", done.stdout).groups()
        verdict = judge.judge(problem, fenced(code))
        assert (verdict.mismatches, verdict.samples) == (int(errors), int(samples)), code


# A bench with a race: it assigns at the edge that the design samples at. The order is the simulator's.
RACE = """`timescale 1ps/1ps
module tb;
  reg clk = 0; reg [3:0] d = 0; wire [3:0] q_ref, q_dut; integer wrong = 0, samples = 0, i;
  initial forever #5 clk = ~clk;
  RefModule good1 (.clk(clk), .d(d), .q(q_ref));
  TopModule top_module1 (.clk(clk), .d(d), .q(q_dut));
  always @(posedge clk, negedge clk) begin samples = samples + 1; if (q_ref !== q_dut) wrong = wrong + 1; end
  initial begin
    for (i = 0; i < 40; i = i + 1) begin
      repeat (1 + i % 3) @(posedge clk);
      if (i % 2) d = d + 3; else d <= d + 5;
      if (i % 5 == 0) @(negedge clk) d = d + 1;
    end
    #1 $display("Mismatches: %0d in %0d samples", wrong, samples);
    $finish;
  end
endmodule
"""
FLIP_FLOP = "module {} (input clk, input [3:0] d, output reg [3:0] q);\n  always @(posedge clk) q <= d;\nendmodule\n"


def test_a_race_of_the_bench_comes_out_as_beside_it(judge):
    problem = make_problem("race", prompt="", reference=FLIP_FLOP.format("RefModule"), testbench=RACE)
    judge.prepare([problem])
    assert judge.judge(problem, fenced(FLIP_FLOP.format("TopModule"))).passed
    late = FLIP_FLOP.format("TopModule").replace("posedge", "negedge")
    assert judge.judge(problem, fenced(late)).kind is VerdictClass.MISMATCH


def test_equal_responses_and_others_get_their_own_verdicts_in_any_order(judge):
    """What a bench did with the same responses is remembered."""
    problem = make_problem("race", prompt="", reference=FLIP_FLOP.format("RefModule"), testbench=RACE)
    judge.prepare([problem])
    right = FLIP_FLOP.format("TopModule")
    late, stuck = right.replace("posedge", "negedge"), right.replace("<= d", "<= 0")
    designs = [right, right + "// again", late, right.replace("<= d", "<= d + 0"), stuck, late, right, stuck]
    verdicts = [judge.judge(problem, fenced(f"{code}\n// {i // 8}")) for i, code in enumerate(designs * 3)]
    assert [verdict.passed for verdict in verdicts[:8]] == [True, True, False, True, False, False, True, False]
    rows = [(v.kind, v.mismatches, v.samples, v.official) for v in verdicts]
    assert rows[:8] == rows[8:16] == rows[16:] and rows[2] == rows[5] and rows[4] == rows[7] and rows[2] != rows[4]


FEEDBACK = """
module tb;
  reg clk = 0; reg [3:0] i = 0; wire q_ref, q_dut; integer wrong = 0, samples = 0;
  wire d = i[0] ^ (i > 2 && q_dut === 1'bx ? 1'bx : 1'b0);
  RefModule good1 (.d(d), .q(q_ref));
  TopModule top_module1 (.d(d), .q(q_dut));
  initial begin
    repeat (10) begin
      #5 samples = samples + 1;
      if (q_ref !== (q_ref ^ q_dut ^ q_ref)) wrong = wrong + 1;
      i = i + 1;
    end
    $display("Mismatches: %0d in %0d samples", wrong, samples);
  end
endmodule
"""
INVERTER = "module {} (input d, output q);\n  assign q = ~d;\nendmodule\n"


def test_a_design_that_makes_the_reference_unknown_is_refused(judge):
    """An X of the reference matches anything, and this bench hands the design's X on to it."""
    problem = make_problem("feedback", prompt="", reference=INVERTER.format("RefModule"), testbench=FEEDBACK)
    judge.prepare([problem])
    assert judge.judge(problem, fenced(INVERTER.format("TopModule"))).passed
    verdict = judge.judge(problem, fenced(INVERTER.format("TopModule").replace("~d", "1'bx")))
    assert (verdict.kind, verdict.refused_by) == (VerdictClass.MISMATCH, "replay")
    assert "made the reference's inputs unknown" in verdict.detail


@pytest.mark.parametrize(
    ("of_reference", "of_bench", "reason"),
    [
        (("output q", "inout q"), None, "the port q is inout"),
        (None, ("TopModule", "Other"), "instantiates TopModule 0 times|(?i:unknown) module"),
        (None, ("TopModule top", "TopModule other (.d(d)); TopModule top"), "instantiates TopModule 2 times"),
        (("~d;", "~d; wire hidden = d;"), ("q_dut === 1'bx", "top_module1.hidden === 1'bx"), "top_module1.hidden"),
    ],
)
def test_what_cannot_be_replayed_is_said(judge, of_reference, of_bench, reason):
    reference = INVERTER.format("RefModule")
    problem = make_problem("odd", prompt="", reference=reference, testbench=FEEDBACK)
    changed, bench = (t.replace(*c) if c else t for t, c in ((reference, of_reference), (FEEDBACK, of_bench)))
    problem = replace(problem, reference=changed, testbench=bench)
    failure = judge.prepare([problem]).cannot_pass["odd"]
    assert re.search(reason, failure), failure
