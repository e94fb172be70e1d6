"""The families: deterministic, without repeats, split by module, specified completely."""

import re
from itertools import islice
from random import Random

import pytest

from experiments.verilog_smoke.families import FAMILIES, draw_designs
from experiments.verilog_smoke.make_data import make_problems
from experiments.verilog_smoke.prompts import document, specification


def test_a_seed_fixes_the_problems_and_another_gives_others():
    first, again, other = (make_problems(seed, 66, heldout=False) for seed in (3, 3, 4))
    assert first == again
    assert {p.prompt for _, p in first} != {p.prompt for _, p in other}


def test_families_take_turns_and_never_repeat_a_module():
    designs = list(islice(draw_designs(Random(0), heldout=False), 20 * len(FAMILIES)))
    assert len(FAMILIES) >= 12
    assert {d.family for d in designs[: len(FAMILIES)]} == set(FAMILIES)
    assert len({d.module() for d in designs}) == len(designs)


def test_training_and_heldout_sides_share_no_module_whatever_the_seed():
    train = {d.module() for seed in (0, 1) for d in islice(draw_designs(Random(seed), heldout=False), 600)}
    heldout = {d.module() for seed in (0, 2) for d in islice(draw_designs(Random(seed), heldout=True), 200)}
    assert not train & heldout


def test_drawing_ends_when_the_families_are_exhausted():
    few = list(draw_designs(Random(0), heldout=True, max_misses=3))
    assert 0 < len(few) < 10_000


@pytest.mark.parametrize("family", FAMILIES)
def test_specifications_name_every_port_and_documents_no_chat(family):
    rng = Random(family)
    for _ in range(40):
        design = FAMILIES[family](rng)
        assert design.family == family
        assert len({port.name for port in design.ports}) == len(design.ports)
        for behaviour in design.behaviours:
            free = [p.name for p in design.ports if p.role != "clock"]  # a counter may leave its clock to the port list
            assert all(re.search(rf"\b{name}\b", behaviour) for name in free), behaviour
        prompt = specification(design, rng)
        assert "TopModule" in prompt
        assert all(f"put {port.name}" in prompt for port in design.ports)
        assert "TopModule" not in document(design, rng)
        assert "```" not in document(design, rng)
