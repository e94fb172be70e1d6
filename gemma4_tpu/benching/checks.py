"""Checks of `python -m gemma4_tpu.bench`: valid cells, an endpoint, a record of the server. Imports no JAX."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.benching.slo import slo_problems
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.paths import address_problems, folder_of, name_problem
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.serving import BenchConfig, BenchRoot, ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, SLICES
from gemma4_tpu.serving.adapter_checks import find_adapters
from gemma4_tpu.serving.checks import name_of, url_of
from gemma4_tpu.serving.model_checks import MERGED
from gemma4_tpu.tracking.records import config_of


@dataclass(frozen=True)
class BenchChecked:
    """What the checks found out along the way."""

    endpoint: str
    """Base URL without /v1."""
    slice: str
    """Where the server runs; `local`: unknown."""
    vocabulary: int | None
    """Number of the model's token ids; None: unknown."""
    serving: ServingConfig | None
    """How the server was started, according to its record; None: it has none."""
    model: str | None
    """The model's name on the server, if configuration or record contains it."""
    folder: Path | None
    """The model's folder, if the record contains it."""


def normalise_bench(root: BenchRoot) -> BenchRoot:
    """Canonical spelling: no slash or /v1 at the end of the URL, `~` expanded."""
    endpoint = re.sub(r"(/v1)?/*$", "", root.endpoint) if root.endpoint else None
    served, run_dir = folder_of(root.served) or None, folder_of(root.run_dir) or None
    return replace(root, endpoint=endpoint, served=served, run_dir=run_dir)


def examine_bench(root: BenchRoot) -> tuple[BenchChecked | None, list[Refusal]]:
    """Checks everything that can be checked without contacting the server."""
    serving: ServingConfig | None = None
    messages = [*limit_problems(root), *_cells(root.bench), *_names(root)]
    if root.served is not None:
        serving, refused = _record(root.served)
        messages += refused
        messages += [
            f"{key}={value}: the record in served={root.served} says it; leave it out"
            for key, value, default in (("slice", root.slice, LOCAL), ("architecture", root.architecture, None))
            if value != default
        ]
    endpoint = root.endpoint or (url_of(serving) if serving else "")
    if not endpoint and root.served is None:
        messages.append("endpoint is not set; give endpoint=http://127.0.0.1:8000, or served=<record of serve>")
    elif endpoint:
        messages += address_problems("endpoint", endpoint, "http://127.0.0.1:8000")
    if root.bench.cross_check and (serving is None or serving.runner == "embedded"):
        messages += [] if root.served and serving is None else [_no_vllm(root.served)]
    if messages:
        return None, [Refusal(message) for message in messages]
    run = _run(root.served, serving) if root.served and serving else None
    vocabulary = ARCHITECTURES[root.architecture].vocab_size if root.architecture else _vocabulary(run)
    folder = run / MERGED if run and (run / MERGED).is_dir() else run
    model = root.bench.served_model_name
    if model is None and serving is not None:
        model = serving.served_model_name or (name_of(run) if run else None)
    return BenchChecked(endpoint, serving.slice if serving else root.slice, vocabulary, serving, model, folder), []


def _cells(bench: BenchConfig) -> Iterator[str]:
    if not bench.lengths:
        yield "bench.lengths=[]: give at least one pair of prompt and answer, such as [[512,256]]"
    for pair in bench.lengths:
        if len(pair) != 2 or min(pair) < 1:
            yield f"bench.lengths: {pair} is not a pair of prompt and answer lengths in tokens, such as [512,256]"
    searched = not bench.rates and not bench.users
    if (bench.rates and bench.users) or (searched and not bench.slo):
        yield (
            f"bench.rates={bench.rates}, bench.users={bench.users}: give one of them, and [] for the other"
            " (requests per second, or users at a time); or give limits, such as bench.slo='ttft_p99<500ms', and the"
            " highest rate that keeps them is looked for"
        )
    yield from slo_problems(bench.slo, bench.requests, searched=searched)
    if bench.cross_check and searched and bench.slo:
        yield "bench.cross_check=true: a search has no cells to repeat; give the rate that it finds as bench.rates"
    yield from (f"bench.rates: {rate} must be more than 0, or inf" for rate in bench.rates if not rate > 0)
    yield from (f"bench.users: {users} must be at least 1" for users in bench.users if users < 1)
    for key in ("lengths", "rates", "users"):
        values = [tuple(v) if isinstance(v, list) else v for v in getattr(bench, key)]
        if twice := sorted({v for v in values if values.count(v) > 1}):
            yield f"bench.{key}: {twice[0]} is listed twice"
    yield from _prompts(bench)
    if bench.arrivals == "fixed" and bench.users:
        yield "bench.arrivals=fixed: only with bench.rates; a user sends once its last request is answered"


