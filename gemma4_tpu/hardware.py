"""Chips and slices: memory, peak rates, topology and dated prices. The only place where such facts live. No JAX here.

Peak rates, bandwidths and HBM are the manufacturers' published figures: Cloud TPU's system-architecture pages (v5p,
v5e, v6e) and NVIDIA's data sheets (H100 SXM, H200). Usable HBM of v5p (102.8 GB) and v6e (31.25 GiB) is what the paper
*Fine-Tuning and Serving Gemma 4 31B on Google Cloud TPU* found on the machines, and what the TPU compiler lets a
program use, as it does for v5e (15.75 GiB). Prices that are quoted come from that
paper (Google Cloud, on demand, 2026; it names no day); prices that it doesn't quote are derived per chip, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gemma4_tpu.config.schema import HardwareConfig

GB, GIB = 10**9, 2**30
LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator chip (TPU) or GPU; one JAX device each."""

    name: str
    platform: str
    """JAX's name of the platform: `tpu` or `gpu`."""
    device_kinds: tuple[str, ...]
    """Lower-case beginnings of JAX's `device_kind` for this chip."""
    hbm_bytes: int
    """High-bandwidth memory that a program can use."""
    hbm_bytes_per_second: float
    peak_flops_per_second: float
    """Dense bf16 matrix multiplication."""
    interconnect_bytes_per_second: float
    """Between chips, both directions together, per chip (ICI or NVLink)."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a whole slice costs, and who says so."""

    usd_per_hour: float
    date: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A machine (or several) that one run takes."""

    name: str
    chip: Chip
    chips: int
    hosts: int
    topology: str | None = None
    """Name for XLA's ahead-of-time compiler; None: none (GPUs)."""
    accelerator_type: str | None = None
    """`--accelerator-type` of `gcloud compute tpus`, or the machine type that carries the GPUs."""
    runtime_version: str | None = None
    """`--runtime-version` of `gcloud compute tpus`; None: not a TPU VM."""
    on_demand: Price | None = None
    """None: no price with a source is known."""
    spot: Price | None = None

    @property
    def hbm_bytes(self) -> int:
        """HBM of all chips together."""
        return self.chips * self.chip.hbm_bytes

    @property
    def peak_flops_per_second(self) -> float:
        """bf16 peak of all chips together."""
        return self.chips * self.chip.peak_flops_per_second


class MeshSizes(NamedTuple):
    """Sizes of the mesh axes among which the devices of a run are laid out."""

    dp: int
    fsdp: int
    tp: int

    @classmethod
    def recorded(cls, sizes: Mapping[str, int]) -> MeshSizes:
        """Those of a record; old ones know no `dp`."""
        return cls(**{"dp": 1, **sizes})

    @property
    def row_places(self) -> int:
        """Places among which the rows of a microbatch are split."""
        return self.dp * self.fsdp

    @property
    def overrides(self) -> tuple[str, ...]:
        """As given on the command line; without `mesh.dp` where it is 1."""
        return tuple(f"mesh.{word}" for word in str(self).split())

    def __str__(self) -> str:
        return " ".join(f"{axis}={size}" for axis, size in self._asdict().items() if axis != "dp" or size > 1)


# fmt: off
V5P = Chip(
    name="v5p", platform="tpu", device_kinds=("tpu v5p", "tpu v5"), hbm_bytes=int(102.8 * GB),
    hbm_bytes_per_second=2765e9, peak_flops_per_second=459e12, interconnect_bytes_per_second=1200e9,
)
V5E = Chip(
    name="v5e", platform="tpu", device_kinds=("tpu v5 lite", "tpu v5e"), hbm_bytes=int(15.75 * GIB),
    hbm_bytes_per_second=819e9, peak_flops_per_second=197e12, interconnect_bytes_per_second=400e9,
)
V6E = Chip(
    name="v6e", platform="tpu", device_kinds=("tpu v6 lite", "tpu v6e"), hbm_bytes=int(31.25 * GIB),
    hbm_bytes_per_second=1640e9, peak_flops_per_second=918e12, interconnect_bytes_per_second=800e9,
)
H100 = Chip(
    name="h100", platform="gpu", device_kinds=("nvidia h100",), hbm_bytes=80 * GB,
    hbm_bytes_per_second=3350e9, peak_flops_per_second=989e12, interconnect_bytes_per_second=900e9,
)
H200 = Chip(
    name="h200", platform="gpu", device_kinds=("nvidia h200",), hbm_bytes=141 * GB,
    hbm_bytes_per_second=4800e9, peak_flops_per_second=989e12, interconnect_bytes_per_second=900e9,
)
# fmt: on
CHIPS = {chip.name: chip for chip in (V5P, V5E, V6E, H100, H200)}

