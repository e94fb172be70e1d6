"""Benchmarks of other forms: without references, with bodies for answers, as JSONL; and sources that are none."""

import json
import subprocess
from dataclasses import replace

import pytest

from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals import benchmarks
from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog.code_completion import VerilogEvalCompletion
from gemma4_tpu.evals.verilog.cvdp import Cvdp
from gemma4_tpu.evals.verilog.extract import code_of
from gemma4_tpu.evals.verilog.resbench import ResBench
from gemma4_tpu.evals.verilog.stage import NoStage, read_interface
from gemma4_tpu.evals.verilog.strength import grade
from tests.evals.verilog.designs import fenced, needs_iverilog

HEADER = "module inverter (\n    input a,\n    output y\n);"
BENCH = """`timescale 1ns/1ps
module inverter_tb;
  reg a; wire y; integer i, errors;
  inverter uut (.a(a), .y(y));
  initial begin
    errors = 0;
    for (i = 0; i < 4; i = i + 1) begin a = i; #10; if (y !== ~a) errors = errors + 1; end
    if (errors == 0) $display("All tests passed");
    else $display("Some tests failed");
    $finish;
  end
endmodule
"""
RIGHT, WRONG = f"{HEADER}\n  assign y = ~a;\nendmodule\n", f"{HEADER}\n  assign y = a;\nendmodule\n"
ROW = {"module": "inverter", "Problem": "Invert a.", "Module header": HEADER, "Testbench": BENCH}


@pytest.fixture
def resbench(tmp_path):
    def write(*rows):
        (tmp_path / "problems.json").write_text(json.dumps({"Combinational Logic": rows}))
        return tmp_path

    return write


def test_resbench_shows_the_header_and_not_the_solution_in_it(resbench):
    (problem,) = ResBench().load(resbench({**ROW, "Module header": RIGHT}))
    assert problem.prompt.startswith("Invert a.") and HEADER in problem.prompt and "assign" not in problem.prompt
    assert (problem.name, problem.top, problem.bench_top) == ("inverter", "inverter", "inverter_tb")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("text", "problem 1: module, Problem, Module header, Testbench missing"),
        ({**ROW, "Testbench": None}, "problem 1: Testbench missing"),
        ({**ROW, "Testbench": "module t; endmodule"}, "announces no pass"),
        ({**ROW, "Testbench": '$display("%0d of 4 tests passed", 4 - errors);'}, "a count of passed tests is none"),
        ({**ROW, "Testbench": '$display("All tests passed");'}, "has no module"),
    ],
)
def test_what_is_missing_is_named(row, said, resbench):
    with pytest.raises(UserError, match=said):
        ResBench().load(resbench(row))


def test_another_file_is_no_benchmark(tmp_path):
    for text in ("[]", "{", '{"a": 3}'):
        (tmp_path / "problems.json").write_text(text)
        with pytest.raises(UserError, match="give a clone of ResBench"):
            ResBench().load(tmp_path)


@needs_iverilog
def test_a_benchmark_without_references_is_judged(judge, resbench, tmp_path):
    (problem,) = ResBench().load(resbench(ROW))
    assert judge.prepare([problem]).cannot_pass == {}
    assert judge.judge(problem, fenced(RIGHT)).passed
    assert judge.judge(problem, fenced("  assign y = ~a;\nendmodule")).passed
    assert judge.judge(problem, fenced(WRONG)).kind is VerdictClass.MISMATCH
    forged = RIGHT.replace("~a;", 'a; initial $display("All tests passed");')
    assert not judge.judge(problem, fenced(forged)).passed
    strength = grade([problem], judge, {}, judge.config)[problem.name]
    assert strength.ungraded == "the reference is missing"


ANNOUNCED = 'if (errors == 0) $display("All tests passed");\n    else $display("Some tests failed");'


