"""Merging side by side: ours, a whole dictionary in memory, PEFT's `merge_and_unload`, and `cp` of the same files.

    python -m benchmarks.merge [--layers 4] [--rank 64] [--work outputs/bench_merge] [--out benchmarks/merge.md]

Makes a random bfloat16 checkpoint in 31B's layout with fewer layers (4: 6.7 GB) and a run on it, gives each way a
process of its own, and removes everything again. The base's pages are dropped before each way, and each ends with
`sync`, so that all of them read from disk and write to it. Seconds are those of the whole process, imports included.
Run it from the root of a checkout, with twice the checkpoint's size free on disk and 20 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

NAME = "bench_31b"
SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Row:
    """One way of merging."""

    what: str
    seconds: float
    peak_rss_bytes: int
    written_bytes: int


WAYS = {
    "cp": "`cp`",
    "ours": "ours, `verify=false`",
    "ours_verified": "ours, `verify=stream`",
    "memory": "whole dictionary, one file",
    "peft": "PEFT `merge_and_unload`",
}


# ── what is merged ────────────────────────────────────────────────────────────────────────────────────────────────────


def make_base(folder: Path, layers: int) -> None:
    """31B's layout with fewer layers; random values, in shards as transformers writes them."""
    import ml_dtypes
    import numpy as np

    from gemma4_tpu.architectures import to_hf_config
    from gemma4_tpu.models.names import name_map

    arch = _architecture(layers)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(arch)))
    noise = np.random.default_rng(0).standard_normal(8 << 20).astype(np.float32) * 0.02
    noise = noise.astype(ml_dtypes.bfloat16).view(np.uint16)
    shapes = {f"model.{name}": t.hf_shape for t in name_map(arch).values() for name in t.hf_names}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held_bytes = 0
    for name, shape in sorted(shapes.items()):
        size_bytes = 2 * int(np.prod(shape))
        if held_bytes and held_bytes + size_bytes > SHARD_BYTES:
            shards.append({})
            held_bytes = 0
        shards[-1][name] = shape
        held_bytes += size_bytes
    index = {}
    for number, own in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, own, noise)
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], noise) -> None:
    """Written by hand, as safetensors would hold the whole shard in memory."""
    import numpy as np

    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        stop = at + 2 * int(np.prod(shape))
        header[name], at = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, stop]}, stop
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                left -= file.write(noise[: min(left, len(noise))].data) // 2


def _architecture(layers: int):
    from dataclasses import replace

    from gemma4_tpu.architectures import ARCHITECTURES

    big = ARCHITECTURES["gemma4_31b"]
    return replace(big, name=NAME, num_layers=layers, layer_types=("sliding",) * (layers - 1) + ("global",))


def make(work: Path, layers: int, rank: int) -> None:
    """Base, run and PEFT adapter."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from gemma4_tpu.config.schema import LoraConfig
    from tests.export.runs import make_run

    make_base(work / "base", layers)
    _register(work)
    make_run(work / "run", work / "base", lora=LoraConfig(rank=rank, alpha=rank), name=NAME, size=0.01)
    from gemma4_tpu.merge import main

    assert main([f"run={work}/run", "export=peft"]) == 0


def _register(work: Path) -> None:
    from gemma4_tpu.architectures import ARCHITECTURES, from_hf_config

    ARCHITECTURES[NAME] = from_hf_config(json.loads((work / "base" / "config.json").read_text()), name=NAME)


# ── the ways ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def ours(work: Path, verify: str) -> None:
    """`python -m gemma4_tpu.merge`."""
    _register(work)
    from gemma4_tpu.merge import main

    assert main([f"run={work}/run", f"target={work}/out", f"verify={verify}"]) == 0


def in_memory(work: Path) -> None:
    """Every shard into one dictionary, deltas added there, one file written."""
    import torch
    from safetensors.torch import load_file, save_file

    weights: dict[str, torch.Tensor] = {}
    for shard in sorted((work / "base").glob("*.safetensors")):
        weights |= load_file(shard)
    adapter = load_file(work / "run" / "adapter" / "adapter_model.safetensors")
    config = json.loads((work / "run" / "adapter" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    for key in [k for k in adapter if k.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        delta = scale * (adapter[key.replace("lora_A", "lora_B")] @ adapter[key])
        weights[name] = (weights[name].float() + delta).to(weights[name].dtype)
    (work / "out").mkdir()
    save_file(weights, work / "out" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(work / "base" / "config.json", work / "out")


def peft(work: Path) -> None:
    """Load with transformers, merge with PEFT, save."""
    import torch
    from peft import PeftModel
    from transformers import Gemma4ForCausalLM

    model = Gemma4ForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, work / "run" / "adapter").merge_and_unload().save_pretrained(work / "out")


def run_way(way: str, work: Path) -> None:
    """One way, in this process."""
    if way == "ours":
        ours(work, "false")
    elif way == "ours_verified":
        ours(work, "stream")
    elif way == "memory":
        in_memory(work)
    else:
        peft(work)


# ── side by side ──────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(way: str, work: Path) -> Row:
    """Seconds and peak memory of one way, from cold files to synced ones."""
    for path in (work / "base").iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    shutil.rmtree(work / "out", ignore_errors=True)
    os.sync()
    command = ["cp", "-r", str(work / "base"), str(work / "out")]
    if way != "cp":
        command = [sys.executable, "-m", "benchmarks.merge", "--way", way, "--work", str(work)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{way}: exit status {status}")
    written = sum(path.stat().st_size for path in (work / "out").iterdir())
    shutil.rmtree(work / "out")
    return Row(WAYS[way], seconds, usage.ru_maxrss * 1024, written)


def table(rows: list[Row], base_bytes: int, command: str) -> str:
    """The Markdown file."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    copied = next(row.seconds for row in rows if row.what == WAYS["cp"])
    lines = [
        "# Merging a LoRA into a checkpoint",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GB of memory,"
        f" shared with other work (load {os.getloadavg()[1]:.1f}). Base: 31B's layout with fewer layers, bfloat16,"
        f" {base_bytes / 1e9:.1f} GB. *Measured* by",
        "",
        f"    {command}",
        "",
        "| way | seconds | of `cp` | peak RSS GiB | written GB |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.what} | {row.seconds:.1f} | {row.seconds / copied:.2f}× | {row.peak_rss_bytes / 2**30:.2f} |"
        f" {row.written_bytes / 1e9:.2f} |"
        for row in rows
    ]
    note = "Seconds from cold files to `sync`, process start and imports included; each way in its own process."
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("outputs/bench_merge"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/merge.md"))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    if arguments.make:
        return make(work, arguments.layers, arguments.rank)
    if arguments.way:
        return run_way(arguments.way, work)
    shutil.rmtree(work, ignore_errors=True)
    try:
        sizes = ["--layers", str(arguments.layers), "--rank", str(arguments.rank), "--work", str(work)]
        subprocess.run([sys.executable, "-m", "benchmarks.merge", "--make", *sizes], check=True)
        base_bytes = sum(path.stat().st_size for path in (work / "base").iterdir())
        rows = []
        for way in arguments.ways:
            rows.append(measure(way, work))
            print(rows[-1], flush=True)
        command = f"python -m benchmarks.merge --layers {arguments.layers} --rank {arguments.rank}"
        arguments.out.write_text(table(rows, base_bytes, command))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
