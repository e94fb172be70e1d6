"""What every test runs under: eight CPU devices, so that meshes are real, and no network."""

import os
import signal

from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)

# JAX reads these when it is first asked for a device; child processes inherit them. The tests compile far more than
# they run, so the compiler is told to hurry.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The emulator of tests/gcs.py speaks HTTP; without this gcsfs asks over gRPC first what kind of bucket it has.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# What is started in the background of a script ignores Ctrl-C, and hands that on to its children; tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
