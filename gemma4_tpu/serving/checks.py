"""Checks of `python -m gemma4_tpu.serve` before a container starts: image, model folder, flags, heads, port. No JAX.

The flags of `vllm serve` are those that version 0.32 prints with `--help=all` (`assets/vllm_0_32_flags.txt`).
"""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from gemma4_tpu import assets
from gemma4_tpu.architectures import Architecture, from_hf_config
from gemma4_tpu.checkpoint_folder import INDEX_NAME, SINGLE_NAME, no_checkpoint
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.paths import folder_of, name_problem
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.serving import ServeRoot, ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, SLICES
from gemma4_tpu.hf_config import UNIFIED
from gemma4_tpu.serving.local_checks import local_problems
from gemma4_tpu.tracking.run import is_run

MERGED, ADAPTER = "merged", "adapter"
KNOWN_IMAGES = r"(.*/)?vllm/vllm-(tpu|openai):v0\.32\.\d+(@sha256:[0-9a-f]{64})?"
"""Those whose flags the list holds."""
NO_ADAPTERS = (
    "LoRA adapters are not served: vLLM's JAX implementation of Gemma 4 ignores them without a word, so that the base"
    " model would answer; serve merged weights: python -m gemma4_tpu.merge run=<run folder>"
)
HANDED_ON = ("HF_TOKEN", "VLLM_API_KEY")
"""Environment variables that the container gets by name, so that no command line or file shows their values."""
OWN_FLAGS = {
    "model": "run", "host": "serving.host", "port": "serving.port", "served-model-name": "serving.served_model_name",
    "tensor-parallel-size": "serving.tensor_parallel_size", "data-parallel-size": "serving.data_parallel_size",
    "max-model-len": "serving.max_model_len", "max-num-seqs": "serving.max_num_seqs",
    "max-num-batched-tokens": "serving.max_num_batched_tokens", "kv-cache-dtype": "serving.kv_cache_dtype",
    "gpu-memory-utilization": "serving.gpu_memory_utilization",
}  # fmt: skip
"""Flags that have a key of their own."""
_RENAMED = {"disable-log-requests": "no-enable-log-requests (it was renamed; requests are not logged by default)"}
_SECRET = re.compile(r"(^|_)(token|key|secret|password)$", re.IGNORECASE)
_LORA = re.compile(r"-{0,2}(no-)?(enable[-_]lora|lora[-_]\w+|max[-_]loras?\b.*|default[-_]mm[-_]loras)", re.IGNORECASE)
_PARSERS = ("tool-call-parser", "reasoning-parser")
_PARSER = "gemma4"


@dataclass(frozen=True)
class ServeChecked:
    """What the checks found out on the way."""

    model: Path
    """The folder that is mounted into the container."""
    run: Path | None
    """The run folder that it lies in, if any."""
    architecture: Architecture
    """By the folder's `config.json`."""
    notes: tuple[str, ...]
    """To report; nothing was changed."""


def name_of(model: Path) -> str:
    """What clients ask for where `served_model_name` is null: the folder's name, for `<run>/merged` the run's."""
    folder = model.absolute()
    return folder.parent.name if folder.name == MERGED and is_run(folder.parent) else folder.name


def url_of(serving: ServingConfig) -> str:
    """Where clients on the server's own machine reach it."""
    everywhere = serving.host in ("", "0.0.0.0", "::")
    return f"http://{'127.0.0.1' if everywhere else serving.host}:{serving.port}"


def normalise_serve(root: ServeRoot) -> ServeRoot:
    """One spelling: `~` expanded, no slash at the end, flags with dashes and without those in front."""
    serving = root.serving
    flags = {name.lstrip("-").replace("_", "-"): value for name, value in serving.flags.items()}
    cache = folder_of(serving.compile_cache)
    serving = replace(serving, flags=flags, compile_cache=None if cache in (None, "", "null", "none") else cache)
    return replace(root, serving=serving, run=folder_of(root.run) or "", run_dir=folder_of(root.run_dir))


