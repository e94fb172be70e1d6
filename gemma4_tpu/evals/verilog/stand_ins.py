"""The Verilog between a bench and a design, so that the two never share a process.

A bench is compiled with a *stand-in* under the design's name: it records what happens at its inputs (the stimulus) and
drives its outputs from a file (the responses). A design is compiled with a *player*: it drives the design's inputs from
the stimulus and records its responses. A *recorder* is a stand-in whose outputs come from the reference; it makes the
first stimulus.

```
stimulus   "<time> <hop> <bits of all inputs>" …, then "stop <time>"
responses  "<stimulus line> <time> <hop> <bits of all outputs>" …, then "stop"
```

Times are in ticks of the bench's precision. Within one time step a simulator works in batches: first the active events,
then the nonblocking assignments that these schedule, and so on. `hop` says whether a line belongs to the batch after
that of the line before it (1) or to the same one (0), so that a flip-flop on the other side samples the same values as
it would in one simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gemma4_tpu.evals.verilog.interface import BenchPort, Interface

STIMULUS, RESPONSES, SEEN = "stimulus.txt", "responses.txt", "seen.txt"
END = "stop\n"
"""Last line of the responses."""
CAPPED = "limit"
"""Last line but one of `SEEN` if the stand-in ended a bench that would not end."""


def _joined(ports: Sequence[BenchPort]) -> str:
    """A concatenation that can be assigned and read."""
    return f"{{{', '.join(port.name for port in ports)}}}"


def _changes(ports: Sequence[BenchPort]) -> str:
    """Waits for a change of any of the ports; forever if there are none."""
    return f"@({', '.join(port.name for port in ports) or 'judge_never'})"


def _bits(ports: Sequence[BenchPort]) -> int:
    return max(1, sum(port.width for port in ports))


def _value(ports: Sequence[BenchPort]) -> str:
    return _joined(ports) if ports else "1'b0"


def _edges(ports: Sequence[BenchPort]) -> str:
    """Whether a one-bit port has an edge between `judge_last` and `judge_now`; from X to Z there is none."""
    terms, mask, position = [], 0, sum(port.width for port in ports)
    for port in ports:
        position -= port.width
        if port.width == 1:
            now, last = f"judge_now[{position}]", f"judge_last[{position}]"
            terms.append(f"(^{now} !== 1'bx || ^{last} !== 1'bx) && {now} !== {last}")
            mask |= 1 << position
    any_of_them = " || ".join(f"({term})" for term in terms) or "0"
    changed = "(judge_now ^ judge_last)"  # sufficient if no bit is unknown
    return f"^{changed} === 1'bx ? {any_of_them} : |({changed} & {_bits(ports)}'h{mask:x})"


def _assign(ports: Sequence[BenchPort], operator: str) -> str:
    return f"{_joined(ports)} {operator} judge_bits;" if ports else ""


def _head(interface: Interface, top: str, output: str) -> str:
    parameters = ", ".join(f"parameter {name} = 0" for name in interface.parameters)
    ports = ", ".join(
        f"{f'output {output}' if port.output else 'input wire'} {port.range} {port.name}" for port in interface.ports
    )
    return f"{interface.timescale}module {top} {f'#({parameters}) ' if parameters else ''}({ports});"


def _watch(interface: Interface) -> str:
    """Records the stimulus. Its first line has the inputs before any change that a waiting block would see.

    Benches with races depend on the order in which blocks wake. So these blocks have the form of a design's, and wait
    for the same edges. The block that waits for the edge of a one-bit input records its change.
    """
    inputs = interface.inputs
    look = f"judge_now = {_value(inputs)};"
    write = """judge_time = $time;
        $fwrite(judge_seen, "%0h %0h %b\\n", judge_time, {hop}, judge_last);
        judge_line = judge_line + 1;
        judge_then = judge_time;
        judge_tick = judge_tick + 1;
        judge_settled <= judge_tick;"""
    note = f"""begin
        judge_last = judge_now;
        {write.format(hop="judge_then == judge_time && judge_settled == judge_tick")}
      end"""
    edges = [
        f"  always @({edge} {port.name}) begin {look} if (judge_now !== judge_last && judge_line >= 0) {note} end"
        for port in inputs
        if port.width == 1
        for edge in ("posedge", "negedge")
    ]
    moved = [
        f"  always @({port.name}) begin judge_moved[{number}] = 1; @(judge_never); end"
        for number, port in enumerate(inputs)
    ]
    before = ", ".join(f"judge_moved[{number}] ? {port.width}'bx : {port.name}" for number, port in enumerate(inputs))
    return f"""
  integer judge_seen = $fopen("{SEEN}", "w");
  integer judge_line = -1, judge_tick = 0, judge_settled = -1;
  reg [63:0] judge_then = 0, judge_time;
  reg [{_bits(inputs) - 1}:0] judge_last, judge_now;
  reg [{max(len(inputs), 1) - 1}:0] judge_moved = 0;
  event judge_never;
{chr(10).join(moved)}
  initial begin
    #0;
    judge_last = {f"{{{before}}}" if inputs else "1'b0"};
    {write.format(hop="0")}
    {look}
    if (judge_now !== judge_last) {note}
  end
  always {_changes(inputs)} begin
    {look}
    if (judge_now !== judge_last && judge_line >= 0)
      if (!({_edges(inputs)})) {note}
  end
{chr(10).join(edges)}
  final $fwrite(judge_seen, "stop %0h\\n", $time);