def _prompts(bench: BenchConfig) -> Iterator[str]:
    shortest = min((pair[0] for pair in bench.lengths if pair), default=1)
    if bench.shared_tokens >= shortest:
        yield f"bench.shared_tokens={bench.shared_tokens}: a prompt of bench.lengths has {shortest}; give fewer"
    if bench.turns > 1 and not bench.users:
        yield f"bench.turns={bench.turns}: only with bench.users, whose next request waits for the answer to the last"
    if bench.turns > 1 and bench.requests % bench.turns:
        yield f"bench.requests={bench.requests}: not a multiple of bench.turns={bench.turns}"
    if bench.prompts is not None and not Path(bench.prompts).is_file():
        yield f"bench.prompts={bench.prompts}: no such file"
    if bench.cross_check and (bench.prompts is not None or bench.turns > 1):
        yield "bench.cross_check=true: vLLM's client has neither bench.prompts nor bench.turns; leave them out"


def _names(root: BenchRoot) -> Iterator[str]:
    for key, value, known in (
        ("slice", root.slice, [*SLICES, LOCAL]),
        ("architecture", root.architecture, ARCHITECTURES),
    ):
        if value is not None and value not in known:
            hint = did_you_mean(value, known, (key + "={}").format)
            yield f"{key}={value}: no such {key}{hint} (choices: {', '.join(known)})"
    yield from name_problem(root.name)
    if root.run_dir is not None and "://" in root.run_dir:
        yield f"run_dir={root.run_dir}: the record of a load test is local; give a local folder"


def _record(folder: str) -> tuple[ServingConfig | None, list[str]]:
    """`serving` of a server's record, or the problems with it. Drops keys of other versions."""
    path = Path(folder, "config.yaml")
    try:
        told = config_of(path.parent).get("serving")
    except UserError as damage:
        return None, [f"served={folder}: {damage}"]
    if not isinstance(told, dict) or not {"slice", "host", "port"} <= told.keys():
        return None, [f"served={folder}: not the record of a server (python -m gemma4_tpu.serve writes one)"]
    if told["slice"] == LOCAL:  # a record from before the key `runner` existed
        told = {"runner": "embedded", **told}
    known = {field.name for field in fields(ServingConfig)}
    return ServingConfig(**{key: value for key, value in told.items() if key in known}), []


def _no_vllm(served: str | None) -> str:
    told = "the server of served= runs without vLLM" if served else "give served=<record of serve>"
    return f"bench.cross_check=true: needs the server's vLLM to run vLLM's own client; {told}"


def _run(served: str, serving: ServingConfig) -> Path | None:
    """The folder that the server serves, according to its record; with adapters, that of their base."""
    told = config_of(Path(served))
    run = told.get("run")
    if not run and (adapters := told.get("adapters")):
        _, run, _ = find_adapters(adapters, "", serving)
    return Path(str(run)) if run else None


def _vocabulary(run: Path | None) -> int | None:
    """Vocabulary size of the model in a folder, if the folder is on this machine."""
    for path in (run / "config.json", run / MERGED / "config.json") if run else ():
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            return config.get("text_config", config).get("vocab_size")
    return None
