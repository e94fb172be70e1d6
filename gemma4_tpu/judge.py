"""`python -m gemma4_tpu.judge eval=verilog_eval eval.problems_path=<clone>`: the judge as a service on loopback.

Problems → judge ready, canaries refused → served until SIGTERM, SIGINT or the parent's end. No JAX here.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

from gemma4_tpu.config.entry import EntryPoint, Nothing
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.paths import folder_of
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.tasks import JudgeRoot
from gemma4_tpu.errors import UserError, exit_code, handle, leave
from gemma4_tpu.evals.checks import JUDGE_CHOICES, problems_path_messages

log = logging.getLogger(__name__)


def _normalise(root: JudgeRoot) -> JudgeRoot:
    """One spelling: `~` expanded, no slash at the end."""
    return replace(root, eval=replace(root.eval, problems_path=folder_of(root.eval.problems_path)))


def _examine(root: JudgeRoot) -> tuple[Nothing | None, list[Refusal]]:
    """Everything that can be checked without a simulator; None when there are problems."""
    messages = [*limit_problems(root, JUDGE_CHOICES), *problems_path_messages(root.eval)]
    return (None, [Refusal(m) for m in messages]) if messages else (Nothing(), [])


JUDGE: EntryPoint[JudgeRoot, Nothing] = EntryPoint(
    name="judge",
    schema=JudgeRoot,
    normalise=_normalise,
    examine=_examine,
    summary=(
        "Serve verdicts on Verilog completions, as a reward. Takes batches of problem and completion on loopback, and"
        " answers with verdicts and graded scores. Tests itself with known cheats first. Needs Icarus Verilog."
    ),
    examples=(
        ("", "the embedded synthetic problems, on port 8765"),
        ("eval=verilog_eval eval.problems_path=<clone> port=9000", "verilog-eval, on another port"),
    ),
    shorthands={"eval.unsafe": "eval.judge.unsafe"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 stopped once it was ready, 130 or 143 before; 1 the workers died; 2 refused (one message)."""
    return exit_code(lambda: _serve(load(list(sys.argv[1:] if argv is None else argv), JUDGE)))


def _serve(loaded: Loaded[JudgeRoot, Nothing]) -> int:
    from gemma4_tpu.evals.benchmarks import load_problems
    from gemma4_tpu.evals.judge_server import HOST, Service, make_server
    from gemma4_tpu.evals.reward import ANNOUNCEMENT
    from gemma4_tpu.evals.verilog.canaries import try_canaries
    from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge
    from gemma4_tpu.tracking.logs import setup_logging

    setup_logging()
    root, died, stopping = loaded.root, threading.Event(), threading.Event()
    if root.with_parent:
        threading.Thread(target=_end_with_the_input, args=(stopping,), daemon=True).start()
    problems = load_problems(root.eval)
    with VerilogJudge(root.eval.judge) as judge:
        try_canaries(judge)
        check = judge.prepare(problems)
        try:
            service = Service(problems, judge, check)
            server = make_server(service, root.port, died.set)
        except OSError as error:
            raise UserError(f"port={root.port}: {error.strerror}; give another port, or 0 for any") from None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        log.info("%d problems, %s, sandbox %s; the canaries are refused", len(problems), check.simulator, check.sandbox)
        try:
            print(f"{ANNOUNCEMENT}http://{HOST}:{server.server_port}", flush=True)
            died.wait()
        except KeyboardInterrupt as stop:  # any of the signals that request an end
            handle(stop)
            stopping.set()
            log.info("stopped: %d samples judged", service.health()["judged"])
            return 0
        finally:
            server.shutdown()
            server.server_close()
    return 1


def _end_with_the_input(stopping: threading.Event) -> None:
    """Ends this process, unless it ends already, when the parent is gone, which holds the other end of stdin."""
    while os.read(sys.stdin.fileno(), 4096):  # unbuffered: a lock on a buffer would be in the way at the end
        pass
    if not stopping.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    leave(main())