def examine_serve(root: ServeRoot) -> tuple[ServeChecked | None, list[Refusal]]:
    """Everything that can be checked without a container engine; `ServeChecked` is None when there are problems."""
    serving = root.serving
    messages = limit_problems(root)
    local = serving.slice == LOCAL
    messages += local_problems(serving) if local else _container(serving)
    messages += _place(serving)
    model, architecture, found = _model(root.run, mounted=not local)
    messages += found
    notes: list[str] = []
    if not local and serving.slice not in SLICES:
        hint = did_you_mean(serving.slice, (LOCAL, *SLICES), "serving.slice={}".format)
        messages.append(f"serving.slice={serving.slice}: no such slice{hint} (there are: {LOCAL}, {', '.join(SLICES)})")
    elif local and model is not None and not messages:
        messages += _length(serving, model)
    elif architecture is not None and model is not None and not messages:
        refused, notes = _split(serving, architecture)
        messages += refused + _length(serving, model)
        notes += _on_tpu(serving, model) if SLICES[serving.slice].chip.platform == "tpu" else []
    messages += name_problem(root.name)
    if root.run_dir is not None and "://" in root.run_dir:
        messages.append(f"run_dir={root.run_dir}: the record of a server is local")
    if messages or model is None or architecture is None:
        return None, [Refusal(m) for m in messages]
    run = next((place for place in (Path(root.run), model.parent) if is_run(place)), None)
    return ServeChecked(model.absolute(), run, architecture, tuple(notes)), []


@cache
def known_flags() -> frozenset[str]:
    """Flags of `vllm serve` 0.32, without dashes in front."""
    return frozenset(Path(assets.ROOT, "vllm_0_32_flags.txt").read_text(encoding="utf-8").split())


def _container(serving: ServingConfig) -> list[str]:
    messages = _image(serving) + _flags(serving) + _environment(serving) + _told_secret(serving)
    if serving.weight_dtype == "float32":
        messages.append("serving.weight_dtype=float32: for serving=local; vLLM serves in bfloat16 or fp8")
    return messages


def _image(serving: ServingConfig) -> list[str]:
    image = serving.image
    name, _, digest = image.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]
    if not image:
        return ["serving.image: which container image? give serving.image=<name>:<version> or <name>@sha256:<digest>"]
    if re.search(r"\s", image) or image.startswith("-"):
        return [f"serving.image={image}: not the name of an image"]
    if digest or re.search(r"\d", tag):
        return []
    told = f"the tag {tag}" if tag else "no tag"
    return [
        f"serving.image={image}: {told} can mean another image tomorrow; pin a version (vllm/vllm-tpu:v0.32.0) or a"
        " digest (vllm/vllm-tpu@sha256:…)"
    ]


def _flags(serving: ServingConfig) -> list[str]:
    messages = []
    checked = re.fullmatch(KNOWN_IMAGES, serving.image) is not None
    for name, value in serving.flags.items():
        given = f"serving.flags.{name}"
        if _LORA.fullmatch(name):
            messages.append(f"{given}: {NO_ADAPTERS}")
        elif name in ("api-key", "hf-token"):
            variable = {"api-key": "VLLM_API_KEY", "hf-token": "HF_TOKEN"}[name]
            messages.append(f"{given}: would stand on a command line for all to read; put it into {variable} instead")
        elif name in OWN_FLAGS:
            messages.append(f"{given}: give {OWN_FLAGS[name]} instead")
        elif name in _PARSERS and value not in (None, _PARSER):
            messages.append(
                f"{given}={value}: Gemma 4's is {_PARSER}, and a name that vLLM doesn't know fails only when the server"
                f" starts; serving.extra_args=[--{name},{value}] passes it unchecked"
            )
        elif checked and name not in known_flags():
            messages.append(f"{given}: {_no_such_flag(name)}")
        elif checked and value is False and f"no-{name}" not in known_flags():
            messages.append(f"{given}=false: vllm serve 0.32 has no --no-{name}; null leaves the flag out")
    for word in serving.extra_args:
        if _LORA.fullmatch(word.partition("=")[0]):
            messages.append(f"serving.extra_args: {word.partition('=')[0]}: {NO_ADAPTERS}")
        elif word.partition("=")[0] in ("--api-key", "--hf-token"):
            messages.append(f"serving.extra_args: {word.partition('=')[0]}: secrets come from the environment, by name")
    if serving.weight_dtype == "fp8" and {"additional-config", "quantization"} & serving.flags.keys():
        messages.append(
            "serving.weight_dtype=fp8: give it, or serving.flags.additional-config or quantization, not both"
        )
    return messages


