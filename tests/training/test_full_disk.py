"""A disk that fills up during a save: one message, and the last checkpoint is as it was."""

import contextlib
import errno
import json
import logging
import re
import resource
import shutil
import subprocess
import time

import jax
import pytest

from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.errors import UserError, exit_code
from gemma4_tpu.tracking import logs
from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.capacity import check_disk, check_memory
from gemma4_tpu.training.resume import newest_verified
from gemma4_tpu.training.setup import init_state
from tests.step.test_train_step import make
from tests.tracking.test_provenance import plain_logging  # noqa: F401 (fixture)
from tests.training.conftest import HARD, cache, shallow  # noqa: F401 (fixtures)
from tests.training.test_checkpoint import POSITION, open_folder


@pytest.fixture
def almost_full(tmp_path):
    """A folder, and a context in which no more than a few kB can be written there.

    A file system of 1 MiB where this machine lets us mount one; else a limit on the size of each file.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode == 0
    )

    @contextlib.contextmanager
    def full():
        if mounted:
            (disk / "filler").write_bytes(b"x" * _free(disk, 24 << 10))
            yield
            (disk / "filler").unlink()
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 10, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield disk, full
    if mounted:
        subprocess.run(["umount", "-l", disk], check=True)


def _free(disk, leave: int) -> int:
    return max(0, shutil.disk_usage(disk).free - leave)


def test_a_disk_that_fills_up_stops_with_one_message_and_the_last_checkpoint_whole(almost_full):
    disk, full = almost_full
    step, _, trained = make()
    state = init_state(step, trained, jax.random.key(0), step.model.mesh)
    checkpoints = open_folder(disk / "checkpoints", step, keep_best=False)
    checkpoints.save(state._replace(update=state.update + 2), POSITION)
    checkpoints.wait()

    def save() -> None:
        checkpoints.save(state._replace(update=state.update + 4), POSITION)
        checkpoints.wait()

    with full(), pytest.raises(UserError) as caught:
        save()
    message = str(caught.value)
    assert "is full: the checkpoint at update 4 could not be written" in message
    assert "the last good checkpoint is at update 2" in message and "the same command resumes" in message
    with contextlib.suppress(UserError):
        checkpoints.close()
    assert newest_verified(str(disk / "checkpoints")) == 2

    again = open_folder(disk / "checkpoints", step, keep_best=False)  # space was made
    again.save(state._replace(update=state.update + 4), POSITION)
    again.close()
    assert newest_verified(str(disk / "checkpoints")) == 4
    assert not [path for path in (disk / "checkpoints").iterdir() if "tmp" in path.name]


def test_a_disk_too_small_for_the_checkpoints_is_refused_at_the_start(almost_full):
    disk, _ = almost_full
    with pytest.raises(UserError, match=r"checkpoint.keep=100000: needs .* MiB .*are free; free some space"):
        check_disk(str(disk), CheckpointConfig(keep=100_000), 2**20)
    check_disk("gs://bucket/run/checkpoints", CheckpointConfig(keep=100_000), 2**20)


def test_a_model_larger_than_the_memory_is_refused_at_the_start():
    step, _, _ = make()
    leaves = list(step.model.layout.leaves())
    check_memory("cpu", leaves, 2**20, 4)
    with pytest.raises(UserError, match=r"needs at least .* MiB of this machine's memory"):
        check_memory("cpu", leaves, 2**20, 10**9)


def test_a_disk_that_is_full_leaves_the_reason_in_the_result_and_one_line_of_log(almost_full, capsys, plain_logging):  # noqa: F811
    disk, full = almost_full
    folder = RunFolder.open(disk, "a", str(disk / "run"), "auto", config={"name": "a"})
    logs.setup_logging(folder.log_path)
    config = folder.config_path.read_bytes()
    with full():
        for chance in range(400):
            logging.getLogger("gemma4_tpu").warning("%s: row %d", "x" * 200, chance)
        with contextlib.suppress(OSError):
            (disk / "more").write_bytes(bytes(40 << 10))  # the last bytes
        folder.leave_result(Result(status="failed", error="the disk is full"))
        folder.put_back()
        folder.close()
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("can't be written any more") == 1
    assert Result.read(folder.result_path).error == "the disk is full"
    assert folder.config_path.read_bytes() == config


def test_a_full_disk_is_one_message_of_any_command(capsys):
    def run() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/there/file")

    assert exit_code(run) == 2
    assert capsys.readouterr().err == (
        "error: the disk is full (/there/file): make space, and the same command resumes\n"
    )


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_says_so_last_and_goes_on_when_there_is_room(shallow, tmp_path):  # noqa: F811
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        # Every checkpoint is kept: one that goes as soon as the disk is full would make room for the next.
        more = ["trainer.max_updates=60", "trainer.eval_every=0", "checkpoint.keep=30"]
        words = [*HARD, *more, f"run_dir={disk / 'run'}"]
        running = shallow.start(*words, cwd=tmp_path)
        metrics, until = disk / "run/metrics.jsonl", time.monotonic() + 300
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            assert running.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        out, err = running.communicate(timeout=300)
        assert running.returncode == 2 and "Traceback" not in out + err, (running.returncode, out, err)
        assert re.match(r"error: the disk (of .* )?is full", err.splitlines()[-1]) and "same command resumes" in err
        (disk / "filler").unlink()
        result = json.loads((disk / "run/result.json").read_text())
        assert result["status"] == "failed" and re.search(r"the disk (of .* )?is full", result["error"])
        shallow(*words, cwd=tmp_path)
        assert [row["update"] for row in read_metrics(metrics) if "loss" in row] == [*range(1, 61)]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
