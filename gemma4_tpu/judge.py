"""`python -m gemma4_tpu.judge eval=verilog_eval eval.problems_path=<clone>`: the judge as a service on loopback.

Problems → judge ready, canaries refused → served until SIGTERM, SIGINT or the parent's end. No JAX here.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence

from gemma4_tpu.config.entries import JUDGE
from gemma4_tpu.config.judge_checks import JudgeChecked
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.tasks import JudgeRoot
from gemma4_tpu.errors import UserError, exit_code

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 stopped, 1 the workers died, 2 refused (one message on stderr), 130 interrupted."""
    return exit_code(lambda: _serve(load(list(sys.argv[1:] if argv is None else argv), JUDGE)))


def _serve(loaded: Loaded[JudgeRoot, JudgeChecked]) -> int:
    from gemma4_tpu.evals.benchmarks import load_problems
    from gemma4_tpu.evals.judge_server import HOST, Service, make_server
    from gemma4_tpu.evals.reward import ANNOUNCEMENT
    from gemma4_tpu.evals.verilog.canaries import try_canaries
    from gemma4_tpu.evals.verilog.judge import VerilogJudge
    from gemma4_tpu.tracking.logs import setup_logging

    setup_logging()
    root, stop, died = loaded.root, threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if root.with_parent:
        threading.Thread(target=_wait_for_the_end_of_input, args=(stop,), daemon=True).start()
    problems = load_problems(root.eval)
    with VerilogJudge(root.eval.judge) as judge:
        try_canaries(judge)
        check = judge.prepare(problems)

        def broken() -> None:
            died.set()
            stop.set()

        try:
            server = make_server(Service(problems, judge, check), root.port, broken)
        except OSError as error:
            raise UserError(f"port={root.port}: {error.strerror}; give another port, or 0 for any") from None
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        log.info("%d problems, %s, sandbox %s; the canaries are refused", len(problems), check.simulator, check.sandbox)
        print(f"{ANNOUNCEMENT}http://{HOST}:{server.server_port}", flush=True)
        stop.wait()
        server.shutdown()
        server.server_close()
    return 1 if died.is_set() else 0


def _wait_for_the_end_of_input(stop: threading.Event) -> None:
    """The parent holds the other end of stdin: when it is gone, however, this ends too."""
    while sys.stdin.buffer.read(4096):
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
