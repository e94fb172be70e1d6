"""Eight CPU devices for the tests of meshes; JAX reads these when it is first asked for a device."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