@needs_iverilog
@pytest.mark.parametrize(
    "announced",
    [
        'if (errors == 0) $display("All tests passed!"); else $display("Not all tests passed");',
        'if (errors != 0) $display("Not all tests passed"); else $display("All tests passed!");',
        'if (errors == 0) $display("All tests passed"); else $display("I expected: All tests passed");',
        'if (errors == 0) $display("ALL TESTS PASSED"); $display("Tests passed: %0d of 4", 4 - errors);',
        '$display("All tests passed? %0d", errors == 0); if (errors == 0) $display("all %0d OK: test passed", i);',
        '$display("%0d tests passed", 4 - errors); if (errors == 0) $display("All %0d tests passed", i);',
        '$display("Result: %s", errors ? "some tests failed" : "all tests passed");',
    ],
)
def test_a_denial_or_a_count_announces_no_pass(announced, judge, resbench):
    (problem,) = ResBench().load(resbench({**ROW, "Testbench": BENCH.replace(ANNOUNCED, announced)}))
    judge.prepare([problem])
    assert judge.judge(problem, fenced(RIGHT)).passed
    assert not judge.judge(problem, fenced(WRONG)).passed


CLOCKED = BENCH.replace("`timescale 1ns/1ps\n", "")


@needs_iverilog
@pytest.mark.parametrize(
    ("bench", "code", "kind"),
    [
        (BENCH, RIGHT + BENCH.replace("#10", "#20"), VerdictClass.PASS),  # its own bench has the name of the problem's
        (CLOCKED, f"`timescale 1ns/1ps\n{RIGHT.replace('assign', 'assign #1')}", VerdictClass.PASS),
        (BENCH, f"`define NOT ~\n{RIGHT.replace('~', '`NOT ')}", VerdictClass.PASS),
        (BENCH, RIGHT.replace("~a;", "~a"), VerdictClass.SYNTAX),
        (BENCH, RIGHT.replace("~a", "~b"), VerdictClass.ELABORATION),
        (BENCH, RIGHT.replace("output y", "output z"), VerdictClass.ELABORATION),
    ],
    ids=["own bench", "timescale", "macro", "syntax", "name", "port"],
)
def test_without_a_reference_designs_are_judged_as_with_one(bench, code, kind, judge, resbench):
    (problem,) = ResBench().load(resbench({**ROW, "Testbench": bench}))
    judge.prepare([problem])
    verdict = judge.judge(problem, fenced(code))
    assert verdict.kind is kind, verdict
    assert "reference" not in verdict.detail


@needs_iverilog
@pytest.mark.parametrize(
    "code",
    [
        "module inverter(output a, output y); assign a = 1'bx; assign y = 1'bx; endmodule",
        "module inverter(output a, output y); assign (supply1, supply0) a = 1'bx; assign y = 1'bx; endmodule",
        "module inverter(output tri0 a, output y); assign y = 1'bx; endmodule",
    ],
)
def test_what_a_bench_drives_by_a_net_is_no_output_whatever_the_design_says(code, judge, resbench):
    """An unknown input makes what this bench expects unknown, too."""
    driving = BENCH.replace("reg a", "reg b; wire a = b").replace("begin a = i", "begin b = i")
    (problem,) = ResBench().load(resbench({**ROW, "Testbench": driving}))
    judge.prepare([problem])
    assert judge.judge(problem, fenced(RIGHT)).passed
    verdict = judge.judge(problem, fenced(code))
    assert verdict.kind is VerdictClass.ELABORATION and "declares a as output" in verdict.detail, verdict


@needs_iverilog
def test_no_name_of_a_design_is_code_of_what_runs_with_the_bench(judge, resbench, tmp_path):
    """Where there is no reference, the ports are the design's: whatever the text may hold, names are names."""
    (problem,) = ResBench().load(resbench(ROW))
    code = RIGHT.replace("output y", "output y, output \\z);initial$finish;endmodule/* ")
    (tmp_path / "both.sv").write_text(f"{BENCH}\n{code}")
    subprocess.run(judge.tools.build(problem.bench_top, "both.vvp", ["both.sv"]), cwd=tmp_path, check=True)
    with pytest.raises(NoStage, match="escaped name, which can't be replayed"):
        read_interface((tmp_path / "both.vvp").read_text(), problem)


