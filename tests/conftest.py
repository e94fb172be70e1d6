"""What every test runs under: eight CPU devices, so that meshes are real, and no network."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cpu_compiler import flags
from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)

# JAX reads these when it is first asked for a device; child processes inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", flags(devices=8))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# PyTorch's threads only wait for each other where every core has a test worker; models are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The emulator of tests/gcs.py speaks HTTP; without this gcsfs asks over gRPC first what kind of bucket it has.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# Children keep what they compile of Python: an installer such as uv leaves that to them, and vLLM's imports then take a
# third longer at each start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What is started in the background of a script ignores Ctrl-C, and hands that on to its children; tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


OUT_OF_TIME = "no time was left to begin it"


def pytest_addoption(parser):
    parser.addoption(
        "--allowed-skips", type=Path, help="fail where a test is skipped for a reason that it does not list"
    )
    parser.addoption(
        "--must-run", default="", help="fail unless tests of each of these files pass, and none of theirs is skipped"
    )
    parser.addoption(
        "--begin-before", type=float, default=float("inf"),
        help="skip tests that would begin later than this (seconds since 1970), except those of --must-run",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > item.config.option.begin_before and not _named(item.nodeid, item.config):
        item.add_marker(pytest.mark.skip(OUT_OF_TIME))  # unlike pytest.skip, it is reported where the test stands


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Fails a run in which something was skipped that should not be; says what."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not hasattr(session.config, "workerinput"):
        _look_for_skips(session, reporter)
        _look_for_files(session, reporter)


def _named(nodeid, config):
    return nodeid.partition("::")[0].endswith(tuple(filter(None, config.option.must_run.split(","))))


def _look_for_files(session, reporter):
    for name in filter(None, session.config.option.must_run.split(",")):
        passed, skipped = (
            sum(report.nodeid.partition("::")[0].endswith(name) for report in reporter.stats.get(kind, []))
            for kind in ("passed", "skipped")
        )
        if skipped or not passed:
            reporter.ensure_newline()
            reporter.line(f"{name} has to run here: {passed} tests passed, {skipped} were skipped", red=True)
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def _look_for_skips(session, reporter):
    listed = session.config.option.allowed_skips
    if listed is None:
        return
    lines = [line.split("#")[0].strip() for line in listed.read_text(encoding="utf-8").splitlines()]
    allowed = tuple(line for line in lines if line)
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])]
    if refused := sorted({reason for reason in reasons if not reason.startswith(allowed)}):
        reporter.ensure_newline()
        reporter.section(f"skipped, but not listed in {listed}", sep="=", red=True)
        for reason in refused:
            reporter.line(f"{reasons.count(reason)} × {reason}")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
