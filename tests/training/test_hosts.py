"""Several real processes of one run: the same numbers as one process, preemption, a process that dies."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from gemma4_tpu.errors import PREEMPTED, UserError
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.training.hosts import Hosts
from gemma4_tpu.training.saved import open_saved
from tests.ports import free_port
from tests.training.test_resume import kill_when, rows

SHORT = [
    "model.path=random:0", "lora.rank=4", "lora.dropout=0.1", "data.sequence_length=128", "data.max_drop_fraction=0.9",
    "data.max_rows=100", "data.heldout=[]", "trainer.global_batch_sequences=8", "trainer.microbatches=2",
    "trainer.remat=none", "optimizer.warmup_updates=0", "checkpoint.every=2", "trainer.max_updates=3",
]  # fmt: skip


SCRIPT = Path(__file__).with_name("several_meshes.py")


def weights(run: Path) -> dict[str, bytes]:
    state = open_saved(run, "latest")
    return {"update": state.update} | {name: state.read(name).tobytes() for name in state.names}


def on_meshes(shallow, folder: Path, count: int, devices: int, meshes: Sequence[str], *words: str) -> list[str]:
    """What `count` processes said that ran the same training on one mesh of `devices` after another."""
    where = [str(folder), f"localhost:{free_port()}", str(count)]
    environment = shallow.environment(devices // count) | {"NPROC": str(devices)}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *where, str(index), *meshes, "--", *words], text=True, cwd=folder.parent,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) for index in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(said)
    return said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_and_four_processes_make_the_very_numbers_of_one_on_every_mesh(shallow, tmp_path):
    """With Gloo in all three: JAX's collectives inside one process add four terms in another order.

    With as many threads in each process, too: XLA's products on CPUs add up in as many parts (it reads NPROC).
    """
    meshes = {1: ("1x2x2x1", "2x2x1x1", "1x1x2x2"), 2: ("2x2x1x1", "1x1x2x2"), 4: ("1x2x2x1", "2x2x1x1")}
    for count in meshes:
        said = on_meshes(shallow, tmp_path / str(count), count, 4, meshes[count], *SHORT)
        assert all("Run folder" not in text for text in said[1:])  # process 0 alone writes and reports
    for count in (2, 4):
        for mesh in meshes[count]:
            several, one = tmp_path / str(count) / mesh, tmp_path / "1" / mesh
            assert rows(several) == rows(one), (mesh, count)
            assert weights(several) == weights(one), (mesh, count)


class Two:
    """A run of two processes with a device each."""

    def __init__(self, shallow, run: Path, *words: str):
        address = f"localhost:{free_port()}"
        command = [*SHORT, "mesh.fsdp=2", "mesh.tp=1", *words, f"run_dir={run}", "distributed.num_processes=2",
                   f"distributed.coordinator_address={address}"]  # fmt: skip
        self.processes = [
            shallow.start(*command, f"distributed.process_id={index}", cwd=run.parent, devices=1) for index in (0, 1)
        ]

    def wait(self, seconds: float) -> list[tuple[int, str]]:
        """(exit code, standard error) of both."""
        until = time.monotonic() + seconds
        errors = [p.communicate(timeout=max(1.0, until - time.monotonic()))[1] for p in self.processes]
        return [(p.returncode, error) for p, error in zip(self.processes, errors, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preempted_then_one_dies_then_fewer_processes_finish_it(shallow, tmp_path):
    words = ["trainer.max_updates=40", "checkpoint.every=5", "optimizer.schedule=constant"]
    run = tmp_path / "run"
    two = Two(shallow, run, *words)
    kill_when(two.processes[0], run, 2)
    two.processes[1].terminate()  # whichever gets the signal
    ends = two.wait(300)
    assert [code for code, _ in ends] == [PREEMPTED, PREEMPTED], ends
    saved = open_saved(run, "latest").update
    assert Result.read(run / "result.json").status == "preempted"
    assert rows(run)[-1]["update"] == saved < 40

    two = Two(shallow, run, *words)
    kill_when(two.processes[0], run, saved + 1)
    two.processes[1].kill()
    (code, error), _ = two.wait(240)  # at the latest, a minute without a heartbeat ends it
    assert code not in (0, 2, PREEMPTED), error
    assert "the others will stop" in error or "another task died" in error

    last = max(rows(run)[-1]["update"], saved) + 2
    done = shallow(
        *SHORT, *words, f"trainer.max_updates={last}", f"run_dir={run}", "mesh=fsdp", cwd=tmp_path, devices=2
    )
    assert "resumed from the checkpoint" in done.stderr
    assert [row["update"] for row in rows(run)] == list(range(1, last + 1))


def test_one_process_alone_needs_no_agreement():
    alone = Hosts()
    assert alone.from_first(lambda: "folder") == "folder"
    with pytest.raises(UserError, match="no"):
        alone.from_first(lambda: (_ for _ in ()).throw(UserError("no")))
    alone.check_same({"rows": "ab"}, "nothing")


def test_an_address_where_nobody_is_names_the_keys(train, tmp_path):
    refused = train(
        "distributed.coordinator_address=nowhere", "distributed.num_processes=2", "distributed.process_id=5",
        cwd=tmp_path, exit_code=2,
    )  # fmt: skip
    assert "distributed.coordinator_address=nowhere" in refused.stderr
    assert "distributed.process_id" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert os.listdir(tmp_path) == []
