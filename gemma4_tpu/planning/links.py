"""The interconnect links of a collective: those between its own chips.

Chips of a slice form a two- or three-dimensional grid, whose ends are joined in large slices. A mesh axis has only the
links between its own chips: four chips in a square have two each; four in a row without joined ends have one at the
ends, which limits all of them, however many links the slice has.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gemma4_tpu.hardware import Slice

Place = tuple[int, ...]
RING = 2
"""Links of a chip that one ring uses, one to each neighbour."""
_JOINED_2D = 16
"""A dimension of a 2D slice (v5e, v6e) is joined at its ends at this size (Cloud TPU, system architecture)."""
_JOINED_3D = 4
"""Those of a 3D slice (v5p, tpu7x) where all are multiples of this: whole cubes (Cloud TPU, system architecture)."""


def sizes_of(wanted: Slice) -> Place:
    """Chips along each dimension: (2, 2, 4) of a v5p-32; (1,) without a topology."""
    topology = (wanted.topology or "").partition(":")[2]
    return tuple(int(size) for size in re.findall(r"\d+", topology)) or (1,)


def links_of_chip(wanted: Slice) -> int:
    """Links that a chip has, used by the slice or not."""
    return 2 * len(sizes_of(wanted))


def link_bytes_per_second(wanted: Slice) -> float:
    """Of one link in one direction; a chip's published bandwidth counts both directions of all its links."""
    return wanted.chip.interconnect_bytes_per_second / 2 / links_of_chip(wanted)


@dataclass(frozen=True)
class Grid:
    """A slice's chips, and the position of each device of the program."""

    sizes: Place
    places: tuple[Place, ...]
    """Of each device, in the program's order (that of the mesh)."""

    @staticmethod
    def of(wanted: Slice, places: Sequence[Sequence[int]]) -> Grid:
        """The grid of a slice; `places` are the devices' `coords`."""
        sizes = sizes_of(wanted)
        return Grid(sizes, tuple(tuple(place[: len(sizes)]) for place in places))

    def joined(self, dimension: int) -> bool:
        """Whether a dimension's ends are linked."""
        if len(self.sizes) == 2:
            return self.sizes[dimension] >= _JOINED_2D
        return all(size % _JOINED_3D == 0 for size in self.sizes)

    def distance(self, a: int, b: int) -> int:
        """Number of links on the path between two devices."""
        steps = 0
        for dimension, size in enumerate(self.sizes):
            step = abs(self.places[a][dimension] - self.places[b][dimension])
            steps += min(step, size - step) if self.joined(dimension) else step
        return steps

    def links(self, group: Sequence[int], most: int | None = None) -> float:
        """Number of links over which each chip sends, among those between the group's own chips, at most `most`; 0
        within a chip.

        The chip with the fewest links limits all. If no two chips are neighbours, their traffic passes through other
        chips, whose own groups do the same: each link is shared by as many groups as the path has steps.
        """
        chips = sorted({self.places[device] for device in group})
        if len(chips) == 1:
            return 0.0
        one_of = {self.places[device]: device for device in group}
        devices = [one_of[chip] for chip in chips]
        steps = min(self.distance(a, b) for a, b in itertools.combinations(devices, 2))
        neighbours = min(sum(self.distance(a, b) == steps for b in devices if b != a) for a in devices)
        return (neighbours if most is None else min(most, neighbours)) / steps

    def lanes(self, group: Sequence[int]) -> tuple[str, ...]:
        """Directions such as `+x` in which a chip of a group sends: its own links, as seen from the first device.

        Transfers in the same direction queue up; programs are the same on all chips.
        """
        first = min(group)
        others = [device for device in group if self.places[device] != self.places[first]]
        nearest = min((self.distance(first, device) for device in others), default=0)
        found = [self._direction(first, device) for device in others if self.distance(first, device) == nearest]
        return tuple(sorted(set(found)))

    def permuted(self, pairs: Sequence[tuple[int, ...]]) -> tuple[float, tuple[str, ...]]:
        """(links, lanes) of pairs that send to each other: one link, shared by as many as its longest path has
        steps.
        """
        steps = max((self.distance(a, b) for a, b in pairs), default=0)
        if not steps:
            return 0.0, ()
        a, b = min(pair for pair in pairs if self.distance(*pair))
        return 1 / steps, (self._direction(a, b),)

    def _direction(self, a: int, b: int) -> str:
        """The first step from one device to another, by the shorter way."""
        for dimension, size in enumerate(self.sizes):
            step = self.places[b][dimension] - self.places[a][dimension]
            if step:
                around = self.joined(dimension) and 2 * abs(step) > size
                return ("+" if (step > 0) != around else "-") + "xyz"[dimension]
        return ""
