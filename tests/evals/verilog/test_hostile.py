"""Hostile designs and commands in every sandbox that works here: nothing read, written or left running.

The designs are run as they are, without the scan that would refuse most of them: the sandbox has to hold by itself.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog import landlock
from gemma4_tpu.evals.verilog.iverilog import find_tools
from gemma4_tpu.evals.verilog.pool import Pool
from gemma4_tpu.evals.verilog.sandbox import Level
from tests.evals.verilog.confined import REPOSITORY, Confined
from tests.evals.verilog.designs import fenced, honest, module, needs_iverilog, smoke_problem

pytestmark = [needs_iverilog, pytest.mark.slow]

LIMITS = JudgeConfig(cpu_seconds=1, memory_mib=512, file_mib=1, output_kib=64, processes=32)
SECRET = "the-secret-of-the-house"
USERS = ["root", "ordinary user"] if os.getuid() == 0 else ["this user"]

# Read a file and print it. {secret} is a file that anyone may read.
READING = {
    "fopen": 'f = $fopen("{secret}", "r"); c = $fgets(s, f); $display("%0s", s);',
    "relative_path": 'f = $fopen("../outside/secret", "r"); c = $fgets(s, f); $display("%0s", s);',
    "fscanf": 'f = $fopen("{secret}", "r"); c = $fscanf(f, "%s", s); $display("%0s", s);',
    "fread": 'f = $fopen("{secret}", "rb"); c = $fread(s, f); $display("%0s", s);',
    "readmemh": '$readmemh("{secret}", m); $display("%h", m[0]);',
    "through_proc": 'f = $fopen("/proc/self/root{secret}", "r"); c = $fgets(s, f); $display("%0s", s);',
    "passwd": 'f = $fopen("/etc/passwd", "r"); c = $fgets(s, f); $display("%0s", s);',
    "environment": 'f = $fopen("/proc/self/environ", "r"); c = $fgets(s, f); $display("%0s", s);',
    "environment_of_parent": 'f = $fopen("/proc/1/environ", "r"); c = $fgets(s, f); $display("%0s", s);',
}

# Write to a file. {target} is in a folder that anyone may write to; {secret} exists.
WRITING = {
    "fopen": 'f = $fopen("{target}", "w"); $fdisplay(f, "was here");',
    "append": 'f = $fopen("{secret}", "a"); $fdisplay(f, "was here");',
    "relative_path": 'f = $fopen("../outside/target", "w"); $fdisplay(f, "was here");',
    "dumpfile": '$dumpfile("{target}"); $dumpvars;',
    "writememh": 'm[0] = 1; $writememh("{target}", m);',
    "own_memory": 'f = $fopen("/proc/self/mem", "r+"); c = $fseek(f, 4096, 0); $fwrite(f, "x");',
    "own_program": 'f = $fopen("hostile.vvp", "w"); $fdisplay(f, "was here");',
    "new_file_beside": 'f = $fopen("more", "w"); $fdisplay(f, "was here");',
}

# Use up something. Nothing but a limit ends these.
EXHAUSTING = {
    "print_forever": 'initial forever $display("flood flood flood flood flood flood flood flood flood");',
    "print_to_stderr_forever": 'initial forever $fdisplay(32\'h8000_0002, "flood flood flood flood flood flood");',
    "loop_without_time": "reg r = 0; initial while (1) #0 r = ~r;",
    "loop_with_time": "reg r = 0; always #1 r = ~r;",
    "while_one": "integer i = 0; initial while (1) i = i + 1;",
    "oscillation": "wire a, b; assign a = ~b; assign b = a; initial begin force a = 0; #1 release a; end",
    "memory": "reg [1023:0] m [0:67108863]; integer i; initial for (i = 0; i < 67108864; i = i + 1) m[i] = i;",
    "queue": "int q[$]; initial forever q.push_back(1);",
    "fork_threads": "integer i = 0; initial forever fork #1000 i = i + 1; join_none",
}
ELABORATION = {
    "recursive_module": "module hostile; r #(0) x(); endmodule module r #(parameter N = 0) (); r #(N+1) x(); endmodule",
    "endless_constant": (
        "module hostile; function integer f(input integer a); begin f = a; while (1) f = f + 1; end endfunction"
        " localparam P = f(1); reg [P:0] r; endmodule"
    ),
    "endless_generate": (
        "module hostile; genvar i; generate for (i = 0; i < 2000000000; i = i + 1) begin : g reg r; end endgenerate"
        " endmodule"
    ),
    "huge_vector": "module hostile; wire [2000000000:0] w = ~0; endmodule",
    "macro_bomb": (
        "`define A x x x x x x x x x x\n"
        + "\n".join(f"`define {b} " + f"`{a} " * 10 for a, b in zip("ABCDEFG", "BCDEFGH", strict=True))
        + "\nmodule hostile; `H endmodule"
    ),
}
COMMANDS = {
    "fork_bomb": "f() { f | f & }; f; sleep 60",
    "daemon": "setsid sleep 60 > /dev/null 2>&1 < /dev/null & exit 0",
    "grandchild_that_ignores_signals": "(trap '' HUP TERM INT; sleep 60 & sleep 60) & sleep 60",
    "many_sleepers": "for i in 1 2 3 4 5 6 7 8 9; do setsid sleep 60 & done; sleep 60",
}


def body(text):
    return f"module hostile; integer f, c; reg [799:0] s; reg [7:0] m [0:63]; initial begin {text} end endmodule"


@pytest.fixture(scope="module")
def levels():
    with Pool(JudgeConfig(workers=1), find_tools(None)) as pool:
        return pool.try_levels()


@pytest.fixture(scope="module", params=USERS)
def ordinary(request):
    """Whether commands run for a user who is not root, unlike the tests."""
    return request.param == "ordinary user"


@pytest.fixture(scope="module", params=[Level.BUBBLEWRAP, Level.LANDLOCK])
def confined(request, levels, ordinary):
    if levels[request.param]:
        pytest.skip(f"{request.param} does not work on this machine ({levels[request.param]}): not exercised")
    confined = Confined(request.param, LIMITS, ordinary=ordinary)
    yield confined
    confined.close()


@pytest.fixture
def place():
    """A folder that users other than the tests' own can reach: root's simulations run as another one."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


