"""Judges that the tests share: starting their workers is the slow part.

The Icarus Verilog on the PATH judges; for another one, `PATH=<its folder>:$PATH python -m pytest tests/evals/verilog`.
"""

import pytest

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.verilog.verilog_judge import VerilogJudge


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("references"))


@pytest.fixture(scope="session")
def judge(cache_dir):
    """With the best sandbox of this machine and two seconds for each simulation."""
    with VerilogJudge(JudgeConfig(cpu_seconds=2, workers=2, cache_dir=cache_dir)) as judge:
        yield judge
