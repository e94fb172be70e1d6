"""A SLURM cluster of one node, this machine: real munged, slurmctld and slurmd, with all that is theirs in one folder.

The fixture `cluster` gives the environment in which sbatch, squeue and scancel find it.
"""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

from tests.ports import free_port

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={port}
SlurmdPort={other_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=tpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
DAEMONS = ("munged", "slurmctld", "slurmd")


def _start_now(over: threading.Event) -> None:
    """SLURM lets a requeued job wait for two minutes; these wait for two seconds.

    Not less: the node takes what was signed in the second in which the job was revoked for the revoked start, and
    SLURM then ends the job ("Job credential revoked").
    """
    waiting_since: dict[str, float] = {}
    while not over.wait(0.5):
        waiting = subprocess.run(["squeue", "-h", "-t", "PENDING", "-o", "%A"], capture_output=True, text=True)
        now = time.monotonic()
        waiting_since = {number: waiting_since.get(number, now) for number in waiting.stdout.split()}
        for number, since in waiting_since.items():
            if now - since >= 2:
                subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], capture_output=True)


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch):
    """Its folder. Skips only where the programs, or root, are missing: daemons that don't start are a failure."""
    if missing := [name for name in (*DAEMONS, "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"SLURM is not installed: {', '.join(missing)} missing")
    if os.getuid() != 0:
        pytest.skip("SLURM is not tried: only root can start its daemons")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir(), (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    port, other_port = free_port(), free_port()
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, port=port, other_port=other_port)
    (folder / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    places = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid",
              "log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}  # fmt: skip
    over = threading.Event()
    try:
        for command in (["munged", "--force", *(f"--{name}={place}" for name, place in places.items())],
                        ["slurmctld", "-c"], ["slurmd", "-N", host]):  # fmt: skip
            started = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if started.returncode:
                pytest.fail(f"SLURM does not start: {command[0]}: {started.stderr.strip()[-500:]}")
        deadline = time.monotonic() + 120
        while "idle" not in (said := subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout):
            if time.monotonic() > deadline:
                pytest.fail(f"SLURM does not start: its node is not idle ({said.strip()})")
            time.sleep(0.2)
        threading.Thread(target=_start_now, args=(over,), daemon=True).start()
        yield folder
    finally:
        over.set()
        subprocess.run(["scancel", "--me"], capture_output=True)
        for name in reversed(DAEMONS):
            if (pid := folder / f"{name}.pid").exists():
                os.kill(int(pid.read_text()), signal.SIGTERM)
