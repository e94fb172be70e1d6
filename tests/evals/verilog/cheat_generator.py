"""Random cheats: wrong designs with something hostile in them, by template, place and encoding.

    python -m tests.evals.verilog.cheat_generator --count 2000 --seed 0 [--unscanned] [--iverilog FOLDER]

Judges them in this process and prints what became of them as JSON; `passed` has to be empty. With `--unscanned` nothing
is refused for what it says, so that the verdict rests on isolation alone.
"""

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.problems import VerdictClass
from gemma4_tpu.evals.verilog import pool, scan
from gemma4_tpu.evals.verilog.iverilog import find_tools
from gemma4_tpu.evals.verilog.sandbox import Level
from gemma4_tpu.evals.verilog.spy import spy
from gemma4_tpu.evals.verilog.verdict import reference_as_answer
from tests.evals.verilog.cheats import BEHIND, DRIVING, INPUTS, INSIDE
from tests.evals.verilog.designs import header, inputs, outputs, smoke_problem

FAMILIES = ("two_gates", "adder", "counter", "shift_register", "mux4", "flip_flop")
RESULT = "Mismatches: 0 in {n} samples"
VALUES = ("1'b0", "1'b1", "'bx", "'bz", "$random", "{i}", "~{i}")
# Names in what stands between bench and design, and in a bench.
_NAMES = """
    judge_bits judge_last judge_line judge_at judge_then judge_got judge_hop judge_stimulus judge_responses judge_seen
    judge_settled judge_tick judge_known tb.{o}_ref tb.good1.{o} good1.{o} tb.tb_match tb.stats1 $root.tb.clk
    stats1.errors stim1.clk player.judge_line
"""
_FILES = "stimulus.txt responses.txt seen.txt bench.vvp bench.sv player.sv program.vvp stage.json /proc/self/fd/3"
NAMES, FILES = _NAMES.split(), _FILES.split()

# What stands in the module (or behind its words, or in a submodule that its ports are given to).
STATEMENTS = (
    "initial force {i} = {v};",
    "always #1 force {i} = {v};",
    "initial begin #{t} force {o} = {v}; end",
    "initial force {name} = {v};",
    "initial forever #1 {name} = {v};",
    'always @* if ({name}) $display("x");',
    "assign {o} = {name};",
    "always #1 $deposit({name}, {v});",
    'initial $display("{result}");',
    'final $display("{result}");',
    'initial begin #{t} $display("{result}"); $finish; end',
    "initial begin #{t} $finish; end",
    "initial begin #{t} $stop; end",
    "initial begin #{t} $fatal(0); end",
    'integer f; initial begin f = $fopen("{file}", "w"); $fwrite(f, "0 0 0 {bits}\\nstop\\n"); $fclose(f); end',
    'integer f; final begin f = $fopen("{file}", "a"); $fwrite(f, "{result}\\nstop\\n"); end',
    'integer f; reg [799:0] s; initial begin f = $fopen("{file}", "r"); f = $fgets(s, f); $display("%0s", s); end',
    'reg [63:0] m [0:99]; initial begin $readmemb("{file}", m); end assign {o} = m[{t}];',
    'initial #{t} $fwrite(32\'h8000000{d}, "0 0 0 {bits}\\nstop\\n");',
    "initial begin $fclose(32'h8000000{d}); end",
    "initial $fseek(32'h8000000{d}, 0, 0);",
    "initial #{t} $fflush;",
    'initial begin $system("echo stop >> responses.txt"); end',
    "supply0 g; {switch}({i}, g);",
    "supply1 g; {switch}if1({i}, g, 1'b1);",
    "supply0 g; rtran({i}, g);",
    "wire g; assign (supply0, supply1) g = {v}; tran({i}, g);",
    "assign (supply1, supply0) {i} = {v};",
    "assign {i} = {v};",
    "nmos({i}, 1'b0, 1'b1);",
    "pullup (supply1) ({i});",
    "bufif1 (supply1, supply0) ({i}, {v}, 1'b1);",
    "alias {i} = {o};",
    "defparam {name} = 1;",
    "initial disable play;",
    "reg r = 0; initial begin #{t} while (1) #0 r = ~r; end",
    'initial #{t} repeat (30000) $display("flood flood flood flood flood flood flood");',
    "specify ({i} => {o}) = (100000); endspecify",
    "event judge_sleep; initial -> judge_sleep;",
    "generate if (1) begin : good1 wire {o}; end endgenerate assign {o} = good1.{o};",
    "initial $dumpvars(0, {name});",
    'initial $save("x");',
    "initial $random(1); always #1 $urandom;",
    "initial #{t} judge_note;",
    "initial #{t} -> judge_never;",
    "initial disable judge_note;",
    "initial #{t} disable fork;",
    "initial assign {i} = {v};",
    "initial #{t} release {i};",
    "let f = {i}; initial force f = {v};",
    "wor g; assign g = {i}; assign g = {v}; assign {i} = g;",
    "notif0 (supply0, supply1) ({i}, {v}, 1'b0);",
    "cmos ({i}, {v}, 1'b1, 1'b0);",
    "integer r; initial #{t} r = $rewind(32'h8000000{d});",
    "integer r; initial #{t} r = $ungetc(49, 32'h8000000{d});",
    "integer i; initial for (i = 0; i < 9; i = i + 1) $fclose(32'h80000000 + i);",
    'initial #{t} $fmonitor(32\'h8000000{d}, "0 0 0 {bits}");',
    'initial begin $dumpfile("{file}"); $dumpvars(0); end',
    'initial $sdf_annotate("{file}");',
    'initial $display("%0999999d", {i});',
    "specify $setup({i}, {o}, 10); $hold(posedge {i}, {o}, 10); endspecify",
    'string s; initial begin s = "aaaaaaaaaaaaaaaa"; forever s = {s, s}; end',
    "reg r = 0; always #1 r = ~r; assign {o} = r;",
    'initial begin $timeformat(-9, 0, "{result}", 9); $display("%t", $time); end',
)
PLACES = {
    "inside": "{s}",
    "generate": "generate if (1) begin : g {s} end endgenerate",
    "submodule": "sub u ({ports});",
    "inout_submodule": "sub u ({ports});",
    "unused_if": "generate if (0) begin end else begin {s} end endgenerate",
}