@pytest.fixture
def outside(place):
    """A folder outside of the sandbox that file permissions alone leave open to anyone."""
    outside = place / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    (outside / "secret").write_text(f"{SECRET}\n")
    (outside / "secret").chmod(0o666)
    return outside


@pytest.fixture
def folder(place):
    """The work folder; after the test no process runs that was started in it."""
    folder = place / "work"
    folder.mkdir()
    yield folder
    assert [process for process in psutil.process_iter() if started_in(process, folder)] == []


def started_in(process, folder):
    try:
        return process.environ().get("TMPDIR") == str(folder)
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return False


def filled(text, outside):
    return text.replace("{secret}", str(outside / "secret")).replace("{target}", str(outside / "target"))


def test_there_are_at_least_twenty_of_them():
    assert len(READING) + len(WRITING) + len(EXHAUSTING) + len(ELABORATION) + len(COMMANDS) >= 20


def leaked(printed):
    return any(text in printed for text in (SECRET, "root:", "PATH=", SECRET.encode().hex()[:2] * 2))


@pytest.mark.parametrize("name", READING)
def test_nothing_is_read(confined, outside, folder, name):
    _, ran = confined.simulate(folder, body(filled(READING[name], outside)))
    assert ran.returncode == 0
    assert not leaked(ran.stdout + ran.stderr)


def test_nothing_is_included(confined, outside, folder):
    (built,) = confined.simulate(folder, f'`include "{outside}/secret"\nmodule hostile; endmodule')
    assert built.returncode != 0
    assert SECRET not in built.stdout + built.stderr


@pytest.mark.parametrize("name", WRITING)
def test_nothing_is_written(confined, outside, folder, name):
    built, ran = confined.simulate(folder, body(filled(WRITING[name], outside)))
    assert (built.returncode, ran.stopped) == (0, None)
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == f"{SECRET}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["hostile.sv", "hostile.vvp"]
    assert (folder / "hostile.vvp").read_text().startswith("#!")  # still the program


def test_without_a_sandbox_the_same_designs_read_and_write(outside, folder):
    """So that the tests above would notice."""
    confined = Confined(Level.NONE, LIMITS)
    _, ran = confined.simulate(folder, body(filled(READING["fopen"], outside)))
    assert SECRET in ran.stdout
    confined.simulate(folder, body(filled(WRITING["fopen"], outside)))
    assert (outside / "target").read_text() == "was here\n"
    confined.close()


def ended_by_a_limit(done):
    assert len(done.stdout) <= LIMITS.output_kib << 10 and len(done.stderr) <= LIMITS.output_kib << 10
    # The compiler's preprocessor is a process of its own; its end by the limit is told by the shell between them.
    of_a_child = "bad_alloc" in done.stderr or "CPU time limit exceeded" in done.stderr
    return done.stopped in ("cpu", "wall", "output") or of_a_child


