"""Provenance: what it records, what it never does, how records differ."""

import dataclasses
import logging
import subprocess

import pytest

from gemma4_tpu.redact import redact, redact_arguments
from gemma4_tpu.tracking import logs, provenance
from gemma4_tpu.tracking.files import read_json
from gemma4_tpu.tracking.metrics import MetricsFile
from gemma4_tpu.tracking.provenance import RecordDifference, capture, compare, record

SECRETS = {
    "HF_TOKEN": "hf_" + "Q7x" * 10,
    "WANDB_API_KEY": "0123456789abcdef" * 3,
    "MY_SERVICE_PASSWORD": "correct-horse-battery",
}
INPUTS = {"hardware": {"devices": 4}, "seeds": {"trainer": 7}, "fingerprints": {"data": "d1", "tokenizer": "t1"}}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout that stands in for the package's own."""

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", tmp_path / "repo", *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "repo" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    monkeypatch.setattr(provenance, "_PACKAGE_ROOT", package)
    return package


@pytest.fixture
def plain_logging():
    yield
    root = logging.getLogger()
    for handler in logs._handlers:
        root.removeHandler(handler)
    logs._handlers.clear()


def test_two_captures_of_one_state_do_not_differ():
    first, second = (dataclasses.asdict(capture(**INPUTS, command=["a"])) for _ in range(2))
    assert compare(first, second | {"started": "later", "command": ["b"]}) == []
    assert first["packages"]["jax"]
    assert first["seeds"] == {"trainer": 7}
    assert len(first["code"]["sha256"]) == 64


def test_every_kind_of_difference_is_named(checkout):
    before = dataclasses.asdict(capture(**INPUTS))
    (checkout / "__init__.py").write_text("a = 2\n")
    (checkout / "new.py").write_text("")
    now = dataclasses.asdict(
        capture(hardware={"devices": 8}, seeds={"trainer": 8}, fingerprints={"data": "d2", "tokenizer": "t1"})
    )
    now["packages"]["jax"] = "9.9"
    del now["packages"]["numpy"]
    differences = {difference.key: difference for difference in compare(before, now)}
    assert set(differences) == {
        "code.sha256", "code.git_dirty", "code.git_diff_sha256", "code.git_untracked", "packages.jax", "packages.numpy",
        "hardware.devices", "seeds.trainer", "fingerprints.data",
    }  # fmt: skip
    assert differences["fingerprints.data"] == RecordDifference("fingerprints.data", "d1", "d2")
    assert differences["packages.numpy"].now is None
    assert str(differences["hardware.devices"]) == "hardware.devices: 4 → 8"


def test_changes_of_the_checkout_are_kept(run, checkout):
    (checkout / "__init__.py").write_text("a = 2\n")
    record(run, capture(**INPUTS))
    assert "+a = 2" in (run.path / "git.diff").read_text()
    assert read_json(run.provenance_path)["code"]["git_dirty"] is True


def test_a_clean_checkout_leaves_no_diff(run, checkout):
    record(run, capture(**INPUTS))
    assert not (run.path / "git.diff").exists()
    assert read_json(run.provenance_path)["code"]["git_dirty"] is False


def test_a_repository_that_the_package_is_only_installed_in_says_nothing(checkout, monkeypatch):
    installed = checkout.parent / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "_PACKAGE_ROOT", installed)
    assert set(capture(**INPUTS).code) == {"sha256"}


def test_a_resumed_run_keeps_its_first_record_and_lists_what_differs(run, caplog):
    record(run, capture(**INPUTS))
    differences = record(run, capture(**(INPUTS | {"hardware": {"devices": 8}})))
    assert differences == [RecordDifference("hardware.devices", 4, 8)]
    assert "hardware.devices: 4 → 8" in caplog.text
    written = read_json(run.provenance_path)
    assert written["hardware"] == {"devices": 4}
    assert written["resumed"][0]["differences"] == [{"key": "hardware.devices", "recorded": 4, "now": 8}]


def test_no_secret_reaches_the_run_folder(run, checkout, monkeypatch, plain_logging):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    logs.setup_logging(run.log_path)
    (checkout / "__init__.py").write_text(f'token = "{SECRETS["HF_TOKEN"]}"\n')
    leaks = [f"--{name}={value}" for name, value in SECRETS.items()] + [
        "--password",
        "hunter2hunter2",
        "https://me:pw12@h/x",
    ]
    record(run, capture(**INPUTS, command=["train", *leaks]))
    for value in SECRETS.values():
        logging.getLogger("gemma4_tpu.data").warning("can't read https://user:%s@host/data", value)
    MetricsFile(run.metrics_path).log({"loss": 1.0}, 1)
    content = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    for secret in [*SECRETS.values(), "hunter2hunter2", "pw12"]:
        assert secret.encode() not in content
    assert b"can't read https://***@host/data" in content


def test_ordinary_words_are_not_taken_for_secrets(monkeypatch):
    monkeypatch.setenv("SORT_KEY", "1")
    words = ["train", "trainer.global_batch_tokens=4096", "model.tokenizer=/x", "tracker.entity=key1", "name=secretary"]
    assert redact_arguments(words) == words
    assert redact("1 of 10 keys") == "1 of 10 keys"
