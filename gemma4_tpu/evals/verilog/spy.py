"""Finds which sandbox works on this machine: a spy is simulated in each, and must come back empty-handed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.sandbox import Level, Sandbox

log = logging.getLogger(__name__)
_SPY = """
module spy;
  integer file;
  initial begin
    $display("alive");
    file = $fopen("{secret}", "r"); if (file != 0) $display("read");
    file = $fopen("{target}", "w"); if (file != 0) $display("wrote");
    file = $fopen("/dev/shm/{name}", "w"); if (file != 0) $display("wrote to memory");
    file = $fopen("/proc/self/mem", "r+"); if (file != 0) $display("opened its own memory");
  end
endmodule
"""


def spy(tools: Tools, sandbox: Sandbox, folder: Path) -> str | None:
    """Why the sandbox does not work here; None: it works. Runs in a worker; `folder` is its work folder."""
    outside = folder.parent / f"outside_{folder.name}"
    outside.mkdir(exist_ok=True)
    outside.chmod(0o777)  # file permissions alone would let anyone in
    secret, target = outside / "secret", outside / "target"
    try:
        secret.write_text("secret")
        (folder / "spy.sv").write_text(_SPY.format(secret=secret, target=target, name=folder.name))
        (folder / "settings").write_text(tools.settings("spy", "spy.vvp"))
        program = folder / "spy.vvp"
        program.touch()
        sandbox.adopt(program)
        command = tools.compile_and_simulate("settings", "spy.sv", program.name, "built")  # as for designs
        done = sandbox.run(command, folder, writable=[program])
        built, *lines = done.stdout.split("\n")
        if built != "built":
            return f"the compiler does not run in it: {(done.stderr + done.stdout).strip()[:200]}"
    except OSError as error:
        return str(error)
    finally:
        shutil.rmtree(outside, ignore_errors=True)
    if "alive" not in lines:
        return "the simulator does not run in it"
    leaks = [line for line in lines if line not in ("alive", "")]
    return f"a simulation {' and '.join(leaks)}" if leaks and sandbox.level is not Level.NONE else None


def choose_level(config: JudgeConfig, tried: dict[Level, str | None]) -> Level:
    """The strictest working level among those that the configuration allows.

    Raises:
      UserError: none works, and `unsafe` is false; or the simulator does not run at all.
    """
    if tried[Level.NONE]:
        raise UserError(f"the simulator does not run on this machine: {tried[Level.NONE]}")
    allowed = [Level.BUBBLEWRAP, Level.LANDLOCK] if config.sandbox == "auto" else [Level(config.sandbox)]
    for level in allowed:
        if tried[level] is None:
            return level
    reasons = "; ".join(f"{level}: {tried[level]}" for level in allowed)
    if not config.unsafe:
        raise UserError(
            f"eval.judge.sandbox={config.sandbox}: no sandbox works on this machine ({reasons}), and samples are code"
            " that can read and write your files: install bubblewrap (`sudo apt-get install bubblewrap`), use a Linux"
            " with Landlock (5.13 or newer), or accept the risk with eval.unsafe=true"
        )
    log.warning("no sandbox works on this machine (%s): eval.unsafe=true lets samples read and write files", reasons)
    return Level.NONE
