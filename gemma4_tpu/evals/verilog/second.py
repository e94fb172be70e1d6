"""A second opinion: compares the design with the reference under fresh random stimulus.

It is a `Problem` like any other, with our own bench, so the same judge runs it in the same sandbox. A design that has
memorised the benchmark's stimulus passes there and fails here. It is an opinion, not a verdict: random stimulus also
does what a specification rules out, where the reference's behaviour is one of many valid ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog import verilog_eval
from gemma4_tpu.evals.verilog.ports import Port, Roles
from gemma4_tpu.evals.verilog.scan import defined_modules
from gemma4_tpu.evals.verilog.stimulus import Row, stimulus

STIMULUS = "stimulus.hex"
BENCH_TOP, REFERENCE_TOP = "second_opinion", "second_reference"
STEP = 1000  # time units between rows; delays inside a design are shorter

_BENCH = """`timescale 1ns/1ps
module {bench};
  reg [{bits}:0] rows [0:{last}];
  reg compared;
{inputs}
{outputs}
  integer row, errors, samples;
  {reference} right ({reference_ports});
  {top} answer ({design_ports});
  initial begin
    $readmemh("{stimulus}", rows);
    errors = 0;
    samples = 0;
    for (row = 0; row <= {last}; row = row + 1) begin
      {{{driven}}} = rows[row];
      #{step};
      if (compared) begin
        samples = samples + 1;
        // Bits that the reference leaves open (X, Z) are open.
        if (({known} ^ {{{theirs}}} ^ {known}) !== {known}) errors = errors + 1;
      end
    end
    $display("{marker}: %0d in %0d samples", errors, samples);
    $finish;
  end
endmodule
"""


def second_problem(problem: Problem, ports: Sequence[Port], seed: int) -> Problem:
    """A problem that compares an answer to `problem` with its reference.

    Args:
      problem: a problem with a reference.
      ports: the reference's.
      seed: determines the stimulus, together with the problem's name.
    """
    roles = Roles.of(ports, problem.reference)
    rows = stimulus(ports, roles, f"{seed}/{problem.name}")
    return replace(
        problem,
        name=second_name(problem.name),
        reference=_renamed(problem),
        testbench=_bench(problem, ports, rows),
        reference_top=REFERENCE_TOP,
        bench_top=BENCH_TOP,
        bench_needs_reference=True,
        result_marker=verilog_eval.RESULT_MARKER,
        result_pattern=verilog_eval.RESULT_PATTERN,
        official_rule=verilog_eval.official_rule,
        failure_pattern=None,
        files={STIMULUS: _file(ports, rows)},
    )


def second_name(name: str) -> str:
    """The name of a problem's second opinion, since a judge identifies problems by name."""
    return f"{name} (second opinion)"


def _renamed(problem: Problem) -> str:
    """The reference with its modules renamed, since an answer's modules can have the same names."""
    names = {name: f"second_{name}" for name in defined_modules(problem.reference)}
    names[problem.reference_top] = REFERENCE_TOP
    words = re.compile(rf"(?<![\w$.])(?:{'|'.join(map(re.escape, names))})(?![\w$])")
    return words.sub(lambda match: names[match[0]], problem.reference)


def _bench(problem: Problem, ports: Sequence[Port], rows: Sequence[Row]) -> str:
    inputs = [port for port in ports if port.direction == "INPUT"]
    outputs = [port for port in ports if port.direction == "OUTPUT"]
    ours, theirs = ([f"{side}_{n}" for n in range(len(outputs))] for side in ("ours", "theirs"))
    driven = {port.name: f"in_{n}" for n, port in enumerate(inputs)}

    def connected(results: Sequence[str]) -> str:
        pairs = [(port, driven[port.name]) for port in inputs] + list(zip(outputs, results, strict=True))
        return ", ".join(f".{port.written}({net})" for port, net in pairs)

    width = sum(port.bits for port in outputs)
    return _BENCH.format(
        bench=BENCH_TOP, reference=REFERENCE_TOP, top=problem.top, stimulus=STIMULUS, step=STEP,
        marker=verilog_eval.RESULT_MARKER, last=len(rows) - 1, bits=sum(port.bits for port in inputs),
        inputs="\n".join(f"  reg [{port.bits - 1}:0] {driven[port.name]};" for port in inputs),
        outputs="\n".join(
            f"  wire [{port.bits - 1}:0] {net};"
            for nets in (ours, theirs) for port, net in zip(outputs, nets, strict=True)
        ),
        reference_ports=connected(ours), design_ports=connected(theirs),
        driven=", ".join(["compared", *driven.values()]), theirs=", ".join(theirs),
        known=f"({{{', '.join(ours)}}} ^ {width}'b0)",
    )  # fmt: skip


def _file(ports: Sequence[Port], rows: Sequence[Row]) -> str:
    """The rows for `$readmemh`: whether outputs are compared, then every input, highest bit first."""
    lines = []
    for compared, row in rows:
        number = int(compared)
        for port in ports:
            if port.direction == "INPUT":
                number = number << port.bits | row[port.name]
        lines.append(f"{number:x}")
    return "\n".join(lines) + "\n"
