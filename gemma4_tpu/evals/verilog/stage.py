"""A problem prepared for judging: its bench with a stand-in for the design, and the stimulus that the bench gives.

It is made once per problem and simulator, from trusted files only (bench and reference), and kept in the pool's folder.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma4_tpu.evals.problems import Problem, VerdictClass
from gemma4_tpu.evals.verilog import stand_ins
from gemma4_tpu.evals.verilog.interface import BenchPort, Interface
from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.running import Finished
from gemma4_tpu.evals.verilog.scan import blank, defined_modules, without_dumps

BENCH_SOURCE, BESIDE, PROGRAM = "bench.sv", "beside.sv", "program.vvp"
PLAYER, SETTINGS, BENCH_PROGRAM, ABOUT = "player.sv", "compiler.conf", "bench.vvp", "stage.json"
PATIENCE, PATIENCE_TICKS = 10, 10_000
"""A bench that waits for its design gets this multiple of the reference's simulated time, plus a little."""

UNKNOWN_TICKS = 10**8
"""The same if there is no reference."""

_ELABORATION = ("during elaboration", "Elaboration failed", "Code generation had", "root module")
_PARAMETERS = r"(#\s*\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)\s*)?"
_SCOPE = re.compile(r'^S_\w+ \.scope \w+, "([^"]+)" "([^"]+)" .*?(?=^S_|\Z)', re.MULTILINE | re.DOTALL)
_PORT = re.compile(r'\.port_info \d+ /(\w+) (\d+) "([^"]+)"')
_PARAMETER = re.compile(r'^P_\w+ \.param/\w+ "(\w+)".*? ([01]) \d+ \d+, (?:\+?C4<([01xz]+)>)?', re.MULTILINE)
_PRECISION = re.compile(r"^:vpi_time_precision ([+-]) (\d+);", re.MULTILINE)
_TIMESCALE = re.compile(r"`timescale\s+\w+\s*/\s*\w+")  # the bench decides the length of a tick, not the design


class NoStage(Exception):
    """The bench and its own reference can't be prepared here."""

    def __init__(self, reason: str, kind: VerdictClass = VerdictClass.NO_RESULT):
        """Args:
        reason: the reason, in one line.
        kind: class of the failure.
        """
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What judging needs to know about a problem. Bench, player, compiler settings and stimulus are in its folder."""

    folder: Path
    result_marker: str
    """The text that announces the result, with a nonce, because a bench can print values that the design drives."""
    player_top: str
    build_log: str
    """The compiler's output for the bench."""
    response_bits: int
    """Number of bits in the design's outputs."""
    unknown_bit_ticks: int
    """X and Z bits in the reference's own stimulus, times the ticks for which they last."""

    def result(self, problem: Problem, stdout: str) -> re.Match[str] | str:
        """The match of the only result line, or the reason why there is none."""
        pattern = re.compile(problem.result_pattern.replace("{marker}", re.escape(self.result_marker)))
        lines = [line.strip() for line in stdout.split("\n")]
        matches = [match for line in lines if (match := pattern.fullmatch(line))]
        if len(matches) == 1:
            return matches[0]
        return "more than one result line" if matches else "the bench printed no result"


def load(folder: Path) -> Stage:
    """Loads the stage that `build` made in a folder."""
    return Stage(folder=folder, **json.loads((folder / ABOUT).read_text()))


def build(problem: Problem, tools: Tools, run: Callable[..., Finished], folder: Path, design: str = "") -> None:
    """Writes a stage's files to `folder`. `run(command, writable=…)` runs a command there.

    If a problem has no reference, the ports are those of `design` (as measure `text` leaves it), which is compiled with
    the bench for that purpose but not run; the first stimulus is what the bench gives to a design that does nothing.

    Raises:
      NoStage: bench and reference don't build, or the bench can't be given a stand-in.
    """
    marker = f"{problem.result_marker}_{secrets.token_hex(8)}"
    bench = without_dumps(problem.testbench).replace(problem.result_marker, marker)
    inner = f"{problem.reference_top}_{secrets.token_hex(8)}"
    sources = {
        BENCH_SOURCE: "\n".join([bench, problem.reference if problem.bench_needs_reference else "", "`resetall\n"]),
        BESIDE: _private(problem.reference, problem.reference_top, problem.top) or _TIMESCALE.sub("", design),
    }
    _write(folder, {**sources, **problem.files})

    def compiled() -> Finished:
        done = run(tools.build(problem.bench_top, PROGRAM, [BENCH_SOURCE, BESIDE]), writable=[folder])
        if done.returncode:
            raise NoStage(_first_line(done), build_failure(done))
        return done

    compiled()
    interface = read_interface((folder / PROGRAM).read_text(encoding="utf-8"), problem)
    if problem.reference:
        beside = _private(problem.reference, problem.reference_top, inner) + "\n`resetall\n"
        _write(folder, {BESIDE: beside + stand_ins.recorder(interface, problem.top, inner)})
    else:
        _write(folder, {BESIDE: stand_ins.observer(interface, problem.top, UNKNOWN_TICKS)})
    compiled()
    stimulus, last = _seen(tools, run, folder)
    if not problem.reference:
        stimulus, driven = stand_ins.stimulus_of_observed(interface, stimulus)
        if driven:
            reason = f"the design declares {', '.join(sorted(driven))} as output, which the bench drives"
            raise NoStage(reason, VerdictClass.ELABORATION)
    last_tick = PATIENCE * last + PATIENCE_TICKS if problem.reference else UNKNOWN_TICKS
    _write(folder, {BESIDE: stand_ins.stand_in(interface, problem.top, last_tick)})
    log = compiled()
    player_top = f"player_{secrets.token_hex(8)}"
    first = stimulus.partition("\n")[0].rpartition(" ")[2]
    program = tools.lightened((folder / PROGRAM).read_text(encoding="utf-8", errors="surrogateescape"))
    (folder / BENCH_PROGRAM).write_text(program, encoding="utf-8", errors="surrogateescape")
    (folder / PROGRAM).unlink()
    about = {
        "result_marker": marker,
        "player_top": player_top,
        "build_log": log.stdout + log.stderr,
        "response_bits": interface.response_bits,
        "unknown_bit_ticks": unknown_bit_ticks(stimulus),
    }
    player = stand_ins.player(interface, problem.top, player_top, first)
    settings = tools.settings(player_top, PROGRAM)
    _write(folder, {PLAYER: player, SETTINGS: settings, stand_ins.STIMULUS: stimulus, ABOUT: json.dumps(about)})