_PAPER = "paper 'Fine-Tuning and Serving Gemma 4 31B on Google Cloud TPU', tables 2.1 and 2.2"
_QUOTED = {  # slice: (USD per hour, chips)
    "v5p-8": (16.80, 4),
    "v6e-8": (21.52, 8),
    "h100x2": (22.12, 2),
}
_PRICED_LIKE = {"v5p": "v5p-8", "v6e": "v6e-8", "h100": "h100x2"}


def _on_demand(name: str, chip: Chip, chips: int) -> Price | None:
    """The paper's price, or its price per chip times `chips`; None for a chip that it doesn't price."""
    quoted = _PRICED_LIKE.get(chip.name)
    if quoted is None:
        return None
    usd, quoted_chips = _QUOTED[quoted]
    if name == quoted:
        return Price(usd_per_hour=usd, date="2026", source=_PAPER)
    source = f"derived per chip from {quoted} in {_PAPER}"
    return Price(usd_per_hour=round(usd / quoted_chips * chips, 4), date="2026", source=source)


def _tpu(name: str, chip: Chip, topology: str, chips: int, hosts: int, accelerator_type: str, runtime: str) -> Slice:
    return Slice(
        name=name, chip=chip, chips=chips, hosts=hosts, topology=f"{chip.name}:{topology}",
        accelerator_type=accelerator_type, runtime_version=runtime, on_demand=_on_demand(name, chip, chips),
    )  # fmt: skip


_V5P_RUNTIME, _V5E_RUNTIME, _V6E_RUNTIME = "v2-alpha-tpuv5", "v2-alpha-tpuv5-lite", "v2-alpha-tpuv6e"

SLICES: dict[str, Slice] = {
    s.name: s
    for s in [
        # v5p counts TensorCores in its name (two per chip), v5e and v6e count chips.
        _tpu("v5p-8", V5P, "2x2x1", 4, 1, "v5p-8", _V5P_RUNTIME),
        _tpu("v5p-16", V5P, "2x2x2", 8, 2, "v5p-16", _V5P_RUNTIME),
        _tpu("v5p-32", V5P, "2x2x4", 16, 4, "v5p-32", _V5P_RUNTIME),
        _tpu("v5p-64", V5P, "2x4x4", 32, 8, "v5p-64", _V5P_RUNTIME),
        _tpu("v6e-1", V6E, "1x1", 1, 1, "v6e-1", _V6E_RUNTIME),
        _tpu("v6e-4", V6E, "2x2", 4, 1, "v6e-4", _V6E_RUNTIME),
        _tpu("v6e-8", V6E, "2x4", 8, 1, "v6e-8", _V6E_RUNTIME),
        _tpu("v6e-16", V6E, "4x4", 16, 4, "v6e-16", _V6E_RUNTIME),
        _tpu("v5e-8", V5E, "2x4", 8, 1, "v5litepod-8", _V5E_RUNTIME),
        _tpu("v5e-16", V5E, "4x4", 16, 4, "v5litepod-16", _V5E_RUNTIME),
        Slice(
            name="h100x2",
            chip=H100,
            chips=2,
            hosts=1,
            accelerator_type="a3-highgpu-2g",
            on_demand=_on_demand("h100x2", H100, 2),
        ),
        Slice(name="h200", chip=H200, chips=1, hosts=1),
    ]
}
"""Every slice by name. `local` is not one: it stands for whatever JAX finds."""


def slice_of(hardware: HardwareConfig) -> Slice | None:
    """The slice that `hardware` names; None for `local`."""
    return SLICES.get(hardware.name)


def chip_of(platform: str, device_kind: str) -> Chip | None:
    """The chip behind a JAX device (`device.platform`, `device.device_kind`); None: not in the table (a CPU, say)."""
    kind = device_kind.lower()
    matches = [
        (len(start), chip)
        for chip in CHIPS.values()
        if chip.platform == _family(platform)
        for start in chip.device_kinds
        if kind.startswith(start)
    ]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def price_of(hardware: HardwareConfig) -> Price | None:
    """What an hour on `hardware` costs: the configured price, else the table's (spot or on demand); None: unknown."""
    if hardware.usd_per_hour is not None:
        return Price(usd_per_hour=hardware.usd_per_hour, date="this run", source="hardware.usd_per_hour")
    found = slice_of(hardware)
    if found is None:
        return None
    return found.spot if hardware.spot else found.on_demand


def _family(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform
