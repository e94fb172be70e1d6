"""The embedded server (`serving=local`) beside vLLM's CPU build (`serving=vllm_cpu`), both started by `serve`.

    make vllm
    python -m benchmarks.servers [--users 1 8 64] [--times 3] [--vllm .venv-vllm/bin/vllm]

A random checkpoint in Gemma 4's layout with heads that vLLM's attention on CPUs takes (12 M parameters, float32). Our
own client sends prompts of 128 tokens and asks for 64, greedy, each user one request after the other. The servers run
in turns, each alone on the machine; medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.merge_files import make_base
from benchmarks.pages import measured
from benchmarks.serving_load import served
from gemma4_tpu import assets
from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.markdown import table

OURS, PEER = "serving=local", "serving=vllm_cpu"
INPUT, OUTPUT, PER_USER = 128, 64, 4
WARMUP = 8
KEYS = ("output_throughput", "median_ttft_ms", "median_tpot_ms")
Figures = dict[tuple[str, int], list[tuple[float, ...]]]
"""(server, users) → the `KEYS` of each turn."""


def checkpoint(folder: Path) -> Path:
    """Writes the checkpoint; returns its folder."""
    made, tiny = folder / "base", Path(assets.ROOT, "tiny")
    make_base(made, replace(ARCHITECTURES["tiny"], embed_dim=512, hidden_dim=2048, head_dim=64, global_head_dim=128))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(tiny / name, made)
    return made


def load(record: Path, place: Path, users: int) -> tuple[float, ...]:
    """One load on the server of `record`."""
    subprocess.run(
        [
            sys.executable, "-m", "gemma4_tpu.bench", f"served={record}", f"run_dir={place}", f"bench.users=[{users}]",
            "bench.rates=[]", f"bench.lengths=[[{INPUT},{OUTPUT}]]", f"bench.requests={PER_USER}",
            f"bench.warmup_requests={WARMUP}",
        ],
        check=True, stdout=sys.stderr,
    )  # fmt: skip
    (cell,) = (json.loads(path.read_text()) for path in place.glob("cells/*.json"))
    if cell["state"] != "ok":
        sys.exit(f"{place}: {cell}")
    return tuple(cell[key] for key in KEYS)


def rows_of(found: Figures) -> Iterator[str]:
    """The lines of the table."""
    rows = []
    for (server, users), turns in found.items():
        rate, ttft, tpot = (statistics.median(turn[i] for turn in turns) for i in range(len(KEYS)))
        ratio = statistics.median(own[0] / peer[0] for own, peer in zip(turns, found[PEER, users], strict=True))
        rows.append([f"`{server}`", users, f"{rate:,.0f}", f"{ratio:.2f}×", f"{ttft:,.1f}", f"{tpot:,.1f}"])
    heads = ["server", "users", "output tokens/s", "ratio", "TTFT p50, ms", "TPOT p50, ms"]
    return table(heads, sorted(rows, key=lambda row: row[1]), "lrrrrr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    asked = parser.parse_args()
    if shutil.which(asked.vllm) is None:
        sys.exit(f"--vllm {asked.vllm}: there is no such program; `make vllm` installs it")
    packages = measured("torch", "transformers")
    version = subprocess.run([asked.vllm, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    found: Figures = defaultdict(list)
    with tempfile.TemporaryDirectory() as work:
        model = checkpoint(Path(work))
        for turn in range(asked.times):
            for server, more in ((PEER, [f"serving.executable={asked.vllm}"]), (OURS, [])):
                record = Path(work, f"{server.partition('=')[2]}_{turn}")
                with served(model, record, [server, "serving.max_model_len=512", *more]):
                    for users in asked.users:
                        place = Path(f"{record}_{users}")
                        found[server, users].append(load(record, place, users))
    told = f"{INPUT} tokens in, {OUTPUT} out, {PER_USER} requests per user; medians of {asked.times} turns."
    print("\n".join([f"{packages} vLLM {version}. {told}", "", *rows_of(found)]))


if __name__ == "__main__":
    main()
