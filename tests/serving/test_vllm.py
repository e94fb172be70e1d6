"""A real vLLM on this CPU (`make vllm`): from a training to a server's answers, and the flags of every recipe."""

import json
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from gemma4_tpu import bench, evaluate, merge, serve, train
from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.benching import latencies
from gemma4_tpu.benching.client import TimedAnswer
from gemma4_tpu.config.conf import groups_of
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.export.quantise import parts_of
from gemma4_tpu.export.quantised_parity import dequantised
from gemma4_tpu.export.schemes import SCHEMES
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.serving.flag_checks import NO_REMOTE_CODE
from tests.export.runs import make_run
from tests.models.checkpoints import hf_logits
from tests.ports import free_port
from tests.processes import wait_for
from tests.serving.test_checks import recipe_words
from tests.serving.wide import WIDE, make_wide

ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".venv-vllm" / "bin" / "vllm"
ANSWERS = r"the server answers (\d) of (\d) stored prompts? like the merged model, (\d) like the base"
NOT_THERE = "vLLM's CPU build is not installed: make vllm"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (VLLM.parents[1] / ".installed").exists(), reason=NOT_THERE)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base that vLLM's CPU build serves, in the place of `model=tiny`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", WIDE)
        yield make_wide(tmp_path_factory.mktemp("wide") / "base")


@pytest.fixture(scope="module")
def run(wide, tmp_path_factory):
    """A short training on it, merged."""
    folder = tmp_path_factory.mktemp("run") / "tuned"
    words = ["trainer.max_updates=20", "data.max_rows=400", "lora.rank=8"]
    assert train.main([f"model.path={wide}", f"run_dir={folder}", *words]) == 0
    assert merge.main([f"run={folder}"]) == 0
    return folder


@pytest.fixture
def runs(wide, tmp_path):
    """Two runs with random adapters, merged and not; one has modules of another rank."""
    loras = {
        "first": LoraConfig(rank=8, alpha=8.0),
        "second": LoraConfig(rank=12, alpha=6.0, ranks={"self_attn.o_proj": 20}),
    }
    for seed, (name, lora) in enumerate(loras.items()):
        make_run(tmp_path / name, wide, lora=lora, seed=seed, size=0.02)
        assert merge.main([f"run={tmp_path / name}", "export=both"]) == 0
    return {name: tmp_path / name for name in loras}


