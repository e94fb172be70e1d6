"""Merging side by side: ours, a whole dictionary in memory, PEFT's `merge_and_unload`, and `cp` of the same files.

    python -m benchmarks.merge [--settings lora slow full] [--ways cp ours …]

Makes a random bfloat16 checkpoint in 31B's layout with fewer layers and a run on it, gives each way a process of its
own, and removes everything again. The base's pages are dropped before each way, and each ends with `sync`, so that all
of them read from disk and write to it. Seconds are those of the whole process, imports included. `slow` limits how fast
this process group may read the disk (cgroup v1, as root). Run it from the root of a checkout, with 30 GB free on disk
and 20 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.merge_files import make, register
from benchmarks.pages import measured
from gemma4_tpu.markdown import table


@dataclass(frozen=True)
class MergeRow:
    """One way of merging, once."""

    way: str
    seconds: float
    cpu_seconds: float
    """Of the process, in user and kernel."""
    peak_rss_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Setting:
    """What is merged under which conditions."""

    about: str
    layers: int
    rank: int | None
    """Of the LoRA; None: every weight was trained."""
    ways: tuple[str, ...]
    """In the order in which they run; `cp` before and after, as the machine may be shared."""
    read_mb_per_second: int | None = None


WAYS = {
    "cp": "`cp`",
    "ours": "ours, `verify=false`",
    "ours_verified": "ours, `verify=stream`",
    "memory": "whole dictionary, one file",
    "peft": "PEFT `merge_and_unload`",
}
_ROUND = ("cp", "ours", "ours_verified")
SETTINGS = {
    "lora": Setting("LoRA of rank 64 on every linear weight", 4, 64, (*_ROUND * 2, "cp", "memory", "peft")),
    "slow": Setting("the same, reading limited to 200 MB/s", 4, 64, (*_ROUND, "cp"), read_mb_per_second=200),
    "full": Setting("every weight trained (`lora=none`), saved in float32", 1, None, (*_ROUND, "cp")),
}
CGROUP = Path("/sys/fs/cgroup/blkio/benchmark_merge")


# ── the ways ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def ours(work: Path, verify: str) -> None:
    """`python -m gemma4_tpu.merge`."""
    register(work / "base")
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

    model = Gemma4ForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16, trust_remote_code=False)
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


def measure(way: str, work: Path, read_mb_per_second: int | None) -> MergeRow:
    """Seconds and peak memory of one way, from cold files to synced ones."""
    for path in (path for path in work.rglob("*") if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    shutil.rmtree(work / "out", ignore_errors=True)
    os.sync()
    command = ["cp", "-r", str(work / "base"), str(work / "out")]
    if way != "cp":
        command = [sys.executable, "-m", "benchmarks.merge", "--way", way, "--work", str(work)]
    enter = _limit(work, read_mb_per_second) if read_mb_per_second else None
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=enter)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{way}: exit status {status}")
    written = sum(path.stat().st_size for path in (work / "out").iterdir())
    shutil.rmtree(work / "out")
    return MergeRow(way, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, written)


def _limit(work: Path, mb_per_second: int) -> Callable[[], None]:
    """Makes a process group that reads the disk of `work` no faster; what a child calls to enter it."""
    CGROUP.mkdir(exist_ok=True)
    device = os.stat(work).st_dev
    rule = f"{os.major(device)}:{os.minor(device)} {mb_per_second * 1_000_000}"
    (CGROUP / "blkio.throttle.read_bps_device").write_text(rule)

    def enter() -> None:
        (CGROUP / "tasks").write_text(str(os.getpid()))

    return enter


def section(setting: Setting, rows: list[MergeRow], loads: list[float], base_bytes: int) -> list[str]:
    """One setting in Markdown: medians, and how far `cp` itself varied."""
    median = {way: statistics.median(r.seconds for r in rows if r.way == way) for way in setting.ways}
    lines = [
        f"## {setting.about[0].upper()}{setting.about[1:]}",
        "",
        f"{setting.layers} layers, {base_bytes / 1e9:.1f} GB; machine load {min(loads):.0f}–{max(loads):.0f}.",
        "",
    ]
    heads = ["way", "runs", "seconds: median (range)", "of `cp`", "CPU seconds", "peak RSS GiB", "written GB"]
    cells = []
    for way in dict.fromkeys(setting.ways):
        own = [row for row in rows if row.way == way]
        seconds = [row.seconds for row in own]
        cells.append([
            WAYS[way], len(own), f"{median[way]:.1f} ({min(seconds):.1f}–{max(seconds):.1f})",
            f"{median[way] / median['cp']:.2f}×", f"{statistics.median(r.cpu_seconds for r in own):.1f}",
            f"{max(r.peak_rss_bytes for r in own) / 2**30:.2f}", f"{own[0].written_bytes / 1e9:.2f}",
        ])  # fmt: skip
    return [*lines, *table(heads, cells, "lrrrrrr")]


def run_setting(setting: Setting, work: Path) -> list[str]:
    """Makes the files, runs every way, removes the files."""
    shutil.rmtree(work, ignore_errors=True)
    try:
        made = ["--make", str(setting.layers), str(setting.rank or 0), "--work", str(work)]
        subprocess.run([sys.executable, "-m", "benchmarks.merge", *made], check=True, stdout=sys.stderr)
        base_bytes = sum(path.stat().st_size for path in (work / "base").iterdir())
        rows, loads = [], []
        for way in setting.ways:
            loads.append(os.getloadavg()[0])
            rows.append(measure(way, work, setting.read_mb_per_second))
            print(f"load {loads[-1]:.1f}", rows[-1], file=sys.stderr, flush=True)
        return section(setting, rows, loads, base_bytes)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if setting.read_mb_per_second:
            CGROUP.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--work", type=Path, default=Path("outputs/bench_merge"))
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    if arguments.make:
        return make(work, arguments.make[0], arguments.make[1] or None)
    if arguments.way:
        return run_way(arguments.way, work)
    lines = [measured("safetensors", "transformers", "peft"), ""]
    for name in arguments.settings:
        setting = SETTINGS[name]
        lines += run_setting(replace(setting, ways=tuple(w for w in setting.ways if w in arguments.ways)), work)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
