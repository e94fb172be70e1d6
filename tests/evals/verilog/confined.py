"""A process that runs commands in a sandbox, as a worker of the judge does, and tells what they did.

`python -m tests.evals.verilog.confined LEVEL CONFIG [ordinary]`: reads `{"commands", "folder", "writable"}` as JSON
lines. With `ordinary` it is no longer root by then.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.verilog.iverilog import find_tools
from gemma4_tpu.evals.verilog.running import Finished
from gemma4_tpu.evals.verilog.sandbox import Level, Sandbox
from tests.evals.verilog.ordinary_user import ORDINARY, become_ordinary

REPOSITORY = Path(__file__).parents[3]


class Confined:
    """A sandbox of one level in a process of its own; `ordinary`: as a user who is not root."""

    def __init__(self, level, config, *, ordinary=False):
        self.level, self.ordinary = level, ordinary
        command = [sys.executable, "-m", "tests.evals.verilog.confined", level, json.dumps(asdict(config))]
        command += ["ordinary"] if ordinary else []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )

    def run(self, folder, *commands, writable=()):
        """What each of the commands did, up to the first that failed."""
        for path in [folder, *folder.rglob("*")] if self.ordinary else []:
            os.chown(path, ORDINARY, ORDINARY)
        request = {"commands": commands, "folder": str(folder), "writable": [str(path) for path in writable]}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [Finished(**row) for row in json.loads(self._process.stdout.readline())]

    def simulate(self, folder, source, top="hostile", writable=()):
        """What building `source` did, and running it, if it was built; only the compiler may write to the folder."""
        tools = find_tools(None)
        (folder / "hostile.sv").write_text(source)
        build = [str(tools.iverilog), "-g2012", "-s", top, "-o", "hostile.vvp", "hostile.sv"]
        built = self.run(folder, build, writable=[folder])[-1]
        if built.returncode or built.stopped:
            return [built]
        return [built, *self.run(folder, tools.simulate("hostile.vvp"), writable=writable)]

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=30)


def main():
    config = JudgeConfig(**json.loads(sys.argv[2]))
    if "ordinary" in sys.argv:
        become_ordinary()
    sandbox = Sandbox(level=Level(sys.argv[1]), config=config, readable=find_tools(None).readable)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        sandbox.adopt(folder, *folder.rglob("*"))
        done = []
        for command in request["commands"]:
            done.append(sandbox.run(command, folder, writable=[Path(path) for path in request["writable"]]))
            if done[-1].returncode or done[-1].stopped:
                break
        print(json.dumps([asdict(one) for one in done]), flush=True)


if __name__ == "__main__":
    main()
