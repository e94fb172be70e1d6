"""The house stands: imports point downward only, and the ground floor starts without JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gemma4_tpu

ROOT = Path(gemma4_tpu.__file__).parent
FLOORS = [  # from the ground up
    {
        "errors",
        "architectures",
        "hf_config",
        "templates",
        "hardware",
        "prices",
        "compiler_flags",
        "accelerators",
        "storage",
        "markdown",
        "plotting",
        "assets",
        "config",
    },
    {"models", "data", "tracking", "verilog_smoke"},
    {"step"},
    {"training", "planning", "export", "evals", "costing", "serving", "sweeping", "benching"},
    {"reporting"},
    {"train", "plan", "check", "merge", "evaluate", "judge", "serve", "bench", "report"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, by their first name: `config`, `step`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "gemma4_tpu":
            names |= {f"gemma4_tpu.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    ours = {name.split(".")[1] for name in names if name.startswith("gemma4_tpu.")}
    return {name for name in ours if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}


def test_every_module_has_a_floor():
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_imports_point_downward(path):
    own = FLOOR[path.relative_to(ROOT).parts[0].removesuffix(".py")]
    upward = {name for name in imported(path) if FLOOR[name] > own}
    assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)} from a floor above its own"


def test_the_ground_starts_without_jax():
    names = ["gemma4_tpu"]
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if FLOOR[parts[0]] == 0 and parts[-1] != "__init__":
            names.append("gemma4_tpu." + ".".join(parts))
    heavy = "{'jax', 'transformers', 'tunix', 'qwix', 'flax', 'numpy', 'pyarrow', 'torch'}"
    code = f"import sys, {', '.join(names)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_what_stands_around_the_package_is_not_used_by_it():
    """`launch`, plugins, experiments and tests may use the package, never the other way round."""
    around = {"launch", "hydra_plugins", "experiments", "benchmarks", "tests", "docs"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & around, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_records_and_rows_are_read_without_jax():
    """So that workers, sweeps' parents and reports start at once: these import JAX inside functions at most."""
    folders = {"data", "tracking", "verilog_smoke", "costing", "sweeping", "benching", "reporting"}
    paths = [path.relative_to(ROOT).with_suffix("") for path in MODULES if path.stem != "__init__"]
    names = ["gemma4_tpu." + ".".join(path.parts) for path in paths if path.parts[0] in folders]
    code = f"import sys, {', '.join(names)}; print(sorted({{'jax', 'flax', 'tunix', 'qwix'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
