"""Chips and slices: memory, peak rates and topology. The only place for such facts. Imports no JAX.

Peak rates, bandwidths and HBM are the manufacturers' published figures: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e
and tpu7x (read on 2026-11-26), and NVIDIA's data sheets (H100 SXM, H200). Usable HBM of v5p (102.8 GB) and v6e (31.25
GiB) is what the paper *Fine-Tuning and Serving Gemma 4 31B on Google Cloud TPU* found on the machines, and what the TPU
compiler lets a program use; for v5e (15.75 GiB) and tpu7x (94.75 GiB on each of a chip's two devices) it is the
compiler's limit. Names of slices and hosts follow Cloud TPU's accelerator types and, for tpu7x, xpk's. Prices are in
`prices.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

GB, GIB = 10**9, 2**30
LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator chip (TPU) or GPU."""

    name: str
    platform: str
    """JAX's name of the platform: `tpu` or `gpu`."""
    device_kinds: tuple[str, ...]
    """Lower-case prefixes of JAX's `device_kind` for this chip."""
    devices: int = 1
    """Number of JAX devices; a tpu7x chip is two, each with a TensorCore and half of the memory."""
    cores: int = 1
    """TensorCores, which slice names of v5p and tpu7x count."""
    hbm_bytes: int
    """High-bandwidth memory that programs can use."""
    hbm_bytes_per_second: float
    peak_flops_per_second: float
    """Dense bf16 matrix multiplication."""
    interconnect_bytes_per_second: float
    """Between chips, both directions together (ICI or NVLink)."""
    slices: str = ""
    """Chips along each side of its available slices, `2x2x1 2x2x2`; a v5e or v6e slice is at most a whole pod. Empty:
    not a TPU.
    """
    accelerator_type: str | None = None
    """What `--accelerator-type` of `gcloud compute tpus` calls slices of it, where that is not `name`."""
    runtime_version: str | None = None
    """`--runtime-version` of `gcloud compute tpus`; None: not offered as a TPU VM."""
    gke_accelerator: str | None = None
    """GKE's name of the chip, `cloud.google.com/gke-tpu-accelerator`; None: not offered there."""
    host_chips: int = 4
    """Chips of the largest machine with a single host. Larger slices have four on each host."""

    @property
    def device(self) -> Chip:
        """What one JAX device has of it: all, or an equal share. Programs are counted by device."""
        if self.devices == 1:
            return self
        n = self.devices
        return replace(
            self, devices=1, cores=self.cores // n, hbm_bytes=self.hbm_bytes // n,
            hbm_bytes_per_second=self.hbm_bytes_per_second / n,
            peak_flops_per_second=self.peak_flops_per_second / n,
            interconnect_bytes_per_second=self.interconnect_bytes_per_second / n,
        )  # fmt: skip


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

    @property
    def devices(self) -> int:
        """JAX devices, which a mesh is laid over."""
        return self.chips * self.chip.devices

    @property
    def runtime_version(self) -> str | None:
        """`--runtime-version` of `gcloud compute tpus`; None: not a TPU VM."""
        return self.chip.runtime_version

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
    cp: int = 1

    @classmethod
    def recorded(cls, sizes: Mapping[str, int]) -> MeshSizes:
        """Sizes from a record; old records have no `dp`."""
        return cls(**{"dp": 1, **sizes})

    @property
    def record(self) -> dict[str, int]:
        """For records: `cp` is omitted when 1, as in records that predate it."""
        return {axis: size for axis, size in self._asdict().items() if axis != "cp" or size > 1}

    @property
    def row_places(self) -> int:
        """Places among which the rows of a microbatch are split."""
        return self.dp * self.fsdp

    @property
    def overrides(self) -> tuple[str, ...]:
        """As given on the command line; without `mesh.dp` and `mesh.cp` where they are 1."""
        return tuple(f"mesh.{word}" for word in str(self).split())

    def __str__(self) -> str:
        shown = (one for one in self._asdict().items() if one not in (("dp", 1), ("cp", 1)))
        return " ".join(f"{axis}={size}" for axis, size in shown)

    @property
    def less_split(self) -> MeshSizes | None:
        """Half as many devices share a copy of the weights, and twice as many copies; None if that is not possible."""
        if self.fsdp % 2 == 0:
            return self._replace(dp=2 * self.dp, fsdp=self.fsdp // 2)
        return self._replace(dp=2 * self.dp, tp=self.tp // 2) if self.tp % 2 == 0 else None

    @property
    def product(self) -> str:
        """`1 × 2 × 4`, dp × fsdp × tp; where rows are split `1 × 1 × 4 × cp 2`."""
        sizes = [self.dp, self.fsdp, self.tp, *([f"cp {self.cp}"] if self.cp > 1 else [])]
        return " × ".join(map(str, sizes))


# fmt: off
CHIPS = {
    chip.name: chip for chip in (
        Chip(
            name="v5p", platform="tpu", device_kinds=("tpu v5p", "tpu v5"), cores=2, hbm_bytes=int(102.8 * GB),
            hbm_bytes_per_second=2765e9, peak_flops_per_second=459e12, interconnect_bytes_per_second=1200e9,
            runtime_version="v2-alpha-tpuv5", gke_accelerator="tpu-v5p-slice",
            slices="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8",
        ),
        Chip(
            name="v6e", platform="tpu", device_kinds=("tpu v6 lite", "tpu v6e"), hbm_bytes=int(31.25 * GIB),
            hbm_bytes_per_second=1640e9, peak_flops_per_second=918e12, interconnect_bytes_per_second=800e9,
            runtime_version="v2-alpha-tpuv6e", gke_accelerator="tpu-v6e-slice", host_chips=8,
            slices="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
        ),
        Chip(
            name="v5e", platform="tpu", device_kinds=("tpu v5 lite", "tpu v5e"), hbm_bytes=int(15.75 * GIB),
            hbm_bytes_per_second=819e9, peak_flops_per_second=197e12, interconnect_bytes_per_second=400e9,
            accelerator_type="v5litepod", runtime_version="v2-alpha-tpuv5-lite", gke_accelerator="tpu-v5-lite-podslice",
            host_chips=8, slices="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
        ),
        Chip(
            name="tpu7x", platform="tpu", device_kinds=("tpu7x", "tpu v7x"), devices=2, cores=2,
            hbm_bytes=int(189.5 * GIB), hbm_bytes_per_second=7380e9, peak_flops_per_second=2307e12,
            interconnect_bytes_per_second=1200e9, gke_accelerator="tpu7x", slices="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4",
        ),
        Chip(
            name="h100", platform="gpu", device_kinds=("nvidia h100",), hbm_bytes=80 * GB,
            hbm_bytes_per_second=3350e9, peak_flops_per_second=989e12, interconnect_bytes_per_second=900e9,
        ),
        Chip(
            name="h200", platform="gpu", device_kinds=("nvidia h200",), hbm_bytes=141 * GB,
            hbm_bytes_per_second=4800e9, peak_flops_per_second=989e12, interconnect_bytes_per_second=900e9,
        ),
    )
}
# fmt: on


def _tpus() -> Iterator[Slice]:
    for chip in CHIPS.values():
        for shape in chip.slices.split():
            chips = math.prod(map(int, shape.split("x")))
            size = chips * chip.cores
            yield Slice(
                name=f"{chip.name}-{size}", chip=chip, chips=chips, topology=f"{chip.name}:{shape}",
                hosts=1 if chips <= chip.host_chips else chips // 4,
                accelerator_type=f"{chip.accelerator_type or chip.name}-{size}",
            )  # fmt: skip


SLICES: dict[str, Slice] = {
    one.name: one
    for one in [
        *_tpus(),
        Slice(name="h100x2", chip=CHIPS["h100"], chips=2, hosts=1, accelerator_type="a3-highgpu-2g"),
        Slice(name="h200", chip=CHIPS["h200"], chips=1, hosts=1),
    ]
}
"""Every slice by name. `local` is not one: it stands for whatever JAX finds."""


def option_name(slice_name: str) -> str:
    """What `hardware=` calls a slice: `v5p8` for `v5p-8`, `tpu7x_8` for `tpu7x-8`."""
    return slice_name.replace("-", "_" if slice_name.startswith("tpu") else "")


class _Named(Protocol):
    name: str


def slice_of(hardware: _Named) -> Slice | None:
    """The slice that `hardware` (a `HardwareConfig`) names; None for `local`."""
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


def _family(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform
