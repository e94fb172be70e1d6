"""Checks of `python -m gemma4_tpu.serve` before a server starts: model folder, flags, machine, heads, port. Imports no
JAX.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.paths import at_home, folder_of, name_problem
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.serving import GkeServingConfig, ServeRoot, ServingConfig
from gemma4_tpu.hardware import LOCAL, SLICES
from gemma4_tpu.serving.adapter_checks import ServedAdapter, find_adapters, of_sweeps
from gemma4_tpu.serving.drafter_checks import drafter_problems
from gemma4_tpu.serving.flag_checks import vllm_problems
from gemma4_tpu.serving.gke_checks import GKE, gke_problems, in_a_pod
from gemma4_tpu.serving.local_checks import local_problems
from gemma4_tpu.serving.model_checks import (
    MERGED,
    FoundModel,
    find_in_bucket,
    find_model,
    longest_problem,
    on_tpu,
    platform_of,
    quantised_problems,
)
from gemma4_tpu.tracking.run import is_run

CPU_HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head widths that attention in vLLM 0.32's CPU build supports (`cpu_attn.py`)."""


@dataclass(frozen=True)
class ServeChecked:
    """What the checks found out along the way."""

    model: Path
    """The folder that vLLM loads, mounted into its container if there is one."""
    run: Path | None
    """The run folder that contains it, if any."""
    architecture: Architecture
    """From the folder's `config.json`."""
    notes: tuple[str, ...]
    """For the report; they changed nothing."""
    adapters: tuple[ServedAdapter, ...] = ()
    """Served on `model`, which is then their base."""
    quantised_bytes: int | None = None
    """Bytes of the weight files if they are quantised; else None."""
    bucket: str | None = None
    """With `runner=gke`: the folder on gs:// that pods mount."""


def name_of(model: Path) -> str:
    """The model name for clients if `served_model_name` is null: the folder's name, for `<run>/merged` the run's, for
    other folders in a run both.
    """
    folder = model.absolute()
    if not is_run(folder.parent):
        return folder.name
    return folder.parent.name if folder.name == MERGED else f"{folder.parent.name}-{folder.name}"


def url_of(serving: ServingConfig) -> str:
    """The URL for clients on the server's own machine."""
    everywhere = serving.host in ("", "0.0.0.0", "::")
    return f"http://{'127.0.0.1' if everywhere else serving.host}:{serving.port}"


def normalise_serve(root: ServeRoot) -> ServeRoot:
    """Canonical spelling: `~` expanded, no trailing slash, flags with dashes and without leading ones."""
    serving = root.serving
    flags = {name.lstrip("-").replace("_", "-"): value for name, value in serving.flags.items()}
    cache = folder_of(serving.compile_cache)
    serving = replace(serving, flags=flags, compile_cache=None if cache in (None, "", "null", "none") else cache)
    serving = replace(serving, executable=at_home(serving.executable), drafter=folder_of(serving.drafter))
    if serving.runner == GKE:
        serving = in_a_pod(serving, root.run)
    return replace(
        root, serving=serving, run=folder_of(root.run) or "", run_dir=folder_of(root.run_dir),
        adapters=[folder_of(folder) or "" for folder in root.adapters],
    )  # fmt: skip


def examine_serve(root: ServeRoot) -> tuple[ServeChecked | None, list[Refusal]]:
    """Checks everything that can be checked before anything is started; `ServeChecked` is None if there are
    problems.
    """
    serving = root.serving
    messages = limit_problems(root) + _runner(root)
    messages += local_problems(serving) if serving.runner == "embedded" else vllm_problems(serving)
    messages += _slice(serving) + ([] if serving.runner == GKE else _place(serving))
    adapters, folder, refused = find_adapters(root.adapters, root.run, serving) if root.adapters else ((), root.run, [])
    messages += refused
    found: FoundModel | None = None
    if not refused:
        found, lacking = _model(root, folder)
        messages += lacking
    notes = of_sweeps(root.adapters)[1]
    if found is not None and not messages:
        messages += longest_problem(serving, found) + quantised_problems(serving, found)
        messages += drafter_problems(serving, found.architecture)
        match platform_of(serving):
            case "cpu":
                messages += _on_cpu(serving, found.architecture)
            case platform:
                refused, more = _split(serving, found.architecture)
                messages += refused
                notes += more
                notes += on_tpu(serving, found) if platform == "tpu" else []
    own = serving.served_model_name or (name_of(found.folder) if found else None)
    if own in [adapter.name for adapter in adapters]:
        messages.append(f"serving.served_model_name={own}: also the name of an adapter; rename the base")
    messages += name_problem(root.name)
    if root.run_dir is not None and "://" in root.run_dir:
        messages.append(f"run_dir={root.run_dir}: a server's record must be a local folder")
    if messages or found is None:
        return None, [Refusal(m) for m in messages]
    run = next((place for place in (Path(root.run), found.folder.parent) if is_run(place)), None)
    return ServeChecked(
        found.folder if serving.runner == GKE else found.folder.absolute(), run, found.architecture, tuple(notes),
        adapters, found.quantised_bytes, root.run if serving.runner == GKE else None,
    ), []  # fmt: skip


def _model(root: ServeRoot, folder: str) -> tuple[FoundModel | None, list[str]]:
    if root.serving.runner == GKE:
        return find_in_bucket(root.run, root.architecture)
    return find_model(folder, mounted=root.serving.runner == "docker")


