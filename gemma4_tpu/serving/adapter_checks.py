"""Checks of adapters served on one base: complete, of the same base, of a kind that vLLM applies. Imports no JAX."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu.config.overrides import naturally
from gemma4_tpu.config.paths import no_folder
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.serving.model_checks import ADAPTER, platform_of
from gemma4_tpu.tracking.run import is_run

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that `--max-lora-rank` of vLLM 0.32 accepts."""
_WITH_TPUS = "serving.env.MODEL_IMPL_TYPE=vllm"
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "repeated layers",
    "lora_bias": "biases",
    "modules_to_save": "whole modules alongside the adapter",
}
"""Keys of PEFT's configuration that vLLM refuses where they hold something."""
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Of `init_lora_weights`: what begins as these is a plain adapter once it is saved. Others changed the base, too."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter, and the name by which clients request it."""

    name: str
    folder: Path
    """Holds `adapter_config.json` and `adapter_model.safetensors`."""
    rank: int
    """The largest rank in it."""


def lora_rank(adapters: Sequence[ServedAdapter]) -> int:
    """`--max-lora-rank` that covers all of them."""
    return min(rank for rank in LORA_RANKS if rank >= max(adapter.rank for adapter in adapters))


def of_sweeps(folders: Sequence[str]) -> tuple[list[str], list[str]]:
    """The folders, with a folder of runs (a sweep) replaced by those that have an adapter; notes on those without."""
    found, notes = [], []
    for given in folders:
        place = Path(given)
        runs = sorted(filter(is_run, place.iterdir()), key=_naturally) if place.is_dir() and not is_run(place) else []
        adapted = [str(run) for run in runs if (run / ADAPTER / CONFIG).is_file()]
        found += adapted or [given]
        if adapted and (lacking := [run.name for run in runs if str(run) not in adapted]):
            notes.append(f"adapters: {given}: {len(lacking)} of {len(runs)} runs have no adapter: {', '.join(lacking)}")
    return found, notes


def _naturally(place: Path) -> list[Any]:
    return naturally(place.name)


def find_adapters(
    folders: Sequence[str], run: str, serving: ServingConfig
) -> tuple[tuple[ServedAdapter, ...], str, list[str]]:
    """The adapters, the folder of their base (`run`, if given), and the problems found."""
    messages = [*_server_problems(serving)]
    found: list[tuple[Path, Path, dict[str, Any]]] = []  # the run, or else the adapter; the adapter; its configuration
    for given in of_sweeps(folders)[0]:
        folder, config, problem = _read(given)
        if folder is None or config is None:
            messages.append(problem)
        else:
            messages += [f"adapters: {given}: {why}" for why in _unserved(config)]
            if serving.runner == "docker" and "," in str(folder):
                messages.append(f"adapters: {given}: a folder with a comma in its path can't be mounted; move it")
            found.append((folder.parent if is_run(folder.parent) else folder, folder, config))
    if len({folder for _, folder, _ in found}) < len(found):
        messages.append("adapters: one of them is listed twice")
    if messages:
        return (), run, messages
    messages += _bases(found)
    names = _names([place for place, _, _ in found])
    adapters = tuple(
        ServedAdapter(name, folder, _rank(config)) for name, (_, folder, config) in zip(names, found, strict=True)
    )
    base = run or str(found[0][2].get("base_model_name_or_path") or "")
    if not messages and not Path(base).is_dir():
        messages.append(
            f"run: the adapters' base is {base or 'unknown'}, not a local folder; set run=<folder of the base>"
        )
    return adapters, base, messages


