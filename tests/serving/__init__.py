from pathlib import Path


def fake_docker_path() -> Path:
    return Path(__file__).with_name("fake_docker.py")
