"""Ports and what they are for, fresh stimulus, stubs, and what they find out about benches and designs."""

import itertools
import re
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import pytest

from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog import synthesis
from gemma4_tpu.evals.verilog.ports import Port, Roles, read_ports
from gemma4_tpu.evals.verilog.second import second_problem
from gemma4_tpu.evals.verilog.stimulus import AFTER_ALL, stimulus
from gemma4_tpu.evals.verilog.strength import Strength, grade, reference_ports, sentences, vacuous
from gemma4_tpu.evals.verilog.verilog_eval import make_problem
from tests.evals.verilog.designs import fenced, needs_iverilog

# 3-bit counter with enable and asynchronous reset, low: 8 enabled cycles until it wraps
COUNTER = """module RefModule (input clk, input rst_n, input en, output reg [2:0] q);
  always @(posedge clk or negedge rst_n)
    if (!rst_n) q <= 0;
    else if (en) q <= q + 1;
endmodule
"""
MUX = """module RefModule #(parameter W = 4) (input [W-1:0] a, input [W-1:0] b, input sel, output [W-1:0] y);
  assign y = sel ? b : a;
endmodule
"""


def bench(declared: str, stimulus: str, outputs: str, connected: str) -> str:
    """A bench in verilog-eval's style."""
    names = re.findall(r"\w+", outputs)
    compared = " || ".join(f"ref_{name} !== dut_{name}" for name in names)
    ports = {side: ", ".join([connected, *(f".{name}({side}_{name})" for name in names)]) for side in ("ref", "dut")}
    return f"""module tb;
  {declared}
  integer errors = 0, samples = 0;
  RefModule good1 ({ports["ref"]});
  TopModule top_module1 ({ports["dut"]});
  task check; begin #4; samples = samples + 1; if ({compared}) errors = errors + 1; end endtask
  initial begin
    {stimulus}
    $display("Mismatches: %0d in %0d samples", errors, samples);
    $finish;
  end
endmodule
"""


WEAK_MUX = bench(
    "reg [3:0] a, b; reg sel; wire [3:0] ref_y, dut_y;", "a = 0; b = 0; sel = 0; check; sel = 1; check;", "y",
    ".a(a), .b(b), .sel(sel)",
)  # fmt: skip
THREE_VECTORS = bench(
    "reg [3:0] a, b; reg sel; wire [3:0] ref_y, dut_y;",
    "a = 3; b = 12; sel = 0; check; sel = 1; check; a = 5; sel = 0; check;", "y", ".a(a), .b(b), .sel(sel)",
)  # fmt: skip
SHORT_COUNT = bench(
    "reg clk = 0, rst_n = 0, en = 1; wire [2:0] ref_q, dut_q;",
    "#1 rst_n = 1; repeat (5) begin #1 clk = 1; check; #1 clk = 0; end", "q", ".clk(clk), .rst_n(rst_n), .en(en)",
)  # fmt: skip


def problem(name: str, reference: str, testbench: str):
    return make_problem(name, prompt="", reference=reference, testbench=testbench)


def ports_of(reference: str, judge) -> list[Port]:
    found: Future = judge.task(read_ports, reference, "RefModule")
    assert not isinstance(found.result(), str)
    return found.result()


def port(name: str, direction: str = "INPUT", bits: int = 1) -> Port:
    return Port(name=name, direction=direction, bits=bits)


@needs_iverilog
def test_ports_are_what_the_compiler_makes_of_them(judge):
    assert ports_of(MUX, judge) == [port("a", bits=4), port("b", bits=4), port("sel"), port("y", "OUTPUT", 4)]
    old = "module RefModule (a, \\b[0] , y); parameter N = 3; input a; input [N:0] \\b[0] ; output y; endmodule"
    assert ports_of(old, judge) == [port("a"), port("b[0]", bits=4), port("y", "OUTPUT")]
    assert "inout" in judge.task(read_ports, "module RefModule (inout a, output y); endmodule", "RefModule").result()
    assert "does not build" in judge.task(read_ports, "module RefModule (", "RefModule").result()


