"""Run by `test_hosts.py` in each process: the same short training on one mesh after another, into a folder for each.

python several_meshes.py <folder> <coordinator address> <processes> <process> <dp>x<fsdp>x<tp>x<cp> … -- <overrides>
"""

import sys

import shallow  # noqa: F401 (beside this file: `tiny` of two layers)

from gemma4_tpu.train import _record, load_train
from gemma4_tpu.training.hosts import start_hosts
from gemma4_tpu.training.preemption import Preemption

folder, address, processes, process, *rest = sys.argv[1:]
meshes, overrides = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
where = [
    f"distributed.coordinator_address={address}", f"distributed.num_processes={processes}",
    f"distributed.process_id={process}",
]  # fmt: skip

with Preemption() as preemption:
    root = load_train([*where, *overrides]).root
    with start_hosts(root.distributed, root.hardware) as hosts:
        for mesh in meshes:
            dp, fsdp, tp, cp = mesh.split("x")
            sizes = f"mesh.dp={dp}", f"mesh.fsdp={fsdp}", f"mesh.tp={tp}", f"mesh.cp={cp}"
            words = [*sizes, f"run_dir={folder}/{mesh}", *overrides]
            assert _record(load_train(words), hosts, preemption).code == 0
