"""`trainer.compile_cache`: the second start reads what the first compiled, and says so."""

import os
import subprocess
import sys

import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.training.compile_cache import use_compile_cache

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from gemma4_tpu.training.compile_cache import log_compile_cache, use_compile_cache
use_compile_cache(sys.argv[1])
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
log_compile_cache()
"""


def start(folder: str, **environment: str) -> str:
    command = [sys.executable, "-c", PROGRAM, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_second_start_hits_and_says_so(tmp_path):
    kept = tmp_path / "caches"
    first = start("auto", XDG_CACHE_HOME=str(kept), JAX_COMPILATION_CACHE_DIR="")
    assert f"compiled programs are kept in {kept}/gemma4_tpu/xla" in first and " 0 hits, " in first
    assert " 0 misses" not in first
    again = start(str(kept / "gemma4_tpu" / "xla"))
    assert " 0 hits" not in again and " 0 misses" in again


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"trainer\.compile_cache=.*can't write to .*give another folder, or null"):
        use_compile_cache(str(tmp_path / "file" / "folder"))
