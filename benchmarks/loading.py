"""Loading base weights onto devices: seconds beside plain reading of the same bytes, and the host's peak memory.

    python -m benchmarks.loading [--layers 6] [--times 3]

A random checkpoint in 31B's layout (six layers: 6.8 GB), on a CPU device, which holds what it loads; what the loader
itself takes is the peak less that. Every way runs in a process of its own, in turns, with a warm page cache; medians.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.merge_files import make_base, small_31b
from benchmarks.pages import measured
from gemma4_tpu.markdown import table

GIB = 2**30


def dd(folder: Path, layers: int) -> int:
    """Reads every shard with `dd`; returns the bytes held afterwards: none."""
    for path in sorted(folder.glob("*.safetensors")):
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M", "status=none"], check=True)
    return 0


def plain(folder: Path, layers: int) -> int:
    """Reads every shard into new memory; returns the bytes held."""
    held = [np.fromfile(path, np.uint8) for path in sorted(folder.glob("*.safetensors"))]
    return sum(x.nbytes for x in held)


def ours(folder: Path, layers: int) -> int:
    """`load_params`, as training calls it; returns the bytes of the arrays."""
    import jax
    import jax.numpy as jnp

    from gemma4_tpu.models import sharding
    from gemma4_tpu.models.layout import Layout
    from gemma4_tpu.models.params import load_params
    from gemma4_tpu.models.tensorfile import Checkpoint

    arch = small_31b(layers)
    layout, mesh = Layout.of(arch), sharding.make_mesh(1, 1, jax.devices()[:1])
    places = sharding.places(layout, mesh)
    params = load_params(Checkpoint(str(folder)), arch, layout, places, jnp.bfloat16)
    jax.block_until_ready(params)
    return sum(x.nbytes for x in jax.tree.leaves(params))


def safetensors(folder: Path, layers: int) -> int:
    """Every tensor by safetensors' own reader, as numpy arrays under their own names, nothing stacked or placed."""
    import ml_dtypes  # noqa: F401  numpy's bfloat16
    from safetensors import safe_open

    held: list[Any] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="flax") as file:
            held += [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  not a dict
    return sum(x.nbytes for x in held)


WAYS: dict[str, Callable[[Path, int], int]] = {
    "dd": dd, "reading into memory": plain, "safetensors into JAX arrays": safetensors, "ours": ours,
}  # fmt: skip


def _run(pipe: Any, name: str, folder: Path, layers: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    if name != "dd":
        import jax

        jax.devices()  # what is measured is loading
    started = time.perf_counter()
    held = WAYS[name](folder, layers)
    seconds = time.perf_counter() - started
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--times", type=int, default=3)
    asked = parser.parse_args()
    context, stamp = multiprocessing.get_context("spawn"), measured("jax")
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "base"
        make_base(folder, small_31b(asked.layers))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for turn in range(asked.times + 1):
            for name, runs in found.items():
                here, there = context.Pipe()
                process = context.Process(target=_run, args=(there, name, folder, asked.layers))
                process.start()
                there.close()
                outcome = here.recv()
                process.join()
                if turn:  # the first turn fills the page cache
                    runs.append(outcome)
    least = statistics.median(seconds for seconds, _ in found["dd"])
    rows = []
    for name, runs in found.items():
        seconds = statistics.median(s for s, _ in runs)
        held = max(held for _, held in runs) / GIB
        rows.append([name, f"{seconds:.1f}", f"{seconds / least:.1f}×", f"{held:.2f}"])
    told = f"{size / 1e9:.1f} GB in 31B's layout ({asked.layers} layers), onto a CPU device, page cache warm"
    print(f"{stamp} {told}; medians of {asked.times}.\n")
    print("\n".join(table(["way", "seconds", "beside dd", "memory beyond the arrays, GiB"], rows, "lrrr")))


if __name__ == "__main__":
    main()
