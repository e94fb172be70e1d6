"""The judge as a whole: what it refuses, what it remembers, and that it leaves nothing behind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.problems import Verdict, VerdictClass
from gemma4_tpu.evals.verilog import remembered, work_folder
from gemma4_tpu.evals.verilog.iverilog import find_tools
from gemma4_tpu.evals.verilog.pool import Pool
from gemma4_tpu.evals.verilog.running import Finished
from gemma4_tpu.evals.verilog.sandbox import Level
from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
from gemma4_tpu.evals.verilog.spy import choose_level
from gemma4_tpu.evals.verilog.stage import Stage
from gemma4_tpu.evals.verilog.verdict import Refused, Trial
from gemma4_tpu.evals.verilog.verilog_eval import VerilogEval, official_rule
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge
from gemma4_tpu.evals.verilog.work_folder import MEMORY_FOLDER, WorkFolder
from tests.evals.verilog.designs import fenced, honest, module, needs_iverilog, smoke_problem

BROKEN = {Level.BUBBLEWRAP: "no bwrap", Level.LANDLOCK: "no kernel for it", Level.NONE: None}


def test_without_a_sandbox_it_refuses_unless_told_otherwise(caplog):
    with pytest.raises(UserError, match=r"no bwrap; landlock: no kernel for it.*bubblewrap.*eval\.unsafe=true"):
        choose_level(JudgeConfig(), BROKEN)
    assert choose_level(JudgeConfig(unsafe=True), BROKEN) is Level.NONE
    assert "lets samples read and write files" in caplog.text


def test_the_strictest_level_that_works_is_taken():
    working = dict.fromkeys(Level)
    assert choose_level(JudgeConfig(), working) is Level.BUBBLEWRAP
    assert choose_level(JudgeConfig(unsafe=True), working) is Level.BUBBLEWRAP
    assert choose_level(JudgeConfig(sandbox="landlock"), working) is Level.LANDLOCK
    assert choose_level(JudgeConfig(), {**working, Level.BUBBLEWRAP: "no bwrap"}) is Level.LANDLOCK


@needs_iverilog
@pytest.mark.parametrize("version", ["11.0 (stable) ()", "12.0 (stable) ()", "13.0 (devel) (s20251012-33-gabc)"])
def test_versions_are_read(tmp_path, version):
    fake_tools(tmp_path, f"Icarus Verilog version {version}")
    assert find_tools(str(tmp_path)).version == version[:4]


@pytest.mark.parametrize("shown", ["Icarus Verilog version 10.3 (stable) ()", "bash: no"])
def test_other_versions_are_refused(tmp_path, shown):
    fake_tools(tmp_path, shown)
    with pytest.raises(UserError, match=r"Icarus Verilog 11 or newer.*apt-get install iverilog"):
        find_tools(str(tmp_path))
    with pytest.raises(UserError, match=r"iverilog and vvp not found \(eval\.judge\.iverilog="):
        find_tools(str(tmp_path / "nowhere"))


def fake_tools(folder, shown):
    for name in ("iverilog", "vvp"):
        real = shutil.which(name) or "false"
        (folder / name).write_text(f"#!/bin/sh\n[ $1 = -V ] && echo '{shown}' || exec {real} \"$@\"\n")
        (folder / name).chmod(0o755)


@needs_iverilog
def test_references_are_judged_once_for_each_simulator_version(tmp_path):
    problems = VerilogSmoke().load()[:3]
    config = JudgeConfig(workers=1, cache_dir=str(tmp_path))
    with VerilogJudge(config) as judge:
        first = judge.prepare(problems)
        assert (first.recalled, judge.prepare(problems).recalled) == (0, 3)
        assert judge.prepare(problems, fresh=True).recalled == 0
        (file,) = tmp_path.iterdir()
        assert judge.tools.version in file.name
        file.write_text(file.read_text()[:-40])  # cut off: judged again
        assert judge.prepare(problems).golden.keys() == first.golden.keys()
        assert len(json.loads(file.read_text())) == 3
    table = first.table()
    assert "3 of 3 pass" in table and first.simulator in table and first.sandbox in table
    assert json.loads(json.dumps(first.to_row()))["cannot_pass"] == {}


@needs_iverilog
def test_another_sample_count_than_the_references_is_no_pass(judge, monkeypatch):
    """As if a design had ended the bench early in a way that no other measure sees."""
    problem = smoke_problem("adder")
    golden = judge.prepare([problem]).golden[problem.name]
    monkeypatch.setitem(judge._golden, problem.name, type(golden)(samples=golden.samples + 1))
    verdict = judge.judge(problem, honest(problem))
    assert (verdict.kind, verdict.refused_by, verdict.mismatches) == (VerdictClass.MISMATCH, "count", 0)


@needs_iverilog
def test_verdicts_come_in_order_and_survive_json(judge):
    problem = smoke_problem("adder")
    judge.prepare([problem])
    samples = [honest(problem), fenced(module(problem)), "no code"] * 6
    verdicts = list(judge.judge_all((problem, sample) for sample in samples))
    assert [str(verdict.kind) for verdict in verdicts] == ["pass", "mismatch", "no result"] * 6
    assert [Verdict.from_row(json.loads(json.dumps(v.to_row()))) for v in verdicts] == verdicts


KILLED = """
import sys, time
from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge
from tests.evals.verilog.designs import fenced, module, smoke_problem

if __name__ == "__main__":
    problem = smoke_problem("adder")
    with VerilogJudge(JudgeConfig(workers=1, cache_dir=sys.argv[1], sandbox=sys.argv[2], unsafe=True)) as judge:
        judge.prepare([problem])
        future = judge.submit(problem, fenced(module(problem, "reg r = 0; initial while (1) #0 r = ~r;")))
        print("running", flush=True)
        future.result()
"""


def simulates(pid: int) -> bool:
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # compilers come and go
            if child.name() == "vvp":
                return True
    return False


@needs_iverilog
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_evaluation_leaves_nothing_running_and_nothing_in_memory(tmp_path, judge, how):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = Path(__file__).parents[3]
    command = [sys.executable, str(script), str(tmp_path), str(judge.level)]
    environment = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "running\n"
    deadline = time.monotonic() + 60
    while not simulates(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    if how is signal.SIGKILL:
        process.kill()
    else:  # as a terminal or a scheduler does: the whole group
        for one in [*family, psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # simulations come and go
                if one.name().startswith("python"):
                    one.send_signal(how)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    left = [path for place in (MEMORY_FOLDER, tmp_path) for path in place.glob(f"gemma4_tpu_judge_{process.pid}_*")]
    assert left == []


@needs_iverilog
def test_interrupted_while_its_workers_end_a_judge_leaves_no_folder(tmp_path, monkeypatch):
    pool = Pool(JudgeConfig(workers=1, cache_dir=str(tmp_path)), find_tools(None))

    def interrupted(**_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool._executor, "shutdown", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.close()
    pool._executor.shutdown()
    assert not pool._folder.path.exists()


ASKING = """
import time
from gemma4_tpu.evals.verilog import iverilog
iverilog._wait_until_read = lambda pipe, process: print(process.args[0], flush=True) or time.sleep(300)
iverilog.find_tools(None)
"""


@needs_iverilog
def test_asking_the_simulators_driver_leaves_no_process_behind_where_the_judge_is_killed(tmp_path):
    """The driver starts a shell, and that a preprocessor, which waits for its source."""
    asking = subprocess.Popen(
        [sys.executable, "-c", ASKING], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    asking.stdout.readline()
    family, until = [], time.monotonic() + 60
    while len(family) < 3 and time.monotonic() < until:
        family = psutil.Process(asking.pid).children(recursive=True)
    asking.kill()
    asking.communicate()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert len(family) >= 3 and alive == []


HOLDING = """
import sys
from pathlib import Path
from gemma4_tpu.evals.verilog import work_folder
work_folder.MEMORY_FOLDER = Path(sys.argv[1])
print(work_folder.WorkFolder(0).path, flush=True)
sys.stdin.read()
"""


def test_folders_of_dead_judges_are_removed_by_the_next_and_those_of_living_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(work_folder, "MEMORY_FOLDER", tmp_path)  # in the real one, judges of other tests tidy up

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDING, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return process, Path(process.stdout.readline().strip())

    (living, kept), (dead, left) = start(), start()
    (left / "full").mkdir()
    (left / "full" / "of.txt").write_text("something")
    dead.kill()
    dead.communicate()
    assert left.is_dir()
    mine = WorkFolder(0)
    assert (left.exists(), kept.is_dir(), mine.path.is_dir()) == (False, True, True)
    living.kill()
    living.communicate()
    mine.remove()
    WorkFolder(0).remove()
    assert not kept.exists() and not mine.path.exists()


@needs_iverilog
@pytest.mark.parametrize(
    "source",
    [
        'module top; reg [3:0] a = 5; wire b; integer i = $clog2(9); initial $display("%0d %0d", a, i); endmodule',
        '`timescale 1ns/1ps\nmodule top; reg r; initial #3 $display("%t %f", $time, $sin(1.0)); endmodule',
        "module top; wire x = undeclared; wire x; endmodule",
        "module top; asign x = 1; endmodule",
    ],
)
def test_the_compiler_by_itself_does_what_its_driver_does(tmp_path, source):
    """A verdict takes the shorter way."""
    tools = find_tools(None)
    (tmp_path / "source.sv").write_text(f"{source}\n")
    (tmp_path / "settings").write_text(tools.settings("top", "short.vvp"))

    def done(command):
        by_shell = isinstance(command, str)
        return subprocess.run(command, shell=by_shell, cwd=tmp_path, capture_output=True, text=True, check=False)

    built = done(tools.build("top", "long.vvp", ["source.sv"]))
    ran = done(tools.simulate("long.vvp"))
    short = done(tools.compile_and_simulate("settings", "source.sv", "short.vvp", "MARK"))
    assert short.stderr.partition("MARK\n")[0] == built.stderr
    assert short.stdout == (f"{built.stdout}MARK\n{ran.stdout}" if built.returncode == 0 else built.stdout)
    assert short.returncode == (ran.returncode if built.returncode == 0 else built.returncode)
    assert ("undeclared" in source or "asign" in source) == (built.returncode != 0)


@pytest.mark.parametrize("line", ["0 0 0 1", "0 0 0 101", "0 0 2 10", "0 0 0 1?", "0 0 0 10\r", "stop", ""])
def test_responses_have_the_outputs_bits_or_are_none(line):
    """Whatever a design writes, a bench is given nothing else."""
    stage = Stage(folder=Path(), result_marker="m", player_top="p", build_log="", response_bits=2, unknown_bit_ticks=0)
    ended = Finished(returncode=0, stdout="", stderr="", cpu_seconds=0.0, stopped=None)
    trial = object.__new__(Trial)
    assert trial._responses(stage, "0 0 0 1x\n1 a0 1 z0\nstop\n", ended) == "0 0 0 1x\n1 a0 1 z0\n"
    with pytest.raises(Refused):
        trial._responses(stage, f"0 0 0 1x\n{line}\nstop\n", ended)


@needs_iverilog
@pytest.mark.parametrize(
    ("body", "measure", "kind"),
    [
        ("function integer f(input integer x); begin while (1) x = x; f = x; end endfunction localparam L = f(1);",
         "build", VerdictClass.TIMEOUT),
        ("initial forever;", "run", VerdictClass.TIMEOUT),
        ("initial $fatal(0);", "run", VerdictClass.RUNTIME),
        ("nothing x();", "build", VerdictClass.ELABORATION),
        ("nothing at all;", "build", VerdictClass.SYNTAX),
    ],
)  # fmt: skip
def test_what_refuses_a_design_is_told_though_it_is_built_and_run_at_once(judge, body, measure, kind):
    problem = smoke_problem("adder")
    judge.prepare([problem])
    verdict = judge.submit(problem, fenced(module(problem, body)), official=False).result()
    assert (verdict.refused_by, verdict.kind, verdict.official) == (measure, kind, None)


def test_what_benches_did_is_remembered_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(remembered, "MOST_REMEMBERED", 3)
    stage = Stage(folder=Path(), result_marker="m", player_top="p", build_log="", response_bits=1, unknown_bit_ticks=0)
    done = Finished(returncode=0, stdout="said", stderr="", cpu_seconds=0.0, stopped=None)
    known = remembered.Remembered()
    for responses in ("a", "b", "c"):
        known.put(stage, responses, done)
    assert known.get(stage, "a") is done
    known.put(stage, "d", done)  # `b` was asked for least lately
    known.put(stage, "e", replace(done, stdout="x" * (remembered.LONGEST_REMEMBERED + 1)))
    assert [known.get(stage, name) is done for name in "abcde"] == [True, False, True, True, False]
    assert known.get(replace(stage, result_marker="n"), "a") is None


def test_the_benchmarks_own_rule():
    good = "Hint: Output 'q' has no mismatches.\nMismatches: 0 in 20 samples\n"
    assert official_rule(good)
    for trouble in ("Mismatches: 3 in 20 samples", "no result"):
        assert not official_rule(trouble)
    for line in ("x.sv:3: error: no", "x.sv:3: syntax error", "TIMEOUT", "warning: q is declared here as wire."):
        assert not official_rule(f"{line}\n{good}")
    assert not official_rule("Hint: Output 'error_out' has no mismatches.\nMismatches: 0 in 20 samples\n")


def test_incomplete_problems_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"eval\.problems_path=.*: contains no Prob\*_prompt\.txt"):
        VerilogEval().load(tmp_path)
    (tmp_path / "Prob001_a_prompt.txt").write_text("x")
    with pytest.raises(UserError, match=r"Prob001_a_ref\.sv, Prob001_a_test\.sv missing"):
        VerilogEval().load(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not a problem"):
        VerilogSmoke().load(tmp_path / "rows.jsonl")