@pytest.fixture
def served(tmp_path):
    """Starts a server by the launcher; returns its URL. It is stopped by SIGTERM, and nothing of it may be left."""
    started = []

    def start(*words):
        port = free_port()
        command = [sys.executable, "-m", "gemma4_tpu.serve", "serving=vllm_cpu", f"serving.executable={VLLM}", *words]
        command += [f"serving.port={port}", f"run_dir={tmp_path / 'record'}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        started.append(server)
        for line in server.stdout:
            if line.startswith("endpoint: "):
                return line.split()[1]
        raise AssertionError(server.stderr.read())

    yield start
    for server in started:
        below = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        shared = {path for child in below for path in _mapped(child) if path.startswith("/dev/shm/")}
        server.send_signal(signal.SIGTERM)
        _, told = server.communicate(timeout=180)
        assert server.returncode == 0, told
        assert below and shared
        wait_for(partial(_gone, below, shared))  # what was killed ends a moment later


def _mapped(process):
    """The files in its memory; of one that has ended meanwhile, none."""
    try:
        return [place.path for place in process.memory_maps()]
    except psutil.NoSuchProcess:
        return []


def _gone(processes, paths):
    return not any(map(_runs, processes)) and not any(Path(path).exists() for path in paths)


def _runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # one that nobody has waited for yet
    except psutil.NoSuchProcess:
        return False


def test_the_whole_way(wide, run, served, tmp_path):
    endpoint = served(f"run={run}")
    record = tmp_path / "record"
    words = ["bench=vllm", "bench.lengths=[[64,32]]", "bench.rates=[4]", "bench.requests=40", f"bench.slo={SLO}"]
    assert bench.main([f"served={record}", f"run_dir={tmp_path / 'bench'}", *words]) == 0
    ours, theirs = (
        json.loads((tmp_path / "bench" / folder / "in64_out32_rate4.json").read_text())
        for folder in ("cells", "cross_check")
    )
    (compared,) = json.loads((tmp_path / "bench/cross_check/comparison.json").read_text())["cells"].values()
    assert compared["state"] == "ok" and {len(f["rounds"]["ours"]) for f in compared["figures"].values()} == {3}
    # Both send their last request after the same time, so what they take differs by no more than the last answers do.
    last = max(found["p99_e2el_ms"] for found in (ours, theirs)) / 1000 / min(ours["duration"], theirs["duration"])
    for what in ("request", "output", "total_token"):
        assert compared["figures"][f"{what}_throughput"]["ratio"] == pytest.approx(1, abs=last), compared
    for found in (ours, theirs):
        assert (found["state"], found["completed"], found["total_output_tokens"]) == ("ok", 40, 40 * 32)
    for key, value in _as_vllm_defines(ours).items():
        if key == "max_output_tokens_per_s":  # vLLM's client takes chunks for tokens; a time is rounded to 1 µs
            assert _chunks_in_the_best_second(ours) == pytest.approx(value, abs=2)
        else:
            assert ours[key] == pytest.approx(value, rel=1e-3), key
    words = [f"eval.endpoint={endpoint}", "eval.max_problems=4", f"run_dir={tmp_path / 'evaluation'}"]
    assert evaluate.main(words) == 0
    assert json.loads((tmp_path / "evaluation/result.json").read_text())["status"] == "finished"
    words = ["objective=distill_offline", f"objective.teacher={endpoint}", "objective.teacher_top=8", "lora.rank=8"]
    words += [f"objective.teacher_store={tmp_path / 'told'}", "data.max_rows=40", "trainer.max_updates=4"]
    assert train.main([f"model.path={wide}", f"run_dir={tmp_path / 'taught'}", *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "taught/metrics.jsonl").read_text().splitlines()]
    heldout = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    assert heldout[-1] < heldout[0]  # towards the server's model


def test_int8_answers_nearly_as_the_merged_model(run, served, tmp_path):
    """What the export measures is of weights alone; vLLM's kernels quantise the activations as well."""
    assert merge.main([f"run={run}", "export=int8", "name=records"]) == 0
    (record,) = (run / "records").iterdir()
    logits = json.loads((record / "quantised.json").read_text())["logits"]
    assert 0 < logits["mean_logprob_difference"] < 0.1 and logits["top1_agreement"] > 0.9
    tokens = np.random.default_rng(0).integers(3, 512, 60).tolist()
    expected = _expected_logprobs(run / "merged", tokens)
    endpoint = served(f"run={run / 'int8'}")
    told = (tmp_path / "record" / "log.txt").read_text()
    as_merged, prompts, as_base = map(int, re.search(ANSWERS, told).groups())
    assert as_merged > prompts / 2 and as_base == 0, told  # one can fall between two tokens, and then on either
    off = np.abs(_prompt_logprobs(endpoint, "tuned-int8", tokens) - expected)
    exact = re.search(r"vnni|amx_int8", Path("/proc/cpuinfo").read_text())  # else oneDNN's products saturate in 16 bits
    assert off.mean() > 0 and (off.mean() < 0.1 or not exact), off


def test_transformers_reads_quantised_weights_as_the_record_does(run):
    """Weight-only, that is all there is to it, so the record tells how far such a model is from the merged one."""
    tokens = np.random.default_rng(0).integers(3, 512, 60).tolist()
    expected = _expected_logprobs(run / "merged", tokens)
    far = {"int8": 0.1, "int8_weight_only": 0.1, "fp8_weight_only": 0.5}  # mean |Δ log p|; fp8 rounds 4 times as far
    for name in far:
        assert merge.main([f"run={run}", f"export={name}", "verify=stream"]) == 0
    found = _loaded_by_transformers([run / name for name in far], tokens)
    merged = Checkpoint(str(run / "merged"))
    parts = parts_of(WIDE, "model.")[ROW_OF]
    for (name, limit), (logprobs, row) in zip(far.items(), found, strict=True):
        assert np.abs(logprobs - expected).mean() < limit, name
        written = dequantised(str(run / name), merged, WIDE, "model.", SCHEMES[name])
        np.testing.assert_allclose(row, written.rows(parts[0], 0, 1)[0], rtol=1e-6, err_msg=name)


ROW_OF = "model.layers.0.mlp.gate_proj.weight"
_LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor([json.loads(sys.argv[1])])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    with torch.no_grad():
        logprobs = model(tokens).logits[0].double().log_softmax(-1)
    own = logprobs[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    print("found:", json.dumps([own.tolist(), model.model.layers[0].mlp.gate_proj.weight[0].tolist()]))
"""


def _loaded_by_transformers(folders, tokens):
    """By the transformers of vLLM's environment, which has compressed-tensors: log-probabilities, a row of a matrix."""
    command = [VLLM.parent / "python", "-c", _LOAD, json.dumps(tokens), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        [np.array(values) for values in json.loads(line.removeprefix("found: "))]
        for line in done.stdout.splitlines() if line.startswith("found: ")
    ]  # fmt: skip


def test_adapters_are_told_apart_and_answer_as_their_merged_models(runs, served, tmp_path):
    update = "serving.env={VLLM_ALLOW_RUNTIME_LORA_UPDATING: 1, VLLM_CPU_KVCACHE_SPACE: 1}"
    endpoint = served(f"adapters=[{','.join(map(str, runs.values()))}]", update)
    log = (tmp_path / "record" / "log.txt").read_text()
    tokens = np.random.default_rng(0).integers(3, 512, 60).tolist()
    of_base = _prompt_logprobs(endpoint, "base", tokens)
    for name, folder in runs.items():
        assert re.search(rf"{name}: the server answers (\d) of \1 stored prompts? like the merged model", log), log
        expected = _expected_logprobs(folder / "merged", tokens)
        assert np.abs(expected - of_base).max() > 0.1
        np.testing.assert_allclose(_prompt_logprobs(endpoint, name, tokens), expected, atol=2e-3, err_msg=name)
    # Without adapter_copies.py, V of global layers is the base's.
    as_it_is = {"lora_name": "as it is", "lora_path": str(runs["second"] / "adapter")}
    httpx.post(f"{endpoint}/load_lora_adapter", json=as_it_is, timeout=120).raise_for_status()
    assert np.abs(_prompt_logprobs(endpoint, "as it is", tokens) - expected).max() > 0.02
    words = [f"eval.endpoint={endpoint}", "eval.endpoint_model=second", "eval.max_problems=1"]
    assert evaluate.main([*words, f"run_dir={tmp_path / 'evaluation'}"]) == 0


def _prompt_logprobs(endpoint, name, tokens):
    """[T - 1]: of each token of a prompt but the first."""
    body = {"model": name, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = httpx.post(f"{endpoint}/completions", json=body, timeout=120).raise_for_status().json()
    found = answer["choices"][0]["prompt_logprobs"][1:]
    return np.array([here[str(token)]["logprob"] for here, token in zip(found, tokens[1:], strict=True)])


def _expected_logprobs(folder, tokens):
    """The same by transformers, in float32."""
    logits = hf_logits(folder, np.array([tokens]))[0].astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    logprobs = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    return logprobs[np.arange(len(tokens) - 1), tokens[1:]]


SLO = "tpot_p50<8ms"
_DEFINITIONS = """
import json, sys
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.benchmarks.serve import calculate_metrics
cell = json.load(sys.stdin)
each = zip(*(cell[key] for key in ("input_lens", "output_lens", "ttfts", "itls", "start_times")))
outputs = [
    RequestFuncOutput(
        success=True, prompt_len=prompt, output_tokens=answer, start_time=at, ttft=ttft, itl=itl,
        latency=ttft + sum(itl),
    )
    for prompt, answer, ttft, itl, at in each
]
found, _ = calculate_metrics([], outputs, cell["duration"], None, [99], {"tpot": 8})
print("found:", json.dumps(vars(found)))
"""


def _as_vllm_defines(cell):
    """The figures of a cell's requests as vLLM's own client works them out."""
    done = subprocess.run(
        [VLLM.parent / "python", "-c", _DEFINITIONS], input=json.dumps(cell), capture_output=True, text=True, check=True
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("found: "))
    found = json.loads(line.removeprefix("found: "))
    for name in ("ttft", "tpot", "itl", "e2el"):
        ((_, found[f"p99_{name}_ms"]),) = found.pop(f"percentiles_{name}_ms")
    same = {key: value for key, value in found.items() if key in cell and key != "max_concurrent_requests"}
    assert len(same) == 2 + 4 + 16 + 1  # counts, throughputs, four statistics of four latencies, the best second
    return same


def _chunks_in_the_best_second(cell):
    """Our own figure, if each chunk were one token."""
    answers = [
        TimedAnswer(prompt, at, at, at + ttft, at + ttft + sum(gaps), gaps, output_tokens=1 + len(gaps))
        for prompt, at, ttft, gaps in zip(
            *(cell[key] for key in ("input_lens", "start_times", "ttfts", "itls")), strict=True
        )
    ]
    return latencies.summary(answers, cell["duration"], 1, "")["max_output_tokens_per_s"]


_PARSE = """
import json, sys
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser
(command,) = cmd_init()
parser = FlexibleArgumentParser()
command.subparser_init(parser.add_subparsers(dest="subparser"))
for words in json.load(sys.stdin):
    args = parser.parse_args(words)
    command.validate(args)
    lora = [[module.name, module.path] for module in args.lora_modules or []]
    told = [args.model_tag, args.max_model_len, args.reasoning_parser, lora, args.trust_remote_code]
    print("parsed:", json.dumps(told))
"""


def test_vllms_parser_takes_every_recipe(merged, adapted, port, capsys):
    """Its real parser, by the version that the recipes name."""
    commands, common = [], [f"serving.port={port}", "dry_run=true"]
    for option in groups_of(serve.SERVE)["serving"]:
        if option == "local":
            continue
        place = f"{option}/model"
        given = recipe_words(option, lambda *size, place=place, **more: merged(*size, folder=place, **more))
        commands += [[*given, *common]]
    commands += [["serving=h100x2", f"adapters=[{adapted('x/0')},{adapted('y/0', r=20)}]", *common]]
    for number, words in enumerate(commands):
        assert serve.main(words) == 0
        told = shlex.split(capsys.readouterr().out.replace("\\\n", " "), comments=True)
        commands[number] = told[told.index("serve") :]
    parsed = _parsed(commands)
    assert len(parsed) == len(commands)
    assert {reasoning for _, _, reasoning, _, _ in parsed} == {"gemma4"}
    assert parsed[-1] == ["/model", 16384, "gemma4", [["x/0", "/adapters/0"], ["y/0", "/adapters/1"]], False]


def _parsed(commands):
    """What vLLM's parser makes of the words after `vllm`."""
    parser = [VLLM.parent / "python", "-c", _PARSE]
    done = subprocess.run(parser, input=json.dumps(commands), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("parsed: ")]


def test_the_last_word_keeps_vllm_from_running_code_of_a_checkpoint(tmp_path):
    """Also where the checks would let the others pass."""
    (tmp_path / "flags.yaml").write_text("trust-remote-code: true\n")
    ways = [
        ["--trust-remote-code"],
        ["--trust_remote_code"],
        ["--trust-rem"],
        ["--config", str(tmp_path / "flags.yaml")],
    ]
    trusted = _parsed([["serve", "/model", *way, *last] for last in ([], [NO_REMOTE_CODE]) for way in ways])
    assert [told[-1] for told in trusted] == [True] * 4 + [False] * 4


def test_the_name_that_the_makefile_gives_is_still_asked_for():
    """Else the line that makes it can go."""
    asked = next(VLLM.parents[1].glob("lib/python*/site-packages/vllm/entrypoints/cli/main.py")).read_text()
    assert 'importlib.metadata.version("vllm")' in asked