"""


def recorder(interface: Interface, top: str, reference: str) -> str:
    """A module `top` that passes everything on to the module `reference` and writes `SEEN`."""
    connections = ", ".join(f".{port.name}({port.name})" for port in interface.ports)
    inside = f"  {reference} {_overriding(interface)} judge_reference ({connections});"
    return f"{_head(interface, top, 'wire')}{_watch(interface)}{inside}\nendmodule\n"


def observer(interface: Interface, top: str, last_tick: int) -> str:
    """A module `top` that drives nothing, not even its outputs, and writes the values of all ports to `SEEN`."""
    everything = replace(interface, ports=tuple(replace(port, output=False) for port in interface.ports))
    cap = f"  always @(judge_line) if ($time > {last_tick}) $finish;\n"
    return f"{_head(everything, top, 'wire')}{_watch(everything)}{cap}endmodule\n"


def stimulus_of_observed(interface: Interface, observed: str) -> tuple[str, set[str]]:
    """(stimulus in an `observer`'s file, names of outputs that the bench drives)."""
    lines: list[str] = []
    driven: set[str] = set()
    for line in observed.splitlines():
        *when, bits = line.split(" ")
        inputs, position = "", 0
        for port in interface.ports if len(when) == 2 else ():
            value = bits[position : position + port.width]
            position += port.width
            if not port.output:
                inputs += value
            elif lines and value.strip("z"):  # the first line dates from before anything was driven
                driven.add(port.name)
        lines.append(" ".join([*when, inputs or "0"]) if len(when) == 2 else line)
    return "".join(f"{line}\n" for line in lines), driven


def _overriding(interface: Interface) -> str:
    values = [f".{name}({len(bits)}'b{bits})" for name, bits in interface.parameters.items() if bits]
    return f"#({', '.join(values)})" if values else ""


def stand_in(interface: Interface, top: str, last_tick: int) -> str:
    """A module `top` whose outputs follow `RESPONSES`. It writes `SEEN` and ends the bench after `last_tick`."""
    outputs = interface.outputs
    return f"""{_head(interface, top, "reg")}{_watch(interface)}  integer judge_responses = $fopen("{RESPONSES}", "r");
  integer judge_got = 4, judge_for = -1, judge_hop = 0, judge_answered = -1;
  reg [63:0] judge_at = 0, judge_clock = 0;  // asking for $time takes as long as a line of text
  reg [{_bits(outputs) - 1}:0] judge_bits;
  reg judge_hopping = 0, judge_sleeping = 0, judge_kick = 0;
  event judge_sleep;
  task judge_fetch;
    if (judge_got == 4)
      judge_got = $fscanf(judge_responses, "%h %h %h %b\\n", judge_for, judge_at, judge_hop, judge_bits);
  endtask
  task judge_respond;
    begin
      while (judge_got == 4 && !judge_hopping && judge_for <= judge_line && judge_at <= judge_clock) begin
        if (judge_hop) begin
          {_assign(outputs, "<=")}
          judge_hopping = 1;
          judge_kick <= ~judge_kick;
        end else begin
          {_assign(outputs, "=")}
        end
        judge_fetch;
      end
      if (judge_got == 4 && !judge_hopping && !judge_sleeping && judge_for <= judge_line) begin
        judge_sleeping = 1;
        -> judge_sleep;
      end
    end
  endtask
  initial begin
    judge_fetch;
    {_assign(outputs, "=")}
    judge_fetch;
    forever begin
      wait (judge_line != judge_answered);  // no event: one that comes meanwhile would be lost
      judge_answered = judge_line;
      judge_clock = judge_then;
      judge_respond;
      if (judge_clock > {last_tick}) begin  // here, since a process that waits would keep the simulation alive
        $fwrite(judge_seen, "{CAPPED}\\n");
        $finish;
      end
    end
  end
  always @(judge_kick) begin
    judge_hopping = 0;
    judge_respond;
  end
  always @(judge_sleep) begin
    #(judge_at - $time);
    judge_sleeping = 0;
    judge_clock = $time;
    judge_respond;
  end
endmodule
"""


def player(interface: Interface, top: str, name: str, first: str) -> str:
    """A root module `name` that plays `STIMULUS` to the module `top` and writes `RESPONSES`.

    `first`: the bits of the stimulus's first line, which are the inputs before anything happens.
    """
    inputs, outputs = interface.inputs, interface.outputs
    declared, position = [], 0
    for port in inputs:
        declared.append(f"  reg {port.range} {port.name} = {port.width}'b{first[position : position + port.width]};")
        position += port.width
    declared += [f"  wire {port.range} {port.name};" for port in outputs]
    names = interface.named if interface.named is not None else [port.name for port in interface.ports]
    connections = ", ".join(name if interface.named is None else f".{name}({name})" for name in names)
    newline = "\n"
    return f"""{interface.timescale}module {name};
{newline.join([*interface.constants, *declared])}
  integer judge_line = 0, judge_known = 0, judge_tick = 0, judge_settled = -1;
  reg [63:0] judge_then = 0, judge_time;
  event judge_never;
{_play(inputs)}{_respond(outputs)}  {top} {interface.overrides} judge_design ({connections});
endmodule
`resetall
"""


def _play(inputs: Sequence[BenchPort]) -> str:
    """Drives the inputs line by line, and ends the simulation after the last one."""
    return f"""  integer judge_stimulus, judge_responses, judge_got, judge_hop;
  reg [63:0] judge_at, judge_now;
  reg [{_bits(inputs) - 1}:0] judge_bits;
  initial begin
    judge_stimulus = $fopen("{STIMULUS}", "r");
    judge_got = $fscanf(judge_stimulus, "%h %h %b\\n", judge_at, judge_hop, judge_bits);
    judge_got = $fscanf(judge_stimulus, "%h %h %b\\n", judge_at, judge_hop, judge_bits);
    #0;
    while (judge_got == 3) begin
      judge_now = $time;
      if (judge_at > judge_now || !judge_hop) begin
        if (judge_at > judge_now) #(judge_at - judge_now);
        else #0;
        judge_line = judge_line + 1;
        {_assign(inputs, "=")}
      end else begin
        judge_line <= judge_line + 1;
        {_assign(inputs, "<=")}
        @(judge_line);
      end
      judge_note;
      judge_got = $fscanf(judge_stimulus, "%h %h %b\\n", judge_at, judge_hop, judge_bits);
    end
    judge_got = $fscanf(judge_stimulus, "stop %h\\n", judge_at);
    if (judge_got == 1 && judge_at > $time) #(judge_at - $time);
    #1 $fwrite(judge_responses, "stop\\n");
    $finish(0);
  end
"""


def _respond(outputs: Sequence[BenchPort]) -> str:
    """Records the outputs' changes, each with its line of the stimulus."""
    return f"""  reg [{_bits(outputs) - 1}:0] judge_last;
  task judge_note;
    if (judge_known != judge_line) begin
      judge_known = judge_line;
      judge_then = $time;
      judge_tick = judge_tick + 1;
      judge_settled <= judge_tick;
    end
  endtask
  initial begin
    judge_responses = $fopen("{RESPONSES}", "w");
    judge_last = {_value(outputs)};
    $fwrite(judge_responses, "0 0 0 %b\\n", judge_last);
    forever begin
      {_changes(outputs)};
      judge_note;
      if ({_value(outputs)} !== judge_last) begin
        judge_last = {_value(outputs)};
        judge_time = $time;
        $fwrite(judge_responses, "%0h %0h %0h %b\\n", judge_line, judge_time,
                judge_then != judge_time || judge_settled == judge_tick, judge_last);
        judge_then = judge_time;
        judge_tick = judge_tick + 1;
        judge_settled <= judge_tick;
      end
    end
  end
"""
