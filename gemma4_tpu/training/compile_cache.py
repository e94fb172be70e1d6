"""Compiled programs on disk: the next start of the same program reads it instead of compiling again."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import jax

from gemma4_tpu.errors import UserError

log = logging.getLogger(__name__)

_counts = {"hits": 0, "misses": 0}


def _count(event: str, **details: object) -> None:
    if event.startswith("/jax/compilation_cache/cache_"):
        name = event.rpartition("_")[2]
        if name in _counts:
            _counts[name] += 1


jax.monitoring.register_event_listener(_count)


def use_compile_cache(compile_cache: str | None) -> None:
    """Sets JAX's compilation cache to `trainer.compile_cache`; call this before anything is compiled.

    Raises:
      UserError: the folder cannot be created or written to.
    """
    if compile_cache is None:
        jax.config.update("jax_enable_compilation_cache", False)
        log.info("compiled programs are not kept (trainer.compile_cache=null)")
        return
    folder = _default() if compile_cache == "auto" else Path(compile_cache).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable"):
            pass
    except OSError as error:
        raise UserError(
            f"trainer.compile_cache={compile_cache}: can't write to {folder} ({error.strerror}); give another folder,"
            " or null for none"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    log.info("compiled programs are kept in %s", folder)


def log_compile_cache() -> None:
    """Logs how many programs came from the cache; those that compile in under a second are not cached."""
    log.info("compilation cache: %d hits, %d misses", _counts["hits"], _counts["misses"])


def _default() -> Path:
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(given).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser().absolute() / "gemma4_tpu" / "xla"
