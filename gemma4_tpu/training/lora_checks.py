"""Problems with the requested adapters. Imports no JAX."""

from __future__ import annotations

from dataclasses import asdict

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.adapted import adapted, takes_part
from gemma4_tpu.models.weights import MODULES, ROLES

EXPERTS = "experts"
LORA_TARGETS = (*ROLES, *MODULES)


def lora_problems(lora: LoraConfig) -> list[str]:
    """Contradictions within `lora`, whatever the model."""
    messages = []
    if not lora.enabled:
        if lora.start is not None:
            messages.append(
                f"lora.start={lora.start}: adapters, but lora.enabled=false trains every weight; merge them and give"
                " model.path=<merged folder>"
            )
        if lora.modules_to_train:
            messages.append(
                f"lora.modules_to_train=[{','.join(lora.modules_to_train)}]: lora.enabled=false trains every weight"
                " already; give lora.enabled=true, or lora.modules_to_train=[]"
            )
        if lora.quantize:
            messages.append(
                f"lora.quantize={lora.quantize}: quantised weights can't be trained; give lora.enabled=true (QLoRA) "
                "or lora.quantize=null"
            )
        return messages
    known = ", ".join(LORA_TARGETS)
    if not lora.targets:
        messages.append(
            f"lora.targets=[]: nothing would be trained; give some of {known}, or lora=none for full fine-tuning"
        )
    unknown = [
        f"lora.targets: {target!r} is no target{_in_our_words(target)} (targets: {known})"
        for target in lora.targets
        if target not in LORA_TARGETS
    ]
    if lora.expert_rank is not None and EXPERTS not in lora.targets:
        given = ",".join([*lora.targets, EXPERTS])
        messages.append(
            f"lora.expert_rank={lora.expert_rank}: experts get no adapters; give lora.targets=[{given}] or"
            " lora.expert_rank=null"
        )
    if lora.dropout and lora.targets == [EXPERTS]:
        messages.append(
            f"lora.dropout={lora.dropout}: adapters of experts have none, nor do PEFT's; give lora.dropout=0, or adapt"
            " attention or mlp, too"
        )
    twice = [target for target in dict.fromkeys(lora.targets) if lora.targets.count(target) > 1]
    within = [target for target in lora.targets if MODULES.get(target) in lora.targets]
    messages += unknown + [f"lora.targets: {target!r} is given twice" for target in twice]
    messages += [f"lora.targets: {target!r} is part of {MODULES[target]!r}; give one of them" for target in within]
    low = [f"lora.ranks.{pattern}={rank}: must be at least 1" for pattern, rank in lora.ranks.items() if rank < 1]
    return messages + _kind_problems(lora) + low


def without_effect(lora: LoraConfig) -> list[str]:
    """Warnings about values that nothing will use; an experiment can have set them, so they are not refused."""
    if lora.enabled:
        return (
            [f"lora.start_checkpoint={lora.start_checkpoint} has no effect: lora.start names no run"]
            if lora.start is None and lora.start_checkpoint != LoraConfig.start_checkpoint
            else []
        )
    default = asdict(LoraConfig(enabled=False))
    changed = [f"lora.{key}={value}" for key, value in asdict(lora).items() if value != default[key]]
    if not changed:
        return []
    return [f"lora.enabled=false trains every weight, without adapters: no effect of {', '.join(changed)}"]


def _in_our_words(target: str) -> str:
    """A hint at what is meant; PEFT's names are those of the checkpoint's matrices."""
    if target.replace("_", "-") == "all-linear":
        return "; here it is attention and mlp"
    role = target.removesuffix("_proj")
    return f"; here it is {role}" if role in LORA_TARGETS else did_you_mean(target, LORA_TARGETS)


def _kind_problems(lora: LoraConfig) -> list[str]:
    """What DoRA, and initialisations other than LoRA's, are incompatible with."""
    messages = []
    if lora.dora and lora.dropout:
        messages.append(
            f"lora.dropout={lora.dropout}: lora.dora=true scales the base's product too, dropout would need a second"
            " one; give lora.dropout=0"
        )
    if lora.dora and EXPERTS in lora.targets:
        messages.append(
            "lora.dora=true: not for lora.targets=[…,experts], nor in PEFT; leave experts out, or give lora.dora=false"
        )
    if takes_part(lora) and EXPERTS in lora.targets:
        messages.append(
            f"lora.init={lora.init}: not for lora.targets=[…,experts]; leave experts out, or give lora.init=default"
        )
    if takes_part(lora) and lora.start is not None:
        messages.append(
            f"lora.init={lora.init}: sets what fresh adapters begin as, but lora.start={lora.start} gives trained ones;"
            " give lora.init=default, or merge them and give model.path=<merged folder>"
        )
    return messages


def adapted_problems(lora: LoraConfig, architecture: Architecture) -> list[str]:
    """Layers and ranks that this model lacks."""
    try:
        adapted(architecture, lora)
    except UserError as problem:
        return [str(problem)]
    return []
