"""Text files of a run folder that were damaged: one message that names the file, nothing changed."""

import logging

import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.sweeping.state import Sweep
from gemma4_tpu.tracking.metrics import MetricsFile, read_metrics
from gemma4_tpu.tracking.records import config_of, overrides_of, result_of
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.start import start_fingerprint

GARBLED = [b"", b"\x00\xff\xfe", b"a: [", b"key: *alias", b"- a\n- b", b"[" * 200_000, b"name: \xff\xfe"]


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.open(tmp_path, "a", str(tmp_path / "run"), "auto", config={"name": "a"}, overrides=["name=a"])
    folder.close()
    return folder.path


@pytest.mark.parametrize("content", GARBLED)
def test_a_damaged_config_is_one_message(run, content):
    (run / "config.yaml").write_bytes(content)
    for reads in (lambda: config_of(run), lambda: RunFolder.existing(run).read_config(),
                  lambda: RunFolder.open(run, "a", str(run), "auto", config={"name": "a"})):  # fmt: skip
        with pytest.raises(UserError, match=r"config\.yaml: damaged"):
            reads()
    assert (run / "config.yaml").read_bytes() == content


@pytest.mark.parametrize("content", [each for each in GARBLED if each != b"- a\n- b"])
def test_damaged_overrides_and_results_are_one_message(run, content):
    (run / "overrides.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"overrides\.yaml: damaged"):
        overrides_of(run)
    (run / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result\.json: damaged"):
        result_of(run)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\x00",
        b"[1]",
        b'{"loss": 1}',
        b"[" * 200_000,
        b"nonsense",
        b'{"update": 2, "loss": "x"}',
        b'{"update": 2, "seconds": [1]}',
    ],
)
def test_a_damaged_row_is_one_message_that_names_its_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = b'{"update": 1}\n' + line + b'\n{"update": 3}\n'
    path.write_bytes(content)
    for reads in (lambda: read_metrics(path), lambda: MetricsFile(path, after_update=2)):
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: damaged .*; delete that line"):
            reads()
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [each for each in GARBLED if each != b"- a\n- b"])
def test_a_damaged_provenance_is_one_message_on_resuming(run, content):
    (run / "provenance.json").write_bytes(content)
    with pytest.raises(UserError, match=r"provenance\.json: damaged"):
        start_fingerprint(None, RunFolder(run), 2)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"entry": "train"}', b'{"entry": 1, "jobs": []}'])
def test_a_damaged_sweep_is_one_message(tmp_path, content):
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(UserError, match=r"sweep\.json: damaged"):
        Sweep.open(tmp_path, "train")


def test_a_missing_history_is_noticed(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for update in (1, 2, 3):
        file.log({"seconds": 10.0 * update}, update)
    file.close()
    saved_at_2 = 2
    again = MetricsFile(path, after_update=2)
    again.compare(saved_at_2)
    assert (again.rows, again.undone_at_seconds) == (2, 30.0) and "are left" not in caplog.text
    again.close()
    path.unlink()
    with caplog.at_level(logging.WARNING):
        MetricsFile(path, after_update=2).compare(saved_at_2)
    assert "0 of the 2 rows up to update 2 are left" in caplog.text
