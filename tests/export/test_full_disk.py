"""A disk that fills while a merge writes to it: one message, nothing published, and on with the same command."""

import subprocess
import sys

import pytest

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.export.place import JOURNAL
from gemma4_tpu.export.writer import DiskFile, Writer
from tests.export.conftest import tree
from tests.export.runs import make_run
from tests.export.test_kill import MERGE, looks_finished, write_base

MIB = 1 << 20

# In a mount namespace of its own: a file system of 110 MiB in memory, on which somebody else takes what is left as soon
# as the merge, which needs 97 of them, has its first shard there; then makes room; then the same command once more.
INSIDE = (
    f"JOURNAL = {JOURNAL!r}"
    + """
import pathlib, signal, subprocess, sys, time
disk, merge = pathlib.Path(sys.argv[1]), sys.argv[2:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=110m", "tmpfs", str(disk)], check=True)
process = subprocess.Popen(merge, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
staging = disk / ".model.partial"
journal = staging / JOURNAL
while process.poll() is None and not (journal.exists() and "safetensors" in journal.read_text()):
    time.sleep(0.0005)
process.send_signal(signal.SIGSTOP)
with open(disk / "theirs", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(1 << 16))
    except OSError:
        pass
process.send_signal(signal.SIGCONT)
print(process.communicate()[1], process.returncode, sorted(p.name for p in disk.iterdir()), sep="\\n")
print("finished", len(list(staging.glob("*.safetensors"))), "unfinished", len(list(staging.glob("*.part"))))
(disk / "theirs").unlink()
again = subprocess.run(merge, capture_output=True, text=True)
print("AGAIN", again.stderr, again.returncode, sep="\\n")
subprocess.run(["cp", "-r", str(disk / "model"), str(disk.parent / "kept")], check=True)
"""
)


def can_mount() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not can_mount(), reason="no file system can be mounted here")
def test_a_disk_that_fills_halfway(tmp_path, merge):
    base = write_base(tmp_path / "base", shards=12, padding_bytes=8 * MIB)
    run = make_run(tmp_path / "run", base, lora=LoraConfig(rank=4))
    merge(run, "verify=false", f"target={tmp_path}/whole")
    disk = tmp_path / "disk"
    disk.mkdir()
    words = [*MERGE, f"run={run}", f"target={disk}/model", f"run_dir={run}/record"]
    command = ["unshare", "-rm", sys.executable, "-c", INSIDE, str(disk), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    first, again = done.stdout.split("AGAIN")
    assert f"error: target={disk}/model: the disk is full; free some space, and the same command resumes" in first
    assert "Traceback" not in first and "\n2\n['.model.partial', 'theirs']\n" in first
    finished = int(first.split("finished ")[1].split()[0])
    assert 1 <= finished < 12 and "unfinished 0" in first
    assert again.rstrip().endswith("\n0") and again.count("(done before)") == finished
    assert tree(tmp_path / "kept") == tree(tmp_path / "whole")
    assert looks_finished(run) == []


def test_a_disk_that_is_full_for_the_note_that_a_file_is_finished(tmp_path):
    path = tmp_path / "file"

    def write() -> None:
        with Writer(DiskFile(str(path))) as out:
            out.write(b"all of it")
            out.finish()
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert not path.exists()