def _server_problems(serving: ServingConfig) -> Iterator[str]:
    """Problems of servers that do not apply adapters."""
    if serving.runner == "embedded":
        yield "adapters: serving=local serves merged weights only; serving=vllm_cpu applies adapters on this CPU"
    if serving.slice in SLICES and platform_of(serving) == "tpu":
        if serving.env.get("MODEL_IMPL_TYPE") != "vllm":
            yield (
                "adapters: tpu-inference 0.32, vLLM's JAX implementation, silently ignores adapters, so the"
                f" base would answer; {_WITH_TPUS} selects vLLM's PyTorch one, or serve merged weights"
            )
        if serving.data_parallel_size > 1:
            yield (
                f"serving.data_parallel_size={serving.data_parallel_size}: not supported with adapters on TPUs; set"
                " serving.data_parallel_size=1"
            )


def _read(given: str) -> tuple[Path | None, dict[str, Any] | None, str]:
    """The adapter's folder and configuration, or the problem."""
    place = Path(given).absolute()
    folder = place / ADAPTER if is_run(place) else place
    if not place.is_dir():
        return None, None, f"adapters: {given}: {no_folder(place)}"
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return None, None, (
            f"adapters: {given}: contains no adapter; python -m gemma4_tpu.merge run={given} export=peft writes one"
        )  # fmt: skip
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        return None, None, f"adapters: {given}: {CONFIG} is damaged: {error}"
    return folder, config, ""


def _unserved(config: dict[str, Any]) -> Iterator[str]:
    """Reasons why vLLM would refuse it or ignore parts of it (`peft_helper.py` and `lora_model.py` of 0.32)."""
    merged = "serve merged weights"
    if config.get("peft_type") != "LORA" or not _is_rank(config.get("r")):
        yield f"{CONFIG} does not describe LoRA (peft_type, r)"
        return
    for key, what in _REFUSED.items():
        if held := config.get(key):
            yield f"{what} ({key}={held}), which vLLM refuses; {merged}"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        yield (
            f"init_lora_weights={init}, which changed the base's weights too, so that vLLM refuses it; save it as a"
            " plain adapter (PEFT's path_initial_model_for_weight_conversion)"
        )
    if config.get("trainable_token_indices"):
        yield f"trained rows of tokens (trainable_token_indices), which vLLM silently ignores; {merged}"
    if config.get("target_parameters"):
        yield (
            "adapters of experts in PEFT's format (target_parameters); on GPUs vLLM accepts that of"
            f" export.peft_experts=per_expert, elsewhere {merged}"
        )
    if (bias := config.get("bias", "none")) != "none":
        yield f"biases (bias={bias}), which vLLM refuses; {merged}"
    if (rank := _rank(config)) > LORA_RANKS[-1]:
        yield f"rank {rank}: vLLM accepts ranks up to {LORA_RANKS[-1]}; {merged}"


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _rank(config: dict[str, Any]) -> int:
    return max([config["r"], *(rank for rank in (config.get("rank_pattern") or {}).values() if _is_rank(rank))])


def _bases(found: Sequence[tuple[Path, Path, dict[str, Any]]]) -> Iterator[str]:
    """Whether all adapters have one base, judged by its fingerprint if the runs are here, else by its folder."""
    bases = {str(place): _base(place, config) for place, _, config in found}
    for key in ("fingerprint", "folder"):
        told = {name: base[key] for name, base in bases.items()}
        if None in told.values():
            continue
        first, *others = told
        other = next((name for name in others if told[name] != told[first]), None)
        if other:
            yield (
                f"adapters: {other} was trained on another base ({bases[other]['folder']}) than {first}"
                f" ({bases[first]['folder']}); a server has one base"
            )
        return


def _base(place: Path, config: dict[str, Any]) -> dict[str, str | None]:
    """Identifies the base: its fingerprint, from the run's record, and its folder."""
    try:
        text = (place / "provenance.json").read_text(encoding="utf-8")
        fingerprint = yaml.safe_load(text)["fingerprints"]["base"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        fingerprint = None
    return {"fingerprint": fingerprint, "folder": config.get("base_model_name_or_path")}


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or enough parts to make the names distinct."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("folders that differ have different paths")
