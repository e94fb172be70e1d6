"""Problems with `rollouts=` for an on-policy objective, by itself and with the rest of a training run. Imports
no JAX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.paths import local_place
from gemma4_tpu.config.rollouts import JUDGE, RolloutsConfig, is_address
from gemma4_tpu.config.schema import DataConfig, LoraConfig, ObjectiveConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.models.kv_cache import weight_bytes
from gemma4_tpu.step.objective_kinds import KINDS
from gemma4_tpu.tracking.records import ROLLOUTS, config_of
from gemma4_tpu.training.meshes import whole_rows_problems


def is_on_policy(objective: ObjectiveConfig) -> bool:
    """Whether the run's batches are its own answers."""
    kind = KINDS.get(objective.kind)
    return kind is not None and kind.on_policy


def reward_of(objective: ObjectiveConfig, config: RolloutsConfig) -> str | None:
    """`rollouts.reward`; if null, the judge for objectives that learn from rewards."""
    kind = KINDS.get(objective.kind)
    return JUDGE if config.reward is None and kind is not None and kind.rewarded else config.reward


def rollouts_problems(
    objective: ObjectiveConfig, config: RolloutsConfig, data: DataConfig, lora: LoraConfig
) -> list[str]:
    """Contradictory values; none without roll-outs."""
    if not is_on_policy(objective):
        return []
    messages = _lengths(config, data) + _reward(config) + _sampled_as_trained(lora, data)
    if data.image_cache is not None:
        messages.append(
            f"data.image_cache={data.image_cache}: objective={objective.kind} samples answers to text-only prompts;"
            " leave it out, or give objective=sft or one on pairs"
        )
    if objective.kind == "grpo" and config.samples < 2:
        messages.append(f"rollouts.samples={config.samples}: must be at least 2, so that answers can be compared")
    if config.validation_prompts and config.reward is None:
        messages.append(
            f"rollouts.validation_prompts={config.validation_prompts}: objective={objective.kind} has no reward to"
            " validate; give a rollouts.reward, or held-out rows, on which its divergence is measured"
        )
    messages += _recorded(config)
    if config.overlong_tokens > config.new_tokens:
        messages.append(
            f"rollouts.overlong_tokens={config.overlong_tokens}: more than the {config.new_tokens} tokens of the"
            " longest answer (rollouts.new_tokens)"
        )
    return messages


def _lengths(config: RolloutsConfig, data: DataConfig) -> list[str]:
    longest = config.prompt_tokens + config.new_tokens - 1
    if longest <= data.sequence_length:
        return []
    return [
        f"data.sequence_length={data.sequence_length}: too short for a prompt and its answer,"
        f" rollouts.prompt_tokens={config.prompt_tokens} + rollouts.new_tokens={config.new_tokens}; give"
        f" at least {longest}"
    ]


def _sampled_as_trained(lora: LoraConfig, data: DataConfig) -> list[str]:
    """Settings under which trainer and sampler would disagree on likelihoods, or need several programs."""
    messages = []
    if lora.enabled and lora.dropout:
        messages.append(f"lora.dropout={lora.dropout}: the policy is sampled without dropout, so set 0")
    if data.packing != "true":
        messages.append(f"data.packing={data.packing}: roll-outs need packed rows of one length; set true")
    return messages


def _recorded(config: RolloutsConfig) -> list[str]:
    """Whether there are roll-outs to take over, and whether they are what this run would draw and judge."""
    if config.recorded is None:
        return []
    given, folder = f"rollouts.recorded={config.recorded}", Path(config.recorded)
    if not (folder / ROLLOUTS).is_dir():
        return [
            f"{given}: no folder with {ROLLOUTS}/, so no run with roll-outs; give the folder of one on this machine"
        ]
    known, own = config_of(folder).get("rollouts") or {}, vars(config)
    compared = ["new_tokens"]
    if config.reward is not None and known.get("reward") is not None:
        compared += ["reward", *(["benchmark"] if config.reward == JUDGE else [])]
    others = [f"rollouts.{key}={known[key]}" for key in compared if known.get(key, own[key]) != own[key]]
    if not others:
        return []
    here = ", ".join(f"{key}={own[key]}" for key in compared)
    return [
        f"{given}: its run had {' '.join(others)}, this one has {here}, so its answers or verdicts are not this run's;"
        f" give {' '.join(others)}, or leave rollouts.recorded out"
    ]


