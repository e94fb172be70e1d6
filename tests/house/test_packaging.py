"""Wheel and sdist, and the console script in an environment of its own: from any directory, with completion."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

import gemma4_tpu
from gemma4_tpu.commands import ENTRIES
from tests.house.scripts import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def script(built, tmp_path_factory):
    """The console script, installed from the wheel into an environment that finds the dependencies of this one."""
    home = tmp_path_factory.mktemp("home") / "venv"
    venv.create(home, with_pip=False)
    (wheel,) = built.glob("*.whl")
    python = str(home / "bin/python")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    site = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    with open(f"{site}/dependencies.pth", "w") as file:  # last on the path: the editable install here stays out
        file.write(sysconfig.get_path("purelib") + "\n")
    return home / "bin/gemma4-tpu"


def run(script, *words, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(script), *words], cwd=cwd, capture_output=True, text=True, timeout=300, env=kept | environment
    )


def test_the_wheel_holds_what_git_sees_and_no_more(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"gemma4_tpu-{gemma4_tpu.__version__}.dist-info/METADATA").decode()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "gemma4_tpu", "hydra_plugins", "conf"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    expected = {f"gemma4_tpu/{name}" if name.startswith("conf/") else name for name in listed}
    assert names - {"gemma4_tpu/conf/local/.gitkeep"} == expected - {"gemma4_tpu/conf/local/.gitkeep"}
    assert f"Version: {gemma4_tpu.__version__}\n" in metadata and "License-File: NOTICE" in metadata


def test_the_sdist_holds_sources_tests_and_docs(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml", "LICENSE", "NOTICE", "CITATION.cff", "Makefile", "README.md", "docs/configuration.md",
        "gemma4_tpu/assets/tiny/model.safetensors", "conf/train.yaml", "launch/tpu_vm.py", "launch/Dockerfile",
        "tests/conftest.py",
    } <= names  # fmt: skip
    assert not any(name.startswith((".venv", "outputs", "conf/local/d")) for name in names)


def test_every_command_answers_from_any_directory(script, tmp_path):
    for name in ENTRIES:
        done = run(script, name, "--help", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"Usage: python -m gemma4_tpu.{name}" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_launchers_travel_too(script, tmp_path):
    """Messages name the command that is there, and sources come from git where there is no checkout."""
    usage = run(script, "launch", cwd=tmp_path)
    assert usage.returncode == 0 and "\n  launch tpu_vm " in usage.stdout and "\n  launch gke " in usage.stdout
    shown = run(script, "launch", "tpu_vm", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "Usage: gemma4-tpu launch tpu_vm" in shown.stdout
    place = ["model.path=gs://bucket/gemma-4-31b", "bucket=gs://bucket", "project=p", "zone=us-east5-a", "dry_run=true"]
    words = ["launch", "tpu_vm", "experiment=v5p8", *place]
    refused = run(script, *words, cwd=tmp_path)
    assert refused.returncode == 2 and "set git=<URL>@<branch, tag or commit>" in refused.stderr
    dry = run(script, *words, "git=https://example.org/gemma4-tpu.git@main", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "queued-resources create" in dry.stdout and "gemma4-tpu launch tpu_vm" in dry.stdout
    assert "delete_slice()" in dry.stdout  # the script that every host runs


def test_the_wheel_completes_words(script, tmp_path):
    """As its shells ask it on Tab: tests/house/test_completion.py."""
    asked = run(script, "completion", "query", cwd=tmp_path, COMP_LINE="gemma4-tpu serve serving=v6e8")
    assert {"serving=v6e8", "serving=v6e8_tuned"} <= set(asked.stdout.split()), asked.stderr


def test_the_wheel_reads_its_own_conf(script, tmp_path):
    """Composition and the plugins for sweeps: all from the installed files."""
    refused = run(script, "train", "-m", "lora.rnk=1,2", cwd=tmp_path)
    assert refused.returncode == 2 and "did you mean lora.rank?" in refused.stderr
    where = run(script, "train", "--info", "searchpath", cwd=tmp_path)
    assert str(script.parents[1]) in where.stdout and str(ROOT / "conf") not in where.stdout