def _no_such_flag(name: str) -> str:
    if name in _RENAMED:
        return f"no flag of vllm serve 0.32; did you mean {_RENAMED[name]}?"
    hint = did_you_mean(name, known_flags())
    return f"no flag of vllm serve 0.32{hint} (serving.extra_args passes words unchecked)"


def _told_secret(serving: ServingConfig) -> list[str]:
    """Whether a secret of this process's environment would stand on the command line."""
    words = json.dumps([serving.flags, serving.extra_args, serving.env, serving.engine], default=str)
    return [
        f"serving: the value of {name} is in flags, extra_args or env, for all to read; it is handed on by name anyway"
        for name in HANDED_ON
        if len(value := os.environ.get(name, "")) >= 8 and value in words
    ]


def _environment(serving: ServingConfig) -> list[str]:
    messages = []
    for name, value in serving.env.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            messages.append(f"serving.env.{name}: not the name of an environment variable")
        elif _SECRET.search(name):
            messages.append(
                f"serving.env.{name}: no secrets in the configuration; HF_TOKEN and VLLM_API_KEY are handed on from the"
                " environment, other names by serving.engine (docker's own configuration)"
            )
        elif isinstance(value, dict | list):
            messages.append(f"serving.env.{name}: a text or a number is wanted")
    return messages


