"""How tests have XLA compile for CPUs: they compile far more than they run, so it is told to hurry."""

import os

# No optimisation, the emitter of fusions that goes by LLVM alone instead of MLIR first, and no parts of a program to be
# compiled beside each other: a step of the tiny models then takes half the CPU time.
# An option for the backend, unlike a flag, is no error where a later XLA does not know it.
_HURRY = (
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
)


def flags(devices: int) -> str:
    """`XLA_FLAGS` of a process with so many CPU devices."""
    return f"{_HURRY} --xla_force_host_platform_device_count={devices}"


def unhurried() -> dict[str, str]:
    """The environment of a process that trains for so long that optimised programs pay: as users have it."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