@pytest.mark.parametrize("name", EXHAUSTING)
def test_a_simulation_is_ended(confined, folder, name):
    _, ran = confined.simulate(folder, f"module hostile; {EXHAUSTING[name]} endmodule")
    assert ended_by_a_limit(ran), ran


@pytest.mark.parametrize("name", ELABORATION)
def test_an_elaboration_is_ended(confined, folder, name):
    (built,) = confined.simulate(folder, ELABORATION[name])
    assert ended_by_a_limit(built) or "within itself" in built.stderr, built


def test_a_wave_form_does_not_fill_the_disk(confined, folder):
    waves = folder / "wave.vcd"
    waves.touch()
    flood = 'reg [999:0] r = 0; initial begin $dumpfile("wave.vcd"); $dumpvars; forever #1 r = ~r; end'
    _, ran = confined.simulate(folder, f"module hostile; {flood} endmodule", writable=[waves])
    assert ran.returncode != 0
    assert 0 < waves.stat().st_size <= LIMITS.file_mib << 20


@pytest.mark.parametrize("name", COMMANDS)
def test_no_process_is_left_running(confined, folder, name):
    """`folder` looks for them. What a compromised simulator could do is done by a shell here."""
    (done,) = confined.run(folder, ["/bin/sh", "-c", f"echo alive; ({COMMANDS[name]}) & sleep 0.3"])
    assert "alive" in done.stdout
    assert done.stopped != "wall"  # it ended with its first process, or flooded; nobody waited for the others


def test_no_process_outside_is_reached(confined, folder):
    if confined.level is Level.LANDLOCK and (confined.ordinary or os.getuid() != 0) and landlock.abi_version() < 6:
        pytest.skip("Landlock before version 6 (Linux 6.12) stops no signals to this user's processes: not exercised")
    victim = subprocess.Popen(["sleep", "60"])
    try:
        (done,) = confined.run(folder, ["/bin/sh", "-c", f"echo alive; kill -9 {victim.pid}"])
        assert (done.stdout, done.returncode) == ("alive\n", 1)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_no_server_is_reached(confined, folder):
    if confined.level is Level.LANDLOCK and landlock.abi_version() < 4:
        pytest.skip("Landlock before version 4 (Linux 6.7) refuses no TCP: not exercised")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (done,) = confined.run(folder, ["/bin/bash", "-c", f"echo alive; exec 3<>/dev/tcp/127.0.0.1/{port}"])
        assert done.stdout == "alive\n" and done.returncode != 0
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("level", [Level.BUBBLEWRAP, Level.LANDLOCK])
def test_an_ordinary_user_gets_the_same_verdicts(level):
    """Root's tests become one for it."""
    command = [sys.executable, "-m", "tests.evals.verilog.ordinary_user", level]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    trouble, kinds = json.loads(done.stdout)
    if trouble:
        pytest.skip(f"{level} does not work on this machine ({trouble}): not exercised")
    assert kinds.pop("right") == "pass"
    assert len(kinds) >= 15 and "pass" not in kinds.values()


def test_hostile_designs_get_a_verdict_and_leave_nothing(judge, tmp_path):
    """Through the whole judge, whose official-compatible run executes even what the strict verdict refuses."""
    problem = smoke_problem("adder")
    judge.prepare([problem])
    target = tmp_path / "target"
    samples = {
        "write": module(problem, f'integer f; initial begin f = $fopen("{target}", "w"); $fdisplay(f, 1); end'),
        "hang": module(problem, "reg r = 0; initial while (1) #0 r = ~r;"),
        "flood": module(problem, 'initial forever $display("flood flood flood flood flood flood flood");'),
        "elaboration": module(problem, "r #(0) x();", after="module r #(parameter N = 0) (); r #(N+1) x(); endmodule"),
    }
    verdicts = dict(zip(samples, judge.judge_all((problem, fenced(code)) for code in samples.values()), strict=True))
    kinds = {name: verdict.kind for name, verdict in verdicts.items()}
    assert kinds["write"] is VerdictClass.FORBIDDEN
    assert kinds["hang"] is VerdictClass.TIMEOUT
    assert kinds["flood"] is VerdictClass.RUNTIME
    assert kinds["elaboration"] in (VerdictClass.TIMEOUT, VerdictClass.ELABORATION, VerdictClass.SYNTAX)
    assert not any(verdict.official for name, verdict in verdicts.items() if name != "write")
    assert not target.exists()
    assert judge.judge(problem, honest(problem)).passed  # the workers are well