def undivided(config: RolloutsConfig, mesh: MeshSizes) -> list[str]:
    """Warnings about rows that every copy of the weights decodes or reads, because they do not divide among them."""
    places = mesh.row_places
    return [
        f"rollouts.{key}={number}: does not divide over mesh.dp={places}, so every copy of the weights {does} all of"
        f" them; give a multiple of {places}"
        for key, number, does in (("slots", config.slots, "decodes"), ("prompts", config.prompts, "reads"))
        if number % places
    ]


def unused(objective: ObjectiveConfig, config: RolloutsConfig) -> list[str]:
    """Warnings about values that nothing will use; an experiment can have set them, so they are not refused."""
    changed = {key: value for key, value in vars(config).items() if value != getattr(RolloutsConfig, key)}
    if not is_on_policy(objective):
        kinds = ", ".join(name for name, kind in KINDS.items() if kind.on_policy)
        return _told(changed, f"objective={objective.kind} draws no answers ({kinds} do)")
    reward = f"rollouts.reward={'null' if config.reward is None else config.reward}"
    idle = {
        f"objective={objective.kind} has no advantages": [
            "advantages", "overlong_tokens", "overlong_penalty"
        ] if objective.kind != "grpo" else [],
        f"objective={objective.kind} learns from all answers": [
            "mask_truncated", "resample"
        ] if KINDS[objective.kind].taught else [],
        f"{reward} has no problems or form of its own": [
            "benchmark", "problems_path", "max_malformed"
        ] if config.reward != JUDGE else [],
        f"{reward} is no server": ["reward_timeout_seconds"] if not is_address(config.reward or "") else [],
        "rollouts.overlong_tokens=0": ["overlong_penalty"] if not config.overlong_tokens else [],
        "rollouts.validation_prompts=0": ["validation_every"] if not config.validation_prompts else [],
    }  # fmt: skip
    messages = []
    for why, keys in idle.items():
        messages += _told({key: changed.pop(key) for key in keys if key in changed}, why)
    return messages


def _told(values: dict[str, Any], why: str) -> list[str]:
    given = ", ".join(f"rollouts.{key}={'null' if value is None else value}" for key, value in values.items())
    return [f"no effect of {given}: {why}"] if given else []


def _reward(config: RolloutsConfig) -> list[str]:
    name = config.reward
    if name is None or is_address(name):
        return []
    if name != JUDGE:
        module, _, function = name.partition(":")
        if all(part.isidentifier() for part in [*module.split("."), function]):
            return []
        return [f"rollouts.reward={name}: give judge, module:function, or a URL (http://…)"]
    if not config.problems_path:
        return [
            f"rollouts.problems_path: rollouts.reward={JUDGE} needs problems of"
            f" rollouts.benchmark={config.benchmark} to train on; give their file or folder (not the one that you"
            " evaluate with), or another reward, for the prompts of your rows: rollouts.reward=module:function or a URL"
        ]
    place, messages = local_place(f"rollouts.problems_path={config.problems_path}", config.problems_path)
    if not messages and (place is None or not Path(place).exists()):
        messages = [f"rollouts.problems_path={config.problems_path}: no such file or folder on this machine"]
    return messages


def check_decoding_mesh(mesh: MeshSizes, arch: Architecture, value_bytes: int = 2) -> None:
    """Refuses (`UserError`) a mesh that splits rows, or on which every token would gather the weights over `fsdp`."""
    if problems := whole_rows_problems(mesh.cp, "on-policy objectives decode answers"):
        raise UserError(problems[0])
    if mesh.fsdp == 1:
        return
    gathered = weight_bytes(arch, value_bytes) / mesh.tp * (mesh.fsdp - 1) / mesh.fsdp
    legal = [tp for tp in arch.legal_tp(mesh.fsdp * mesh.tp) if tp > mesh.tp]
    better = f"mesh.fsdp=1 mesh.tp={max(legal)}" if legal else f"mesh.fsdp=1 mesh.dp={mesh.dp * mesh.fsdp}"
    raise UserError(
        f"mesh.fsdp={mesh.fsdp}: answers are decoded a token at a time, and each would gather"
        f" {gathered / 2**30:.3g} GiB of weights onto every chip; give a mesh that keeps whole weights or splits them"
        f" over tp: {better}"
    )
