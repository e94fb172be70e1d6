"""Checks the contents of an adapter's file before a server is started with it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma4_tpu.errors import UserError
from gemma4_tpu.models.tensorfile import TensorFile
from gemma4_tpu.serving.adapter_checks import WEIGHTS, ServedAdapter

SERVED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Modules of the text model to which vLLM applies adapters."""
_NAME = re.compile(r"(?P<module>.*layers\.\d+\..*)\.lora_[AB]\.weight")


def check_weights(adapters: Sequence[ServedAdapter], platform: str) -> None:
    """Raises `UserError` if a file is damaged, or contains something that vLLM would refuse or ignore."""
    problems = [f"adapters: {adapter.folder}: {why}" for adapter in adapters for why in _unserved(adapter, platform)]
    if problems:
        raise UserError("\n".join(problems))


def _unserved(adapter: ServedAdapter, platform: str) -> list[str]:
    names = TensorFile(str(adapter.folder / WEIGHTS)).tensors
    if not names:
        return [f"{WEIGHTS} is empty"]
    found = {name: _NAME.fullmatch(name) for name in names}
    modules = {name: match["module"] for name, match in found.items() if match}
    other = next((n for n in names if n not in modules or modules[n].rsplit(".", 1)[-1] not in SERVED), None)
    if other:
        return [f"vLLM does not apply adapters to {other} (only to {', '.join(SERVED)}); serve merged weights"]
    if platform != "gpu" and any(".experts." in module for module in modules.values()):
        return ["adapters of experts, which vLLM applies on GPUs only; serve merged weights"]
    return []
