"""The checkout, and its scripts outside of the packages as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

import gemma4_tpu

ROOT = Path(gemma4_tpu.__file__).parents[1]


def script(path: str) -> ModuleType:
    """A Python file of the checkout, imported."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