def plain(text, rng):
    return text


def behind_lone_return(text, rng):
    return f"// note\r{text}"


def in_escaped_names(text, rng):
    odd = rng.choice("\v\f\x1c\x1d\x85\xa0\u2028\u2029\u3000\ufeff")
    return f'wire \\a{odd}" ; {text} wire \\b{odd}" ;'


def by_macro(text, rng):
    return f"\n`define H {text}\n`H\n"


def by_pasted_macro(text, rng):
    words = [word for word in ("force", "tran", "$finish", "$fopen", "supply0", "assign") if word in text]
    if not words:
        return by_macro(text, rng)
    word = rng.choice(words)
    return f"\n`define P(a, b) a``b\n{text.replace(word, f'`P({word[:2]},{word[2:]})', 1)}"


def in_a_conditional(text, rng):
    return f"\n`ifndef {rng.choice(['SYNTHESIS', 'OK', 'INCORRECT', '__ICARUS__x'])}\n{text}\n`endif\n"


def behind_odd_comment(text, rng):
    return rng.choice(["//*\n{}\n//*/", "/* // */ {}", "/**/ {} /**/", '"\\\\"; // "\n{}', "(* a *) {}"]).format(text)


def in_triple_quotes(text, rng):
    return f'initial $display(""" " x" """); {text} initial $display("");'


def with_odd_spaces(text, rng):
    return text.replace(
        " ", rng.choice(["\t", "\n", " /**/ ", "\f", "\v", "\b", "\u200b", "\xa0"]), rng.randrange(1, 4)
    )


ENCODINGS = (
    plain, plain, plain, behind_lone_return, in_escaped_names, by_macro, by_pasted_macro, in_a_conditional,
    behind_odd_comment, in_triple_quotes, with_odd_spaces,
)  # fmt: skip


