"""Whatever this package starts ends with it, also where it is killed by SIGKILL."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTS = {
    "subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output",
    "os.fork", "os.forkpty", "os.system", "os.popen", "os.posix_spawn", "os.posix_spawnp",
    "asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell", "pty.spawn", "multiprocessing.Process",
}  # fmt: skip
OTHERWISE = {
    "gemma4_tpu/data/codev.py": "its CPU time is limited",
    "gemma4_tpu/evals/verilog/iverilog.py": "it reads a pipe to its end, which comes with this process's",
    "gemma4_tpu/data/hard_limit.py": "it looks whether its parent lives, which it may have to end",
    "gemma4_tpu/evals/verilog/sandbox.py": "it dies with its worker, which looks whether the judge lives",
    "gemma4_tpu/sweeping/job_process.py": "a job outlives its sweep, whose next start takes it over",
}
"""Files whose processes need something else, and what."""


def ends_with_parent(call: ast.Call) -> bool:
    """By the kernel's signal, since it reads a pipe that closes, or since it is a question that is answered in seconds.

    For the signal, Python forks, which is unsafe once JAX runs (`RuntimeWarning`): not for what notebooks can reach.
    """
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    signalled = said.get("preexec_fn", "").endswith("end_with_parent")
    return signalled or said.get("stdin") == "subprocess.PIPE" or "timeout" in said


def test_every_process_is_started_so_that_it_ends_with_its_parent():
    found, otherwise = [], set()
    for folder in ("gemma4_tpu", "hydra_plugins", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = str(path.relative_to(ROOT))
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            alone = [call for call in calls if ast.unparse(call.func) in STARTS and not ends_with_parent(call)]
            otherwise |= {where} if alone else set()
            found += [f"{where}:{call.lineno}" for call in alone if where not in OTHERWISE]
    assert found == [] and otherwise == OTHERWISE.keys()


CHILD = "#!/bin/sh\necho $$ >> {pids}\nexec sleep 600\n"
GRANDCHILD = "#!/bin/sh\necho $$ >> {pids}\nsh -c 'echo $$ >> {pids}; while :; do :; done'\n"
KINDS = {
    "syntax": "from gemma4_tpu.data import codev; codev.SYNTAX_SECONDS = 1\n"
    "import subprocess; subprocess.Popen.communicate = lambda process, timeout: process.wait()\n"
    "codev.check_syntax('module a; endmodule', program)",
    "check": "from gemma4_tpu.reporting import experiments; experiments.check_experiment('experiments/smoke')",
    "slurm": "from gemma4_tpu.sweeping import slurm; slurm._run(program)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the end of a parent")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_by_sigkill_it_leaves_no_process(kind, tmp_path):
    program, pids = tmp_path / "program", tmp_path / "pids"
    program.write_text((GRANDCHILD if kind == "syntax" else CHILD).format(pids=pids))
    program.chmod(0o755)
    code = f"import sys; program = sys.executable = {str(program)!r}\n{KINDS[kind]}"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    expected = 2 if kind == "syntax" else 1
    while not pids.exists() or len(pids.read_text().split()) < expected:
        assert parent.poll() is None
        time.sleep(0.02)
    started = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait(60)
    _, alive = psutil.wait_procs(started, timeout=120)
    for one in alive:
        one.kill()
    assert alive == []