@pytest.mark.parametrize(
    ("code", "inputs", "clocks", "resets"),
    [
        ("always @(posedge clk) q <= d;", ["clk", "d"], ("clk",), {}),
        ("always @(posedge c, posedge ar) if (ar) q <= 0; else q <= d;", ["c", "ar", "d"], ("c",), {"ar": True}),
        ("always @(negedge rst_n or posedge clk) if (!rst_n) q <= 0;", ["clk", "rst_n"], ("clk",), {"rst_n": False}),
        ("always @(posedge clk) if (~reset) q <= 0;", ["clk", "reset", "d"], ("clk",), {"reset": False}),
        ("always @(posedge clk) if (clear) q <= 0;", ["clk", "clear"], ("clk",), {"clear": True}),
        ("always @(posedge wclk) m <= d; always @(posedge rclk) q <= m;", ["wclk", "rclk"], ("wclk", "rclk"), {}),
        ("always @(*) if (en) q = d;", ["en", "d"], (), {}),
        ("assign y = clk & d; // posedge clk", ["clk", "d"], (), {}),
        ("sub s (clk, d); endmodule module sub (input c, d); always @(posedge c) q <= d;", ["clk", "d"], ("clk",), {}),
    ],
)
def test_clocks_and_resets_are_found_in_blocks_and_names(code, inputs, clocks, resets):
    roles = Roles.of([*map(port, inputs), port("q", "OUTPUT")], f"module RefModule; {code} endmodule")
    assert (roles.clocks, roles.resets) == (clocks, resets)
    assert sorted([*roles.clocks, *roles.resets, *roles.data]) == sorted(inputs)


def test_stimulus_is_seeded_and_moves_nothing_with_a_clock():
    ports = [port("clk"), port("rst_n"), port("en"), port("d", bits=40), port("q", "OUTPUT", 8)]
    roles = Roles(clocks=("clk",), resets={"rst_n": False}, data=("en", "d"))
    rows = stimulus(ports, roles, "0/p")
    assert rows == stimulus(ports, roles, "0/p") != stimulus(ports, roles, "1/p")
    for (_, before), (_, after) in itertools.pairwise(rows):
        assert before["clk"] == after["clk"] or {**before, "clk": 0} == {**after, "clk": 0}
    assert all(row["rst_n"] == 0 for compared, row in rows if not compared)
    compared = [row for compared, row in rows if compared]
    assert 0.5 < sum(row["rst_n"] for row in compared) / len(compared) < 1  # not in reset most of the time
    seen = Counter(row["d"] for row in compared)
    assert seen[0] and seen[(1 << 40) - 1] and len(seen) > 100


def test_few_inputs_are_all_tried():
    ports = [port("a", bits=3), port("b", bits=4), port("y", "OUTPUT", 4)]
    rows = stimulus(ports, Roles(clocks=(), resets={}, data=("a", "b")), "0/p")
    assert {(row["a"], row["b"]) for _, row in rows[:128]} == {(a, b) for a in range(8) for b in range(16)}
    assert len(rows) == 128 + 2 + AFTER_ALL
    assert len(stimulus([port("y", "OUTPUT")], Roles(clocks=(), resets={}, data=()), "0/p")) >= 1


MEMORISED = """module TopModule (input [3:0] a, b, input sel, output reg [3:0] y);
  always @(*) case ({a, b, sel}) 9'h078: y = 3; 9'h079: y = 12; 9'h0b8: y = 5; default: y = 0; endcase
endmodule
"""


@needs_iverilog
def test_a_design_that_knows_the_bench_by_heart_shows(judge):
    mux, counter = problem("mux", MUX, THREE_VECTORS), problem("counter", COUNTER, SHORT_COUNT)
    judge.prepare([mux, counter])
    ports, without = reference_ports([mux, counter], judge)
    assert not without
    seconds = [second_problem(p, ports[p.name], 7) for p in (mux, counter)]
    assert judge.prepare(seconds, fresh=True, keep=False).cannot_pass == {}
    right = MUX.replace("RefModule", "TopModule")
    assert judge.judge(mux, fenced(MEMORISED)).passed and judge.judge(mux, fenced(right)).passed
    assert judge.judge(seconds[0], fenced(right)).passed
    assert judge.judge(seconds[0], fenced(MEMORISED)).kind is VerdictClass.MISMATCH
    saturating = COUNTER.replace("RefModule", "TopModule").replace("else if (en)", "else if (en && q != 7)")
    assert judge.judge(counter, fenced(saturating)).passed
    assert judge.judge(seconds[1], fenced(saturating)).kind is VerdictClass.MISMATCH
    assert judge.judge(seconds[1], fenced(COUNTER.replace("RefModule", "TopModule"))).passed