def cvdp(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


CVDP = {
    "id": "cvdp_inverter_0001",
    "categories": ["cid003", "easy"],
    "input": {"prompt": "Invert a.\u2028Really.", "context": {"notes/a.md": "An inverter."}},
    "output": {"context": {"rtl/inverter.sv": RIGHT}},
    "harness": {"files": {"src/.env": "TOPLEVEL = inverter\n", "src/inverter_tb.sv": BENCH}},
}
PYTHON = {
    **CVDP,
    "id": "python",
    "harness": {"files": {"src/.env": "TOPLEVEL = x\n", "src/test_x.py": "import cocotb"}},
}


def test_rows_in_cvdps_form(tmp_path, caplog):
    (problem,) = Cvdp().load(cvdp(tmp_path / "rows.jsonl", PYTHON, CVDP))
    assert (problem.name, problem.top, problem.reference_top) == ("cvdp_inverter_0001", "inverter", "inverter")
    assert "Really." in problem.prompt and "An inverter." in problem.prompt and problem.reference == RIGHT
    assert "skipped 1 of 2 rows without a Verilog test bench" in caplog.text
    with pytest.raises(UserError, match="none of 1 rows has a Verilog test bench"):
        Cvdp().load(cvdp(tmp_path / "python.jsonl", PYTHON))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not in CVDP's format"):
        Cvdp().load(cvdp(tmp_path / "rows.jsonl", CVDP, {"id": "x"}))


def test_completion_prompts_are_the_benchmarks_and_bodies_are_answers(tmp_path):
    header = "module TopModule (\n  input in,\n  output out\n);\n"
    (tmp_path / "Prob005_notgate_prompt.txt").write_text(f"\nCreate a NOT gate.\n\n{header}\n")
    (tmp_path / "Prob005_notgate_ref.sv").write_text("module RefModule; endmodule")
    (tmp_path / "Prob005_notgate_test.sv").write_text("module tb; endmodule")
    with pytest.raises(UserError, match=r"Prob005_notgate_ifc\.txt is missing"):
        VerilogEvalCompletion().load(tmp_path)
    (tmp_path / "Prob005_notgate_ifc.txt").write_text(f"\n{header}")
    (problem,) = VerilogEvalCompletion().load(tmp_path)
    lines = problem.prompt.split("\n")
    assert lines[0].startswith("// Implement the Verilog module") and "// Create a NOT gate." in lines
    assert problem.prompt.endswith(header)
    body, whole = "  assign out = ~in;\nendmodule", f"{header}  assign out = ~in;\nendmodule"
    for answer in (body, fenced(body)):
        assert "".join(code_of(answer, problem).split()) == "".join(whole.split())
    assert code_of(fenced(whole), problem) == whole


class NoSource:
    pass


def made(problems):
    return type("Made", (), {"load": lambda self, path: problems})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (lambda: None, "is not a class with a method load"),
        (NoSource, "is not a class with a method load"),
        (made(None), "load gave NoneType None"),
        (made([]), "eval.problems_path=x: contains no problem of verilog_eval"),
        (made([{"name": "x"}]), "problem 0 is a dict; a source makes `Problem`s"),
    ],
)
def test_a_source_that_is_none_is_one_message(source, said, monkeypatch):
    monkeypatch.setitem(benchmarks.SOURCES, "verilog_eval", source)
    with pytest.raises(UserError, match=said):
        benchmarks.load_problems(EvalConfig(problems_path="x"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"official_rule": lambda log: True}, "official_rule is <function .*lambda.*can't import"),
        ({"official_rule": "Passed"}, "official_rule is 'Passed', not a function"),
        ({"testbench": b"module"}, "testbench must be text"),
        ({"result_pattern": "("}, "is not a regex"),
        ({"bench_needs_reference": True}, "needs a reference, but there is none"),
    ],
)
def test_a_problem_that_cannot_be_judged_is_one_message(changes, said, resbench, monkeypatch):
    (problem,) = ResBench().load(resbench(ROW))
    monkeypatch.setitem(benchmarks.SOURCES, "verilog_eval", made([replace(problem, **changes)]))
    with pytest.raises(UserError, match=said):
        benchmarks.load_problems(EvalConfig(problems_path="x"))
    monkeypatch.setitem(benchmarks.SOURCES, "verilog_eval", made([problem, problem]))
    with pytest.raises(UserError, match="a duplicate name"):
        benchmarks.load_problems(EvalConfig(problems_path="x"))