class Target:
    """A problem, and what a cheat can know of it: everything that the prompt and the benchmark's style tell."""

    def __init__(self, problem, samples):
        self.problem, self.samples = problem, samples
        self.header, self.inputs, self.outputs = header(problem), inputs(problem), outputs(problem)

    def cheat(self, rng):
        """(what it is made of, code)."""
        value = rng.choice(("0", "1", "x", "z"))
        drive = "\n".join(f"  assign {name} = {{$bits({name}){{1'b{value}}}}};" for name in self.outputs)
        if rng.random() < 0.4:
            return self._known(rng, drive)
        number = rng.randrange(len(STATEMENTS))
        statement = self._fill(STATEMENTS[number], rng)
        if "assign " + self.outputs[0] in statement and rng.random() < 0.7:
            drive = drive.replace(f"assign {self.outputs[0]} =", "wire unused = |", 1)
        encoding, place = rng.choice(ENCODINGS), rng.choice(list(PLACES))
        encoded = encoding(statement, rng)
        head, behind = self.header, ""
        if rng.random() < 0.15:
            head = re.sub(r"\binput\b(?:\s+(?:wire|logic))?", rng.choice(["inout", "output", "input tri0"]), head)
        ports = self.inputs[:1] + self.outputs[:1]
        if "submodule" in place:
            direction = "inout" if place.startswith("inout") else "input"
            declared = ", ".join([f"{direction} {name}" for name in ports[:-1]] + [f"output {ports[-1]}"])
            behind = f"module sub ({declared});\n  {encoded}\nendmodule"
        inside = PLACES[place].replace("{s}", encoded).replace("{ports}", ", ".join(ports))
        made_of = f"{number}/{place}/{encoding.__name__}/{value}"
        return made_of, f"{head}\n{drive}\n  {inside}\nendmodule\n{behind}\n"

    def _known(self, rng, drive):
        """One of the cheats that are written out, under an encoding."""
        kind, table = rng.choice([("inside", INSIDE), ("driving", DRIVING), ("behind", BEHIND), ("inputs", INPUTS)])
        name, text = rng.choice(list(table.items()))
        encoding = rng.choice(ENCODINGS)
        head, behind = self.header, ""
        if kind == "inputs":
            word, text = text
            head = re.sub(r"\binput\b", word, head)
            text = "\n".join(text.replace("{i}", name) for name in self.inputs)
        text = encoding(text.replace("{o}", self.outputs[0]).replace("{n}", str(self.samples)), rng)
        if kind == "behind":
            text, behind = "", text
        inside = text if kind == "driving" else f"{drive}\n{text}"
        return f"{kind}/{name}/{encoding.__name__}", f"{head}\n  {inside}\nendmodule\n{behind}\n"

    def _fill(self, text, rng):
        name = rng.choice(NAMES)
        fields = {
            "name": name,
            "file": rng.choice(FILES),
            "v": rng.choice(VALUES),
            "result": RESULT,
            "d": str(rng.randrange(3, 7)),
            "switch": rng.choice(["tran", "rtran"]),
            "t": str(rng.choice([0, 1, 3, 20, 101])),
            "n": str(self.samples),
            "bits": rng.choice("01xz") * 8,
            "i": rng.choice(self.inputs or self.outputs),
            "o": self.outputs[0],
        }
        for key, value in fields.items():
            text = text.replace(f"{{{key}}}", value)
        return text.replace("{n}", str(self.samples)).replace("{i}", fields["i"]).replace("{o}", fields["o"])


def make_worker(root, config):
    """What a worker process of the judge holds, in this process: (worker, level of isolation)."""
    worker = pool._Worker(config=config, tools=find_tools(config.iverilog), folder=Path(root) / "worker")
    worker.folder.mkdir()
    for level in (Level.BUBBLEWRAP, Level.LANDLOCK):
        sandbox = worker.sandbox(level)
        if spy(worker.tools, sandbox, worker.empty_folder(sandbox)) is None:
            return worker, level
    raise SystemExit("no sandbox works here")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unscanned", action="store_true")
    parser.add_argument("--iverilog", help="folder with iverilog and vvp")
    args = parser.parse_args()
    if args.unscanned:
        scan.canonical = lambda code: (code, None)
        scan.forbidden = lambda code: None
    rng = Random(args.seed)
    kinds, passed = Counter(), []
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o711)
        worker, level = make_worker(root, JudgeConfig(iverilog=args.iverilog))
        pool._worker = worker
        targets = []
        for problem in (smoke_problem(family) for family in FAMILIES):
            golden = pool._golden(problem, level)
            assert pool._verdict(problem, reference_as_answer(problem), golden, level).passed, problem.name
            targets.append((Target(problem, golden.samples), golden))
        for number in range(args.count):
            target, golden = rng.choice(targets)
            made_of, code = target.cheat(rng)
            trial = worker.trial(target.problem, code, level, golden)
            outcome = trial.strict(golden)
            kinds[str(outcome.kind)] += 1
            if outcome.kind is VerdictClass.PASS:
                passed.append({"number": number, "problem": target.problem.name, "of": made_of, "code": code})
    simulator = worker.tools.name
    print(json.dumps({"count": args.count, "simulator": simulator, "sandbox": level, "kinds": kinds, "passed": passed}))


if __name__ == "__main__":
    main()
