"""int8 and fp8 exports: what is on disk against the merged model, and what refuses to be lost or overwritten."""

import json
import shutil

import numpy as np
import pytest

from gemma4_tpu.config.limits import CHOICES
from gemma4_tpu.export.checks import QUANTISED
from gemma4_tpu.export.job import KINDS
from gemma4_tpu.export.schemes import SCHEMES
from gemma4_tpu.models.expert_files import PARTS
from gemma4_tpu.models.tensorfile import Checkpoint
from tests.export.conftest import tree

HALF_STEP = {"int8": (0.0, 0.5), "fp8": (2**-4, 2**-10)}
"""Of a stored number, relative to it and at least: integers; three bits of mantissa, the smallest 2^-9."""


def tensors(folder):
    """Of all shards; matrices of four weights to an int32 as the int8 that they stand for."""
    checkpoint = Checkpoint(str(folder))
    found = {name: checkpoint.read(name) for name in checkpoint.names()}
    for name in [name for name in found if name.endswith("_packed")]:
        words, own = found.pop(name), name.removesuffix("_packed")
        rows, width = found.pop(f"{own}_shape")
        numbers = [(words >> (8 * place)) & 255 for place in range(4)]  # the lowest bits first, plus 128
        found[own] = (np.stack(numbers, -1).reshape(rows, -1)[:, :width] - 128).astype(np.int8)
    return found


def rows_of(merged, name):
    """The matrix of the merged model that a quantised one stands for: of experts, rows of their common tensor."""
    if ".experts." not in name:
        return merged[name]
    module, expert, part = name.removesuffix(".weight").rsplit(".", 2)
    own = next(own for own, parts in PARTS.items() if part in parts)
    matrices = np.split(merged[f"{module}.{own}"][int(expert)], len(PARTS[own]))
    return matrices[PARTS[own].index(part)]


def test_one_list_of_formats():
    assert tuple(KINDS) == CHOICES["export.format"]
    assert tuple(SCHEMES) == QUANTISED


@pytest.mark.parametrize(
    ("scheme", "kind", "options"),
    [
        ("int8", "moe", {"shards": 3, "prefix": "multimodal"}),
        ("fp8", "e2b", {"dtype": "bfloat16"}),
        ("int8_weight_only", "e2b", {"dtype": "bfloat16"}),
        ("fp8_weight_only", "dense", {}),
    ],
)
def test_each_product_is_the_merged_one_to_half_a_step(scheme, kind, options, run_of, merge):
    run, _ = run_of(kind, **options)
    merge(run, f"export={scheme}", "name=record", "verify=stream")  # log-probabilities: tests/serving/test_vllm.py
    merged, stored = tensors(run / "merged"), tensors(run / scheme)
    relative, least = HALF_STEP[scheme.removesuffix("_weight_only")]
    quantised = {name for name in stored if f"{name}_scale" in stored}
    assert len(quantised) >= 4 * 10
    for name in quantised:
        exact = rows_of(merged, name).astype(np.float32)
        scales = stored[f"{name}_scale"]
        assert scales.shape == (len(exact), 1) and scales.dtype == merged[next(iter(merged))].dtype
        scaled = exact / scales.astype(np.float32)
        off = np.abs(stored[name].astype(np.float32) - scaled)
        assert (off <= 1.001 * np.maximum(relative * np.abs(scaled), least)).all(), name
        assert stored[name].nbytes == stored[name].size == exact.size
    for name in merged.keys() & stored.keys() - quantised:  # the rest to the bit
        assert merged[name].tobytes() == stored[name].tobytes()
    left = merged.keys() - stored.keys()
    assert all(".experts." in name for name in left)
    config = json.loads((run / scheme / "config.json").read_text())
    told = config.pop("quantization_config")
    ignored = set(told["ignore"])
    assert (told["config_groups"]["group_0"]["input_activations"] is None) == scheme.endswith("_weight_only")
    assert config == json.loads((run / "merged/config.json").read_text())
    assert not {name.removesuffix(".weight") for name in quantised} & ignored
    products = {name for name, value in stored.items() if value.ndim > 1 and name.endswith(".weight")}
    assert {name.removesuffix(".weight") for name in products} - ignored == {
        name.removesuffix(".weight") for name in quantised
    }
    for file in Checkpoint(str(run / scheme)).files.values():
        assert all((info.start - file.data_start) % info.dtype.itemsize == 0 for info in file.tensors.values())
    (record,) = (run / "record").iterdir()
    found = json.loads((record / "quantised.json").read_text())
    assert found["passed"] and 0 < found["mean_error"] <= found["worst_error"] < 0.05


def test_it_starts_from_the_merged_model_that_is_there_and_replaces_nothing(run_of, merge, refused, tmp_path):
    run, _ = run_of("dense", shards=2)
    merge(run, "verify=stream")
    before = tree(run / "merged")
    merge(run, "export=int8", "verify=stream")
    first = tree(run / "int8")
    merge(run, "export=int8", "verify=stream")  # it is there already
    assert (tree(run / "merged"), tree(run / "int8")) == (before, first)
    # A shard that was finished before a kill is kept, the rest is written again.
    staging = run / ".int8.partial"
    shutil.copytree(run / "int8", staging)
    shutil.rmtree(run / "int8")
    journal = json.loads((staging / "gemma4_tpu.json").read_text())
    kept = min(name for name in journal["files"] if name.endswith(".safetensors"))
    journal["files"] = {kept: journal["files"][kept]}
    (staging / "gemma4_tpu.json").write_text(json.dumps(journal))
    stamp = (staging / kept).stat().st_mtime_ns
    merge(run, "export=int8", "verify=false")
    assert {**tree(run / "int8"), "gemma4_tpu.json": b""} == {**first, "gemma4_tpu.json": b""}
    assert (run / "int8" / kept).stat().st_mtime_ns == stamp
    (run / "int8/tokenizer_config.json").write_text("{}")
    assert "exists; give overwrite=true" in refused(f"run={run}", "export=int8", "verify=false")
    assert "contains no prompt" in refused(f"run={run}", "export=fp8", f"export.prompts={_empty(tmp_path)}")
    assert "add export=int8 or fp8" in refused(f"run={run}", "export.prompts=x")
    assert not (run / "fp8").exists()


def _empty(folder):
    path = folder / "prompts.txt"
    path.write_text("\n")
    return path
