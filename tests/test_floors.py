"""What must answer at once starts without JAX. Which way imports point, and that none go in circles: `make check`."""

import subprocess
import sys
from pathlib import Path

import pytest

import gemma4_tpu

ROOT = Path(gemma4_tpu.__file__).parent
JAX = {"jax", "flax", "qwix", "tunix"}
HEAVY = JAX | {"numpy", "pyarrow", "torch", "transformers"}
RECORDS = ("benching", "costing", "data", "reporting", "sweeping", "tracking")


def modules(place: Path) -> list[str]:
    """The modules in a folder of the package, dotted."""
    paths = sorted(path for path in place.rglob("*.py") if path.stem != "__init__")
    return [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        # every command with its help and its checks: an error of the configuration costs no second
        (["gemma4_tpu.commands", *modules(ROOT / "config"), *modules(ROOT / "launch")], HEAVY),
        # workers, sweeps' parents and reports: these import JAX inside functions at most
        ([name for folder in RECORDS for name in modules(ROOT / folder)], JAX),
    ],
    ids=["commands", "records"],
)
def test_these_start_without_jax(names, absent):
    code = f"import sys, {', '.join(names)}; print(sorted({absent} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