def _runner(root: ServeRoot) -> list[str]:
    """Keys that apply to another runner only."""
    serving = root.serving
    messages = gke_problems(serving, root.adapters) if serving.runner == GKE else []
    if serving.runner in ("docker", GKE) and serving.executable != ServingConfig().executable:
        messages.append(
            f"serving.executable={serving.executable}: the container has its own; leave it out, or set"
            " serving.runner=process"
        )
    if serving.runner != GKE:
        given = {"architecture": (root.architecture, None), "serving.gke": (serving.gke, GkeServingConfig())}
        messages += [
            f"{key}: only for serving.runner=gke; leave it out" for key, (own, usual) in given.items() if own != usual
        ]
    return messages


def _slice(serving: ServingConfig) -> list[str]:
    """Whether the slice exists, and whether the server runs on it."""
    name, runner = serving.slice, serving.runner
    if name not in (LOCAL, *SLICES):
        hint = did_you_mean(name, (LOCAL, *SLICES), "serving.slice={}".format)
        return [f"serving.slice={name}: no such slice{hint} (there are: {LOCAL}, {', '.join(SLICES)})"]
    if name == LOCAL and runner == "docker":
        return [
            f"serving.slice={LOCAL}: the container is for TPUs and GPUs; on a CPU, use serving=local (PyTorch in this"
            " process) or serving=vllm_cpu (vLLM's CPU build)"
        ]
    if name != LOCAL and runner == "embedded":
        return [f"serving.slice={name}: serving.runner=embedded serves on this machine's CPU: serving.slice={LOCAL}"]
    if name != LOCAL and serving.weight_dtype == "float32":
        return [f"serving.weight_dtype=float32: only for serving=local and vllm_cpu; {name} takes bfloat16 or fp8"]
    return []


def _on_cpu(serving: ServingConfig, arch: Architecture) -> list[str]:
    """What vLLM's CPU build was observed to refuse, sometimes only at the first request."""
    if serving.runner == "embedded":
        return []
    messages = [
        f"serving.{key}={value}: {why}"
        for key, value, usual, why in (
            ("tensor_parallel_size", serving.tensor_parallel_size, 1, "a CPU is not split; leave it out"),
            ("data_parallel_size", serving.data_parallel_size, 1, "a CPU holds one copy; leave it out"),
        )
        if value != usual
    ]
    if serving.weight_dtype == "fp8":
        messages.append("serving.weight_dtype=fp8: a CPU takes float32 or bfloat16")
    widths = {arch.layer_head_dim(layer) for layer in range(arch.num_layers)}
    if refused := sorted(widths - set(CPU_HEAD_WIDTHS)):
        messages.append(
            f"run: heads of width {', '.join(map(str, refused))}: vLLM's attention on CPUs supports"
            f" {', '.join(map(str, CPU_HEAD_WIDTHS))}, and crashes at the first request otherwise; use serving=local"
        )
    return messages


def _place(serving: ServingConfig) -> list[str]:
    """Whether this machine can listen there, and whether the compile cache is a local folder."""
    messages = []
    cache_folder = serving.compile_cache or ""
    if "://" in cache_folder:
        messages.append(
            f"serving.compile_cache={cache_folder}: use a folder on a local disk; on a bucket, nothing was ever found"
            " again"
        )
    if "," in cache_folder:
        messages.append(f"serving.compile_cache={cache_folder}: a folder with a comma can't be mounted")
    if not 1 <= serving.port <= 65535:
        return messages
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except PermissionError:
            messages.append(f"serving.port={serving.port}: not permitted to listen there; use a port from 1024 on")
        except (socket.gaierror, UnicodeError):
            messages.append(f"serving.host={serving.host}: not an address of this machine; use 127.0.0.1 or 0.0.0.0")
        except OSError as error:
            messages.append(
                f"serving.port={serving.port}: can't listen on {serving.host} ({error.strerror}); another server may be"
                f" there (docker ps --filter name=gemma4-serve-{serving.port}): stop it, or set another serving.port"
            )
    return messages


def _split(serving: ServingConfig, arch: Architecture) -> tuple[list[str], list[str]]:
    """Problems and notes about dividing heads among chips: (refusals, notes)."""
    tp, dp = serving.tensor_parallel_size, serving.data_parallel_size
    slice_ = SLICES[serving.slice]
    refused, notes = [], []
    fitting = [n for n in range(1, slice_.devices + 1) if arch.num_heads % n == 0 and slice_.devices % n == 0]
    if slice_.hosts > 1:
        single = ", ".join(name for name, other in SLICES.items() if other.hosts == 1)
        refused.append(f"serving.slice={slice_.name}: has {slice_.hosts} hosts; a container serves one ({single})")
    if tp * dp > slice_.devices:
        refused.append(
            f"serving.tensor_parallel_size={tp} × serving.data_parallel_size={dp}: {slice_.name} has {slice_.devices}"
            f" devices; tensor_parallel_size can be {', '.join(map(str, fitting))}"
        )
    elif tp * dp < slice_.devices:
        notes.append(f"{slice_.devices - tp * dp} of the {slice_.devices} devices of {slice_.name} are left idle")
    if arch.num_heads % tp:
        refused.append(
            f"serving.tensor_parallel_size={tp}: does not divide the model's {arch.num_heads} query heads; it can be"
            f" {', '.join(map(str, fitting))}"
        )
    for kind, heads in (("sliding", arch.num_kv_heads), ("global", arch.num_global_kv_heads)):
        if heads % tp and tp % heads:
            refused.append(
                f"serving.tensor_parallel_size={tp}: {heads} KV heads of {kind} layers can be neither split over it"
                " nor repeated"
            )
        elif tp > heads:
            notes.append(f"{heads} KV heads of {kind} layers are replicated to {tp}: more cache for the same tokens")
    return refused, notes