def _place(serving: ServingConfig) -> list[str]:
    """Whether this machine can listen there, and whether the compile cache is a local folder."""
    messages = []
    cache_folder = serving.compile_cache or ""
    if "://" in cache_folder:
        messages.append(
            f"serving.compile_cache={cache_folder}: give a folder on a local disk; on a bucket nothing was ever found"
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
            messages.append(f"serving.port={serving.port}: not allowed to listen there; give one from 1024 on")
        except (socket.gaierror, UnicodeError):
            messages.append(f"serving.host={serving.host}: not an address of this machine; give 127.0.0.1 or 0.0.0.0")
        except OSError as error:
            messages.append(
                f"serving.port={serving.port}: can't listen on {serving.host} ({error.strerror}); another server may be"
                f" there (docker ps --filter name=gemma4-serve-{serving.port}): stop it, or give another serving.port"
            )
    return messages


def _model(run: str, *, mounted: bool) -> tuple[Path | None, Architecture | None, list[str]]:
    """The folder to mount and its architecture, or what is wrong."""
    if not run:
        return None, None, ["run: which model? give run=<merged folder>, or run=<run folder> with merged in it"]
    if "://" in run:
        return None, None, [f"run={run}: copy it to a local disk first; the container mounts a local folder"]
    folder = Path(run)
    if not folder.is_dir():
        advice = f"; download it first: hf download {run} --local-dir <folder>" if run.count("/") == 1 else ""
        return None, None, [f"run={run}: no such folder{advice}"]
    if is_run(folder) and not (folder / MERGED).is_dir():
        reason = f"{NO_ADAPTERS} first" if (folder / ADAPTER).is_dir() else (
            f"a training without merged weights; merge it first: python -m gemma4_tpu.merge run={run}"
        )  # fmt: skip
        return None, None, [f"run={run}: {reason}"]
    model = folder / MERGED if is_run(folder) else folder
    present = sorted(entry.name for entry in model.iterdir())
    if "adapter_config.json" in present:
        return None, None, [f"run={run}: {NO_ADAPTERS}"]
    if "config.json" not in present or not {SINGLE_NAME, INDEX_NAME} & set(present):
        return None, None, [f"run={run}: {no_checkpoint(str(model), present)}"]
    try:
        architecture = from_hf_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    except (UserError, ValueError, AttributeError, TypeError) as error:
        return None, None, [f"run={run}: {error}"]
    return model, architecture, [f"run={run}: {told}" for told in _lacking(model, present, mounted=mounted)]


def _lacking(model: Path, present: list[str], *, mounted: bool) -> list[str]:
    """What the server would not find in the folder, be it `mounted` into a container."""
    messages = []
    if "tokenizer.json" not in present:
        messages.append("there is no tokenizer.json; copy the tokenizer's files there")
    inside = model.resolve()
    outside = [n for n in present if (model / n).is_symlink() and inside not in (model / n).resolve().parents]
    if outside and mounted:
        messages.append(
            f"{outside[0]} is a link to a place that the container doesn't see; copy the folder with cp -rL"
        )
    if mounted and "," in str(model.absolute()):
        messages.append("a folder with a comma in its path can't be mounted; move it")
    if INDEX_NAME in present:
        index = json.loads((model / INDEX_NAME).read_text(encoding="utf-8"))
        missing = sorted(set(index.get("weight_map", {}).values()) - set(present))
        if missing:
            messages.append(f"{INDEX_NAME} names {missing[0]}, which is not there ({len(missing)} missing)")
    return messages


def _split(serving: ServingConfig, arch: Architecture) -> tuple[list[str], list[str]]:
    """Heads against chips: (refusals, notes)."""
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
            f" devices; tensor_parallel_size may be {', '.join(map(str, fitting))}"
        )
    elif tp * dp < slice_.devices:
        notes.append(f"{slice_.devices - tp * dp} of the {slice_.devices} devices of {slice_.name} are left idle")
    if arch.num_heads % tp:
        refused.append(
            f"serving.tensor_parallel_size={tp}: does not divide the model's {arch.num_heads} query heads; it may be"
            f" {', '.join(map(str, fitting))}"
        )
    for kind, heads in (("sliding", arch.num_kv_heads), ("global", arch.num_global_kv_heads)):
        if heads % tp and tp % heads:
            refused.append(
                f"serving.tensor_parallel_size={tp}: {heads} KV heads of {kind} layers can be neither split over it"
                " nor repeated"
            )
        elif tp > heads:
            notes.append(f"{heads} KV heads of {kind} layers are repeated to {tp}: more cache for the same tokens")
    return refused, notes


def _length(serving: ServingConfig, model: Path) -> list[str]:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    longest = config.get("text_config", config).get("max_position_embeddings")
    if isinstance(longest, int) and serving.max_model_len > longest:
        return [f"serving.max_model_len={serving.max_model_len}: the model's longest sequence is {longest} tokens"]
    return []


def _on_tpu(serving: ServingConfig, model: Path) -> list[str]:
    """Checkpoints that vLLM's JAX implementation has no model for, or was seen to refuse."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if serving.env.get("MODEL_IMPL_TYPE") == "vllm":
        return []
    if config.get("model_type") in UNIFIED:
        return [
            f"config.json: model_type={config['model_type']} (12B) is none of the models of tpu-inference 0.32, vLLM's"
            " JAX implementation; serving.env.MODEL_IMPL_TYPE=vllm takes vLLM's PyTorch one (as serving=v6e4_12b does)"
        ]
    return [] if "text_config" in config else [
        "config.json is that of a text-only checkpoint (no text_config), which vLLM's JAX implementation of Gemma 4 was"
        " seen to refuse; merge onto the multimodal checkpoint that Google publishes if it does"
    ]  # fmt: skip
