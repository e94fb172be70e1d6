"""`python -m gemma4_tpu.serve run=<merged folder>`: runs a vLLM server until Ctrl-C. Imports no JAX.

Configuration → memory estimate → vLLM starts in its container (or as a process, `serving.runner=process`), is followed
and checked to be the trained model → stopped and removed. `serving=local` serves small checkpoints in this process.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.serving import ServeRoot
from gemma4_tpu.errors import exit_code, leave
from gemma4_tpu.hardware import GIB
from gemma4_tpu.serving.checks import ServeChecked, examine_serve, normalise_serve
from gemma4_tpu.serving.gke_checks import GKE
from gemma4_tpu.serving.model_checks import platform_of

if TYPE_CHECKING:
    from gemma4_tpu.serving.local import LocalServer
    from gemma4_tpu.serving.memory import MemoryEstimate
    from gemma4_tpu.serving.server import Server
    from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)


SERVE: EntryPoint[ServeRoot, ServeChecked] = EntryPoint(
    name="serve",
    schema=ServeRoot,
    normalise=normalise_serve,
    examine=examine_serve,
    summary=(
        "Serve a merged checkpoint or adapters with vLLM. Runs its container: checks first, follows the start, verifies"
        " that the server has the trained model, stops and removes the container on Ctrl-C. Needs Docker or Podman, or"
        " vLLM on this machine (serving.runner=process)."
    ),
    examples=(
        ("serving=v6e8 run=outputs/train/<run>", "31B on v6e-8 as in the paper"),
        ("serving=v6e8 run=<merged folder> dry_run=true", "check, and show the container command"),
        ("serving=v6e8_tuned run=<merged folder> serving.max_model_len=8192", "two copies in fp8, shorter sequences"),
        ("serving=v6e4_moe run=<merged folder> 'serving.flags={seed: 0}'", "26B-A4B, with a flag of vllm serve"),
        (
            "serving=h100x2 'adapters=[outputs/train/<run>,outputs/train/<other run>]'",
            "several runs on one base, without merging them",
        ),
        (
            "serving=v6e8 serving.runner=gke run=gs://bucket/<run>/merged architecture=gemma4_31b",
            "Kubernetes objects for GKE, for kubectl apply -f -",
        ),
        ("serving=vllm_cpu run=outputs/train/<run>", "a small checkpoint on this CPU, by the vLLM of `make vllm`"),
        ("serving=local run=outputs/train/<run>", "a small checkpoint on this CPU, without vLLM"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 stopped on request, 2 refused or failed (one message on stderr), 130 or 143 stopped before ready."""
    return exit_code(lambda: _run(load(list(sys.argv[1:] if argv is None else argv), SERVE)))


def _run(loaded: Loaded[ServeRoot, ServeChecked]) -> int:
    from gemma4_tpu.tracking.logs import setup_logging

    setup_logging()
    return _run_embedded(loaded) if loaded.root.serving.runner == "embedded" else _run_vllm(loaded)


def _run_embedded(loaded: Loaded[ServeRoot, ServeChecked]) -> int:
    from gemma4_tpu.serving.local import LocalServer, check_host_memory, weight_bytes

    serving, checked = loaded.root.serving, loaded.checked
    check_host_memory(serving, checked)
    if serving.warning:
        log.warning("serving: %s", serving.warning)
    told = f"weights {weight_bytes(serving, checked) / GIB:.3g} GiB in {serving.weight_dtype}, estimated"
    if loaded.root.dry_run:
        print(f"# {told}; no container: this process would serve on http://{serving.host}:{serving.port}/v1")
        return 0
    log.info("%s", told)
    return _recorded(loaded, lambda record: LocalServer(serving, checked))


def _run_vllm(loaded: Loaded[ServeRoot, ServeChecked]) -> int:
    from gemma4_tpu.serving.memory import check_memory, estimate

    serving, checked = loaded.root.serving, loaded.checked
    if checked.adapters:
        from gemma4_tpu.serving.adapter_weights import check_weights

        check_weights(checked.adapters, platform_of(serving))
    memory = estimate(checked.architecture, serving, checked.adapters, checked.quantised_bytes)
    check_memory(memory, checked.architecture, serving, checked.adapters, checked.quantised_bytes)
    if serving.source:
        log.info("serving: from %s", serving.source)
    if serving.warning:
        log.warning("serving: %s", serving.warning)
    for note in checked.notes:
        log.info("%s", note)
    if serving.runner == GKE:
        return _show_objects(loaded, memory)
    return _dry_run(loaded, memory) if loaded.root.dry_run else _serve(loaded, memory)


def _told(memory: MemoryEstimate) -> list[str]:
    return [
        *(f"per chip, estimated: {line}" for line in memory.formula),
        f"room for {memory.sequences} sequences of full length, on all copies together",
    ]


def _show_objects(loaded: Loaded[ServeRoot, ServeChecked], memory: MemoryEstimate) -> int:
    """Prints the estimate as comments, and the Kubernetes objects."""
    from gemma4_tpu.serving.kubernetes import rendered

    for line in _told(memory):
        print(f"# {line}")
    print(rendered(loaded.root.serving, loaded.checked), end="")
    return 0


def _dry_run(loaded: Loaded[ServeRoot, ServeChecked], memory: MemoryEstimate) -> int:
    """Prints the estimate as comments, and the command, for a shell."""
    from gemma4_tpu.serving.runners import runner_of

    for line in _told(memory):
        print(f"# {line}")
    if loaded.checked.adapters:
        from gemma4_tpu.serving.adapter_copies import lacking_v

        for adapter in loaded.checked.adapters:
            if lacking_v(adapter, loaded.checked.architecture):
                print(f"# {adapter.name}: where V is K, vLLM would apply K's adapter to K alone; serve gives it a copy")
    print(runner_of(loaded.root.serving, loaded.checked).command)
    return 0


def _serve(loaded: Loaded[ServeRoot, ServeChecked], memory: MemoryEstimate) -> int:
    from gemma4_tpu.serving.adapter_copies import copied
    from gemma4_tpu.serving.server import Server

    def make(record: RunFolder) -> Server:
        for line in _told(memory):
            log.info("%s", line)
        checked = loaded.checked
        adapters = copied(checked.adapters, checked.architecture, record.path / "adapters")
        return Server(loaded.root.serving, replace(checked, adapters=adapters), memory, record.path / "server.log")

    return _recorded(loaded, make)


def _recorded(loaded: Loaded[ServeRoot, ServeChecked], make: Callable[[RunFolder], Server | LocalServer]) -> int:
    """Runs a server and keeps its record: configuration, log, result."""
    from gemma4_tpu.tracking import provenance, records
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.run import RunFolder

    config = loaded.root
    record = RunFolder.open(
        loaded.checked.run or "outputs", config.name, config.run_dir, "auto", config=asdict(config),
        kind=records.SERVING, overrides=loaded.overrides, resume_allow=("run", "serving"),
    )  # fmt: skip
    setup_logging(record.log_path)
    server = make(record)
    try:
        serving = config.serving
        program = {"docker": {"image": serving.image}, "process": {"executable": serving.executable}, "embedded": {}}
        captured = provenance.capture(hardware={"slice": serving.slice}, seeds={}, fingerprints=program[serving.runner])
        provenance.record(record, captured)
        return server.run()
    finally:
        record.leave(server.outcome)
        record.close()


if __name__ == "__main__":
    leave(main())
