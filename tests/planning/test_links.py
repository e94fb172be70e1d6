"""Which links a collective has: those between its own chips, as the slice's grid lays them out."""

import itertools

import pytest

from gemma4_tpu.hardware import SLICES
from gemma4_tpu.planning import collectives
from gemma4_tpu.planning.hlo import Instruction
from gemma4_tpu.planning.links import Grid, link_bytes_per_second


def grid(name):
    """The devices in the order in which libtpu tells them: x first."""
    sizes = Grid.of(SLICES[name], []).sizes
    places = [tuple(reversed(place)) for place in itertools.product(*(range(size) for size in reversed(sizes)))]
    return Grid.of(SLICES[name], places)


def exchange(kind, attributes):
    return Instruction("one", kind, (), (), attributes)


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v5p-8", (0, 1, 2, 3), 2),  # a square closes a ring
        ("v5p-8", (0, 1), 1),  # a pair has the link between it
        ("v5p-8", (0, 3), 0.5),  # across: over a link that the other pair needs as well
        ("v5p-32", (0, 1, 2, 3), 2),  # tp = 4 has no more links than on a v5p-8
        ("v5p-32", (0, 4, 8, 12), 1),  # four in a row, whose ends are not joined
        ("v5p-32", tuple(range(16)), 3),  # a corner has three neighbours
        ("v6e-8", (0, 1, 2, 3), 2),
        ("v6e-8", (0, 2, 4, 6), 1),
        ("v6e-8", (0, 4), 0.5),
        ("v5p-16", tuple(range(8)), 3),  # a cube
        ("v6e-1", (0,), 0),
    ],
)
def test_a_group_has_the_links_between_its_own_chips(name, group, links):
    assert grid(name).links(group) == links


def test_one_ring_has_two_links_and_algorithms_for_several_dimensions_all():
    cube = grid("v5p-16")
    one = exchange("all-gather", "replica_groups={}")
    ring = '"collective_algorithm_config":{"emitter":"1DAllGatherNonMajorDim"}'
    assert collectives.over(one, cube, ring) == (2, ("+x", "+y", "+z"))
    assert collectives.over(one, cube, ring.replace("1D", "3D")) == (3, ("+x", "+y", "+z"))
    assert collectives.over(one, cube, '"strategy":"StrategyRing"')[0] == 2


def test_large_slices_are_joined_at_their_ends():
    sizes = (4, 4, 4)
    cube = Grid(sizes, tuple(itertools.product(*map(range, sizes))))
    row = [cube.places.index((x, 0, 0)) for x in range(4)]
    assert cube.links(row) == 2
    assert cube.distance(row[0], row[3]) == 1
    assert cube.lanes(row) == ("+x", "-x")
    assert Grid((4, 8), ((0, 0), (3, 0))).distance(0, 1) == 3
    assert Grid((16, 16), ((0, 0), (15, 0))).distance(0, 1) == 1


def test_axes_that_send_in_other_directions_do_not_share_links():
    eight = grid("v5p-32")
    tp, fsdp = (0, 1, 2, 3), (0, 4, 8, 12)
    assert eight.lanes(tp) == ("+x", "+y")
    assert eight.lanes(fsdp) == ("+z",)
    # Around a square in either direction: the first chip sends one way by one link, the other way by the other.
    around, back = [(0, 1), (1, 3), (3, 2), (2, 0)], [(1, 0), (3, 1), (2, 3), (0, 2)]
    assert eight.permuted(around) == (1, ("+x",))
    assert eight.permuted(back) == (1, ("+y",))
    assert eight.permuted([(0, 0), (1, 2), (2, 1), (3, 3)]) == (0.5, ("-x",))
    assert eight.permuted([(0, 0), (1, 1)]) == (0.0, ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={}", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
        ("replica_groups=something_new", None),
    ],
)
def test_groups_are_read_in_every_way_that_the_compiler_writes_them(text, expected):
    told = collectives.groups(exchange("all-gather", f"channel_id=1, {text}, dimensions={{0}}"), 8)
    assert (sorted(told) if told is not None else None) == expected


def test_one_link_of_six_in_one_direction():
    assert link_bytes_per_second(SLICES["v5p-8"]) == 100e9
    assert link_bytes_per_second(SLICES["v6e-4"]) == 100e9
    assert link_bytes_per_second(SLICES["v5e-8"]) == 50e9