@needs_iverilog
def test_references_may_have_an_answers_names(judge):
    """As in RTLLM: the reference defines the very modules that answers define."""
    inner = "module flip (input [3:0] x, output [3:0] z); assign z = ~x; endmodule\n"
    outer = "module top (input [3:0] a, output [3:0] y); flip f (.x(a), .z(y)); endmodule\n"
    named = replace(problem("named", inner + outer, THREE_VECTORS), top="top", reference_top="top")
    second = second_problem(named, judge.task(read_ports, named.reference, "top").result(), 3)
    assert judge.prepare([second], fresh=True, keep=False).cannot_pass == {}
    assert judge.judge(second, fenced(inner + outer)).passed
    assert judge.judge(second, fenced(inner.replace("~x", "x") + outer)).kind is VerdictClass.MISMATCH


@needs_iverilog
def test_benches_are_graded_by_designs_that_do_nothing_and_by_mutants(judge, cache_dir):
    constant = "module RefModule (input [3:0] a, b, input sel, output [3:0] y);\n  assign y = 0;\nendmodule\n"
    problems = [
        problem("weak", MUX, WEAK_MUX), problem("good", MUX, THREE_VECTORS), problem("zero", constant, THREE_VECTORS),
    ]  # fmt: skip
    assert judge.prepare(problems).cannot_pass == {}
    grades = grade(problems, judge, {}, judge.config)
    assert grades["weak"].accepted == ["constant 0", "pass-through"]
    assert grades["good"].accepted == []
    assert (grades["zero"].accepted, grades["zero"].trivial) == ([], ["constant 0"])  # it is right there
    assert vacuous(grades) == {"weak": ["constant 0", "pass-through"]}
    said = "\n".join(sentences(grades))
    assert "1 of 3 benches accept a design that does nothing (constant 0: 1, pass-through: 1)." in said
    with_mutants = grade(problems, judge, {"good": "fails"}, judge.config, with_mutants=True)
    weak = with_mutants["weak"]
    assert weak.mutants and weak.wrong_survivors == weak.survivors > 0
    assert with_mutants["good"] == Strength(ungraded="its reference fails here")
    assert grade(problems, judge, {}, judge.config)["weak"] == weak  # recalled, with its mutants


ADDER = "module {0} (input [3:0] a, b, output [4:0] y);\n  assign y = {1};\nendmodule\n"
REGISTER = "module TopModule (input [3:0] a, b, output reg [4:0] y);\n  always @(posedge a[0]) y <= a + b;\nendmodule\n"


@needs_iverilog
@pytest.mark.skipif(not synthesis.installed(synthesis.YOSYS), reason="yosys is not installed")
def test_yosys_proves_equality_and_counts_cells_where_it_is_installed(judge):
    level, yosys = synthesis.level_for_yosys(judge), synthesis.installed(synthesis.YOSYS)
    if level is None:
        pytest.skip("Landlock does not work on this machine")

    def proved(code):
        pair = (ADDER.format("RefModule", "a + b"), "RefModule", code, "TopModule")
        return judge.task(synthesis.equivalent, yosys, *pair, level=level).result()

    assert proved(ADDER.format("TopModule", "b + a")) is True
    assert proved(ADDER.format("TopModule", "a == 15 && b == 14 ? 0 : a + b")) is False
    assert proved(REGISTER) is None and proved("no Verilog") is None
    sizes = [
        judge.task(synthesis.size, yosys, ADDER.format("TopModule", sum_), "TopModule", level=level).result()
        for sum_ in ("a", "a + b")
    ]
    assert sizes[0][0] < sizes[1][0] and sizes[1][1] > 50


@needs_iverilog
@pytest.mark.skipif(not synthesis.installed(synthesis.VERILATOR), reason="verilator is not installed")
def test_verilator_counts_warnings_where_it_is_installed(judge):
    verilator = synthesis.installed(synthesis.VERILATOR)
    codes = [ADDER.format("TopModule", "a + b"), ADDER.format("TopModule", "a"), "no Verilog"]
    found = [judge.task(synthesis.lint, verilator, code, "TopModule").result() for code in codes]
    assert found[0] == 0 and found[1] > 0 and found[2] is None
