"""Self-checking test benches, written in the form that spec-to-RTL benchmarks use.

A bench drives `RefModule` and `TopModule` with the same inputs, compares their outputs twice per clock period (so that
an asynchronous reset differs from a synchronous one) and prints `Mismatches: E in N samples`. Small input spaces are
walked through; everything else sees corner values, near-equal operands and long runs without reset as often as uniform
values, because under uniform stimulus operands are seldom equal and counters never wrap.
"""

from __future__ import annotations

from experiments.verilog_smoke.design import Design, DesignPort

MAX_EXHAUSTIVE_BITS = 9
RANDOM_SAMPLES = 250

_BENCH = """`timescale 1 ns/1 ps

module stimulus_gen (
  input clk{stimulus_ports}
);
  // Corner values, values near another operand, and uniform ones.
  function [15:0] biased(input [15:0] near);
    case ($urandom % 8)
      0: biased = 0;
      1: biased = 16'hffff;
      2: biased = near;
      3: biased = near + 1;
      4: biased = near - 1;
      5: biased = 1 << ($urandom % 16);
      default: biased = $urandom;
    endcase
  endfunction

  integer i;
  initial begin
{stimulus}
    @(negedge clk) #1 $finish;
  end
endmodule

module tb();
  typedef struct packed {{
    int errors;
    int errortime;
    int clocks;
  }} stats;
  stats stats1;

  reg clk = 0;
  initial forever #5 clk = ~clk;

{nets}

  stimulus_gen stim1 (.clk(clk){stimulus_connections});
  RefModule good1 ({reference_connections});
  TopModule top_module1 ({top_connections});

  // An X of the reference matches anything; an X of the design under test only an X.
  wire tb_match = ({{ {ref} }} === ({{ {ref} }} ^ {{ {dut} }} ^ {{ {ref} }}));

  always @(clk) begin
    #4;
    stats1.clocks++;
    if (!tb_match) begin
      if (stats1.errors == 0) stats1.errortime = $time;
      stats1.errors++;
    end
  end

  final begin
    if (stats1.errors) $display("Hint: First mismatch at %0d ns.", stats1.errortime);
    $display("Mismatches: %1d in %1d samples", stats1.errors, stats1.clocks);
  end

  initial begin
    #1000000
    $display("TIMEOUT");
    $finish();
  end
endmodule
"""


def make_testbench(design: Design) -> str:
    """The bench of `design`; it needs `RefModule` and `TopModule` to be compiled with it."""
    clock = design.clock
    driven = [port for port in design.inputs if port.role != "clock"]
    clock_pins = [f".{clock.name}(clk)"] if clock else []
    in_pins = clock_pins + [f".{port.name}({port.name})" for port in driven]

    def pins(suffix: str) -> str:
        return ", ".join(in_pins + [f".{port.name}({port.name}_{suffix})" for port in design.outputs])

    return _BENCH.format(
        stimulus_ports="".join(f",\n  output reg {_range(port)}{port.name}" for port in driven),
        stimulus=_indent(_clocked_stimulus(design, driven) if clock else _combinational_stimulus(driven), 4),
        nets=_indent(
            [f"logic {_range(port)}{port.name};" for port in driven]
            + [f"logic {_range(port)}{port.name}_ref, {port.name}_dut;" for port in design.outputs],
            2,
        ),
        stimulus_connections="".join(f", .{port.name}({port.name})" for port in driven),
        reference_connections=pins("ref"),
        top_connections=pins("dut"),
        ref=", ".join(f"{port.name}_ref" for port in design.outputs),
        dut=", ".join(f"{port.name}_dut" for port in design.outputs),
    )


def _range(port: DesignPort) -> str:
    return f"[{port.width - 1}:0] " if port.width > 1 else ""


def _indent(lines: list[str], spaces: int) -> str:
    return "\n".join(" " * spaces + line for line in lines)


def _biased(ports: list[DesignPort]) -> list[str]:
    """Statements that draw a value for each port, each near the one before."""
    near = [ports[-1].name, *(port.name for port in ports[:-1])]
    return [f"{port.name} = biased({other});" for port, other in zip(ports, near, strict=True)]


def _combinational_stimulus(driven: list[DesignPort]) -> list[str]:
    names = ", ".join(port.name for port in driven)
    total_bits = sum(port.width for port in driven)
    lines = [f"{{{names}}} = 0;"]
    if total_bits <= MAX_EXHAUSTIVE_BITS:
        return [*lines, f"for (i = 0; i < {2**total_bits}; i++) @(negedge clk) #1 {{{names}}} = i;"]
    return [
        *lines,
        f"repeat ({RANDOM_SAMPLES}) @(negedge clk) begin",
        "  #1;",
        *(f"  {line}" for line in _biased(driven)),
        "end",
    ]


def _clocked_stimulus(design: Design, driven: list[DesignPort]) -> list[str]:
    resets = [port for port in driven if port.role.startswith("reset")]
    enables = [port for port in driven if port.role == "enable"]
    data = [port for port in driven if port.role == "data"]
    wrap = 2 ** max(port.width for port in design.outputs)  # cycles until a counter has wrapped

    def reset(asserted: str) -> list[str]:
        return [f"{p.name} = {'!' if p.role == 'reset_low' else ''}({asserted});" for p in resets]

    def cycles(count: int, statements: list[str]) -> list[str]:
        return [f"repeat ({count}) @(negedge clk) begin", "  #1;", *(f"  {line}" for line in statements), "end"]

    draw = _biased(data) if data else []
    start = [*reset("1"), *(f"{port.name} = 1;" for port in enables), *(f"{port.name} = 0;" for port in data)]
    mixed = [*reset("$urandom % 8 == 0"), *(f"{port.name} = $urandom % 4 != 0;" for port in enables), *draw]
    # A long run without reset, so that a counter wraps.
    calm = [*reset("0"), *(f"{port.name} = $urandom % 16 != 0;" for port in enables), *draw]
    return [*start, *cycles(3, draw), *cycles(150, mixed), *cycles(wrap + wrap // 8 + 20, calm), *cycles(50, mixed)]