def _seen(tools: Tools, run: Callable[..., Finished], folder: Path) -> tuple[str, int]:
    """(stimulus that the bench gives to the stand-in, tick of its end)."""
    seen = folder / stand_ins.SEEN
    seen.touch()
    seen.chmod(0o666)
    done = run(tools.simulate(PROGRAM), writable=[seen])
    text = seen.read_text()
    last = re.search(r"^stop ([0-9a-f]+)\n\Z", text, re.MULTILINE)
    if done.returncode or last is None:
        raise NoStage(f"the bench does not end by itself: {_first_line(done)}")
    return text, int(last[1], 16)


def unknown_bit_ticks(stimulus: str) -> int:
    """Sum over the lines of a stimulus: number of X and Z bits, times the ticks until the next line."""
    if "x" not in stimulus and "z" not in stimulus:
        return 0
    total, since, unknown = 0, 0, 0
    for line in stimulus.split("\n"):
        words = line.split(" ")
        if len(words) < 2:
            continue
        now = int(words[1 if len(words) == 2 else 0], 16)  # "stop <time>", "<time> <hop> <bits>"
        total += unknown * (now - since)
        since, unknown = now, words[-1].count("x") + words[-1].count("z")
    return total


def read_interface(program: str, problem: Problem) -> Interface:
    """How the bench in a compiled program instantiates the design.

    Raises:
      NoStage: it is not instantiated exactly once, or has ports that can't be replayed.
    """
    scopes = list(_SCOPE.finditer(program))
    mine = [scope for scope in scopes if scope[2] == problem.top]
    if len(mine) != 1:
        raise NoStage(f"the bench instantiates {problem.top} {len(mine)} times instead of once")
    ports = []
    for direction, width, name in _PORT.findall(mine[0][0]):
        if direction not in ("INPUT", "OUTPUT"):
            raise NoStage(f"the port {name} is {direction.lower()}, which can't be replayed")
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):  # it becomes part of the code that runs with the bench
            raise NoStage(f"the port {name!r} has an escaped name, which can't be replayed")
        ports.append(BenchPort(name=name, width=int(width), output=direction == "OUTPUT"))
    precision = _PRECISION.search(program)
    assert precision is not None  # every compiled program has one
    around = next((scope for scope in scopes if scope[1] == problem.bench_top), mine[0])
    overrides, named = _instantiation(problem)
    return Interface(
        ports=tuple(ports),
        parameters={name: bits for name, local, bits in _PARAMETER.findall(mine[0][0]) if local == "0"},
        overrides=overrides,
        constants=tuple(
            f"  localparam [{len(bits) - 1}:0] {name} = {len(bits)}'b{bits};"
            for name, _, bits in _PARAMETER.findall(around[0])
            if overrides and bits and name not in {port.name for port in ports}
        ),
        named=named if named is None or "*" not in named else tuple(port.name for port in ports),
        precision=int(precision[1] + precision[2]),
    )


def _instantiation(problem: Problem) -> tuple[str, tuple[str, ...] | None]:
    """(`#(…)`, names of the connected ports: `*` for all, None for connections by position)."""
    bare = blank(problem.testbench)[0]
    found = re.search(rf"\b{re.escape(problem.top)}\s+{_PARAMETERS}[A-Za-z_]\w*\s*\(\s*([^;]*)\)\s*;", bare)
    if found is None:
        raise NoStage(f"the text of the bench has no instance of {problem.top}")
    connected = found[2].lstrip()
    names = tuple(re.findall(r"\.\s*(\*|[A-Za-z_]\w*)", connected)) if connected.startswith(".") else None
    return found[1] or "", names


def _private(reference: str, old: str, new: str) -> str:
    """A copy of the reference whose modules don't clash with another copy's; its top module is named `new`."""
    for name in defined_modules(reference):
        replacement = new if name == old else f"{name}_{new}"
        reference = re.sub(rf"(?<![.\w$]){re.escape(name)}(?![\w$])", replacement, reference)
    return reference


def build_failure(done: Finished) -> VerdictClass:
    """Syntax or elaboration: the compiler names the latter if it fails there, unless it crashes."""
    text = done.stdout + done.stderr
    crashed = not 0 <= done.returncode <= 128 and "syntax error" not in text
    return VerdictClass.ELABORATION if crashed or any(said in text for said in _ELABORATION) else VerdictClass.SYNTAX


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", errors="replace")


def _first_line(done: Finished) -> str:
    lines: Sequence[str] = [line for line in (done.stderr + done.stdout).split("\n") if line.strip()]
    return lines[0].strip() if lines else f"exit code {done.returncode} and no output"
