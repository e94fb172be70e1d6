from pathlib import Path

from gemma4_tpu import assets

TINY = Path(assets.ROOT, "tiny")


def fake_docker_path() -> Path:
    return Path(__file__).with_name("fake_docker.py")
