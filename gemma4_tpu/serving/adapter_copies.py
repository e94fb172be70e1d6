"""Works around a bug of vLLM 0.32: where V equals K, it applies an adapter of `k_proj` to K alone.

The global layers of 12B, 26B-A4B and 31B compute V with K's projection. vLLM loads K's weight into both places, and
each place takes its own adapter, so V would be left unadapted. Copies of such adapters repeat K's factors under
`v_proj`, which vLLM then applies. tests/serving/test_vllm.py notices when this is no longer needed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes  # noqa: F401 (NumPy's bfloat16)
from safetensors.numpy import load_file, save_file

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.checkpoint_folder import PROBE_NAME
from gemma4_tpu.models.tensorfile import TensorFile
from gemma4_tpu.serving.adapter_checks import CONFIG, WEIGHTS, ServedAdapter

_K = re.compile(r"(?P<before>.*\blayers\.(?P<layer>\d+)\.self_attn\.)k_proj(?P<after>\..*)")


def copied(adapters: Sequence[ServedAdapter], arch: Architecture, place: Path) -> tuple[ServedAdapter, ...]:
    """The adapters as vLLM needs them: those that lack V are copied into folders below `place`."""
    found = []
    for number, adapter in enumerate(adapters):
        if lacking := lacking_v(adapter, arch):
            folder = place / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(adapter.folder / CONFIG, folder)
            tensors = load_file(adapter.folder / WEIGHTS)
            save_file(
                tensors | {v: tensors[k] for k, v in lacking.items()}, folder / WEIGHTS, metadata={"format": "pt"}
            )
            if (adapter.folder / PROBE_NAME).is_file():
                shutil.copy(adapter.folder / PROBE_NAME, folder)
            adapter = replace(adapter, folder=folder)
        found.append(adapter)
    return tuple(found)


def lacking_v(adapter: ServedAdapter, arch: Architecture) -> dict[str, str]:
    """K's adapter tensors without a counterpart for V: K's name → V's. Empty: the adapter is served unchanged."""
    present = set(TensorFile(str(adapter.folder / WEIGHTS)).tensors)
    matches = {name: found for name in present if arch.k_eq_v and (found := _K.fullmatch(name))}
    twins = {
        name: f"{found['before']}v_proj{found['after']}"
        for name, found in matches.items()
        if arch.is_global(int(found["layer"]))
    }
    return {k: v for k, v in twins.items() if v not in present}
