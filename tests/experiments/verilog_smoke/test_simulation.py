"""The test benches with the real simulator: references pass, mistakes do not."""

import shutil
from itertools import islice
from random import Random

import pytest

from experiments.verilog_smoke.design import Design, DesignPort
from experiments.verilog_smoke.families import FAMILIES, draw_designs
from experiments.verilog_smoke.simulate import all_pass, passes
from experiments.verilog_smoke.testbench import make_testbench
from gemma4_tpu.evals.verilog.mutants import mutants

pytestmark = pytest.mark.skipif(
    shutil.which("iverilog") is None, reason="Icarus Verilog (package `iverilog`) is not installed"
)


def _register(body: str, *, reset_role: str = "reset") -> Design:
    return Design(
        family="hand",
        behaviours=("",),
        summary="",
        body=(body,),
        ports=(
            DesignPort(name="clk", role="clock"),
            DesignPort(name="rst", role=reset_role),
            DesignPort(name="d"),
            DesignPort(name="q", width=4, output=True, reg=True),
        ),
    )


def _verdict(reference: Design, other: Design | str) -> bool:
    code = other if isinstance(other, str) else other.module()
    return passes(code, reference=reference.module(), testbench=make_testbench(reference))


def test_two_draws_of_every_family_pass_their_own_bench():
    designs = list(islice(draw_designs(Random(11), heldout=False), 2 * len(FAMILIES)))
    cases = [(d.module(), d.module(), make_testbench(d)) for d in designs]
    assert all_pass(cases) == [True] * len(cases)


def test_benches_kill_the_mutants():
    designs = list(islice(draw_designs(Random(12), heldout=False), 3 * len(FAMILIES)))
    cases = [(m, d.module(), make_testbench(d)) for d in designs for m in mutants(d.module())]
    survivors = [case[0] for case, alive in zip(cases, all_pass(cases), strict=True) if alive]
    # Swapped inputs of a symmetric truth table, say, are no mistake; at this size there are at most a few of them.
    assert len(cases) > 100
    assert len(survivors) <= 0.02 * len(cases), survivors


def test_an_asynchronous_reset_differs_from_a_synchronous_one():
    synchronous = _register("always @(posedge clk) if (rst) q <= 0; else q <= {q[2:0], d};")
    asynchronous = _register("always @(posedge clk or posedge rst) if (rst) q <= 0; else q <= {q[2:0], d};")
    assert _verdict(synchronous, synchronous)
    assert _verdict(asynchronous, asynchronous)
    assert not _verdict(synchronous, asynchronous)
    assert not _verdict(asynchronous, synchronous)


def test_a_counter_must_wrap():
    counter = _register("always @(posedge clk) if (rst) q <= 0; else q <= q + 1;")
    saturating = _register("always @(posedge clk) if (rst) q <= 0; else if (q != 15) q <= q + 1;")
    assert not _verdict(counter, saturating)


def test_an_equality_that_never_holds_is_found():
    ports = (DesignPort(name="a", width=16), DesignPort(name="b", width=16), DesignPort(name="y", output=True))
    common = {"family": "hand", "behaviours": ("",), "summary": "", "ports": ports}
    equal, never = (Design(**common, body=(f"assign y = {e};",)) for e in ("a == b", "0"))
    assert _verdict(equal, equal)
    assert not _verdict(equal, never)


def test_an_undriven_output_fails_and_an_unknown_reference_forgives():
    driven = _register("always @(posedge clk) if (rst) q <= 0; else q <= {q[2:0], d};")
    assert not _verdict(driven, _register("wire unused = d;"))
    unknown = _register("always @(posedge clk) q <= 4'bxxxx;")
    assert _verdict(unknown, driven)


@pytest.mark.parametrize("code", ["", "module TopModule (", "module Other (); endmodule", "I cannot do that."])
def test_what_does_not_compile_does_not_pass(code):
    assert not _verdict(_register("always @(posedge clk) q <= d;"), code)
