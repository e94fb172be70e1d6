import socket
from pathlib import Path

from gemma4_tpu import assets

TINY = Path(assets.ROOT, "tiny")


def fake_docker_path() -> Path:
    return Path(__file__).with_name("fake_docker.py")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
