"""One bench after another in a sandbox that stays: what ends one of them is no matter of the next."""

import os
import signal

import pytest

from gemma4_tpu.evals.verilog.benches import Benches
from tests.evals.verilog.designs import needs_iverilog

pytestmark = needs_iverilog

FINE = 'integer f; initial begin f = $fopen("seen.txt", "w"); $fwrite(f, "stop 7"); $display("done"); $finish(0); end'
ENDLESS = "integer i = 0; initial while (1) i = i + 1;"
FLOOD = 'initial forever $display("flood flood flood flood flood flood flood flood flood flood flood");'
SPREADING = (
    'integer f; initial begin f = $fopen("more", "w"); if (f) $display("wrote"); $fwrite(\'h80000002, "odd\\n"); end'
)


def simulated(tools, sandbox, folder, bodies, kill):
    """What benches with these bodies did, one after another, and whether the shell outlasted them. In a worker."""
    built, place = folder / "built", folder / "place"
    built.mkdir()
    place.mkdir(mode=0o700)
    sandbox.adopt(built, place)
    benches, done, pids = Benches(sandbox, place), [], []
    for body in bodies:
        (built / "bench.sv").write_text(f"module bench; {body} endmodule\n")
        sandbox.run(tools.build("bench", "bench.vvp", ["bench.sv"]), built, writable=[built])
        done.append(benches.simulate(tools.simulate("bench.vvp"), built / "bench.vvp", {"data": "x"}, 1.0))
        pids.append(benches._shell and benches._shell.process.pid)
        if kill:
            os.kill(pids[-1], signal.SIGKILL)
    left = sorted(path.name for path in place.iterdir())
    benches.close()
    return done, pids, left


def fine(seen, done):
    return (seen, done.stdout, done.stderr, done.returncode, done.stopped) == ("stop 7", "done\n", "", 0, None)


def test_benches_do_not_harm_each_other(judge):
    done, pids, left = judge.task(simulated, [FINE, SPREADING, FINE, ENDLESS, FINE, FLOOD, FINE], False).result()
    assert [fine(*one) for one in done] == [True, False, True, False, True, False, True]
    seen, spreading = done[1]
    assert (seen, spreading.stdout, spreading.stderr) == ("", "", "odd\n")  # nothing else can be written
    assert done[3][1].stopped == "cpu" and 0.5 < done[3][1].cpu_seconds < 4
    assert done[5][1].stopped == "output" and len(done[5][1].stdout) <= judge.config.output_kib << 10
    assert pids[0] is not None and pids[0] == pids[4] != pids[6]  # only what can't be stopped otherwise ends the shell
    assert left == ["bench.vvp", "data", "seen.txt"]


@pytest.mark.slow
def test_a_shell_that_is_killed_is_started_again(judge):
    done, pids, _ = judge.task(simulated, [FINE, FINE, FINE], True).result()
    assert [fine(*one) for one in done] == [True, True, True]
    assert len(set(pids)) == 3
