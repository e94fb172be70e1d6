"""What root's tests run as an ordinary user, whose sandboxes differ: no other user for designs, no exact process limit.

`python -m tests.evals.verilog.ordinary_user LEVEL`: judges the canaries in this process and prints, as JSON, why the
level does not work here, and the class of each verdict.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.verilog import canaries, pool
from gemma4_tpu.evals.verilog.iverilog import find_tools
from gemma4_tpu.evals.verilog.sandbox import Level
from gemma4_tpu.evals.verilog.spy import spy
from gemma4_tpu.evals.verilog.verdict import reference_as_answer

ORDINARY = 60_700
"""A user id that nobody has."""


def become_ordinary():
    """Gives up being root, for good. Whoever is not root stays who it is."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(ORDINARY, ORDINARY, ORDINARY)
        os.setresuid(ORDINARY, ORDINARY, ORDINARY)


def judge_canaries(level, root):
    """(why the level does not work, class of the right design and of each cheat)."""
    problem = canaries.problem()
    worker = pool._Worker(config=JudgeConfig(cpu_seconds=2), tools=find_tools(None), folder=Path(root) / "worker")
    worker.folder.mkdir()
    pool._worker = worker
    sandbox = worker.sandbox(level)
    assert sandbox.uid is None
    if trouble := spy(worker.tools, sandbox, worker.empty_folder(sandbox)):
        return trouble, {}
    golden = pool._golden(problem, level)
    designs = {"right": reference_as_answer(problem), **canaries.CHEATS}
    return None, {name: str(pool._verdict(problem, code, golden, level).kind) for name, code in designs.items()}


def main():
    become_ordinary()
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(judge_canaries(Level(sys.argv[1]), root)))


if __name__ == "__main__":
    main()
