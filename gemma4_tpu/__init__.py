"""Fine-tune, merge, evaluate, serve, benchmark and cost Gemma 4 on TPUs."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma4_tpu.in_memory import Gemma4 as Gemma4

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports `Gemma4` on first use, so that commands answer before JAX is loaded."""
    if name != "Gemma4":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)  # absl logs while Orbax is imported, and adds a handler to a bare root logger
    try:
        from gemma4_tpu.in_memory import Gemma4
    finally:
        root.removeHandler(silent)
    return Gemma4
