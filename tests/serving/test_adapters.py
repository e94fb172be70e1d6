"""Adapters on one base: which are refused, what vLLM is told, and that each of them is asked who it is."""

import json
import shlex
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.load import load
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.serve import SERVE, main
from gemma4_tpu.serving.adapter_checks import ServedAdapter
from gemma4_tpu.serving.adapter_copies import copied
from gemma4_tpu.serving.memory import estimate
from tests.serving.conftest import MODULE
from tests.serving.test_server import result

GPU = ["serving=h100x2"]


def given(*runs):
    return f"adapters=[{','.join(map(str, runs))}]"


@pytest.fixture
def dry_run(port, capsys):
    def run(*words):
        assert main([f"serving.port={port}", "dry_run=true", *words]) == 0
        out = capsys.readouterr().out
        return out, shlex.split(out.replace("\\\n", " "), comments=True)

    return run


@pytest.fixture
def refused(port):
    def run(*words):
        with pytest.raises(UserError) as caught:
            load([f"serving.port={port}", *words], SERVE)
        return str(caught.value)

    return run


def test_the_base_gets_all_of_them_under_their_names(adapted, base, dry_run):
    one, other = adapted("sweep/0", r=12), adapted("sweep/1", r=4, rank_pattern={"self_attn.o_proj": 20})
    out, words = dry_run(given(one, other), *GPU)
    at = words.index("--lora-modules")
    modules = [{"name": "0", "path": "/adapters/0"}, {"name": "1", "path": "/adapters/1"}]
    assert list(map(json.loads, words[at + 1 : at + 3])) == modules
    assert words[words.index("--max-lora-rank") + 1] == "32"  # the least that vLLM takes for 20
    assert words[words.index("--max-loras") + 1] == "2" and "--enable-lora" in words
    assert words[words.index("--served-model-name") + 1] == "base"
    assert f"type=bind,source={one}/adapter,target=/adapters/0,readonly" in words
    assert f"type=bind,source={base},target=/model,readonly" in words
    assert "for 2 adapters of rank 32" in out
    _, words = dry_run(given(one), *GPU, "serving.runner=process")
    assert json.loads(words[words.index("--lora-modules") + 1]) == {"name": "0", "path": f"{one}/adapter"}


def test_names_are_as_long_as_they_must_be(adapted, dry_run):
    _, words = dry_run(given(adapted("z/0") / "adapter"), *GPU)
    assert json.loads(words[words.index("--lora-modules") + 1])["name"] == "0"
    _, words = dry_run(given(adapted("x/0"), adapted("y/0")), *GPU)
    at = words.index("--lora-modules")
    assert [json.loads(word)["name"] for word in words[at + 1 : at + 3]] == ["x/0", "y/0"]


def test_a_sweeps_folder_stands_for_its_runs(adapted, dry_run, tmp_path, port):
    for name in ("r-16", "r-8"):
        adapted(f"sweep/{name}")
    (tmp_path / "sweep/logs").mkdir()
    (tmp_path / "sweep/r-32/checkpoints").mkdir(parents=True)  # a job that failed
    (tmp_path / "sweep/r-32/config.yaml").write_text("{}")
    _, words = dry_run(given(tmp_path / "sweep"), *GPU)
    at = words.index("--lora-modules")
    assert [json.loads(word)["name"] for word in words[at + 1 : at + 3]] == ["r-8", "r-16"]
    notes = load([given(tmp_path / "sweep"), f"serving.port={port}", *GPU], SERVE).checked.notes
    assert notes[0].endswith("1 of 3 runs have no adapter: r-32")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "DoRA (use_dora=True), which vLLM refuses; serve merged weights"),
        ({"alora_invocation_tokens": [5]}, "activated LoRA (alora_invocation_tokens=[5]), which vLLM refuses"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16, which changed the base's weights"),
        ({"lora_bias": True}, "biases (lora_bias=True), which vLLM refuses"),
        ({"modules_to_save": ["lm_head"]}, "whole modules alongside the adapter (modules_to_save=['lm_head'])"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "trained rows of tokens"),
        ({"target_parameters": ["experts.down_proj"]}, "adapters of experts in PEFT's form"),
        ({"r": 513}, "rank 513: vLLM accepts ranks up to 512"),
        ({"rank_pattern": {"o_proj": 600}}, "rank 600: vLLM accepts"),
        ({"peft_type": "IA3"}, "does not describe LoRA"),
        ({"base_model_name_or_path": "/nowhere/base"}, "base is /nowhere/base, not a local folder; set run="),
    ],
)  # fmt: skip
def test_adapters_that_vllm_does_not_apply(adapted, refused, changes, told):
    assert told in refused(given(adapted(**changes)), *GPU)


def test_what_a_server_can_not_do(adapted, refused, tmp_path, base):
    run = adapted()
    assert "silently ignores adapters" in refused(given(run), "serving=v6e8")
    words = ["serving=v6e8_tuned", "serving.env={MODEL_IMPL_TYPE: vllm}"]
    assert "data_parallel_size=2: not supported with adapters on TPUs" in refused(given(run), *words)
    assert "serving=vllm_cpu applies adapters" in refused(given(run), "serving=local")
    assert "nowhere: no such folder" in refused("adapters=[nowhere]", *GPU)
    assert f"merge run={base} export=peft" in refused(given(base), *GPU)
    assert "is listed twice" in refused(given(run, run / "adapter"), *GPU)
    assert "also the name of an adapter" in refused(given(run), *GPU, "serving.served_model_name=a")
    assert "comma in its path can't be mounted" in refused(f"adapters=['{adapted('x,y')}']", *GPU)
    other = adapted("b", fingerprint="g")
    assert f"{other} was trained on another base" in refused(given(run, other), *GPU)
    (run / "adapter/adapter_config.json").write_text("[")
    assert "adapter_config.json is damaged" in refused(given(run), *GPU)


@pytest.mark.parametrize(
    ("modules", "words", "told"),
    [
        ([MODULE, "base_model.model.model.embed_tokens"], GPU, "vLLM does not apply adapters to base_model"),
        ([MODULE.replace("self_attn.q_proj", "experts.3.gate_proj")], ["serving=vllm_cpu"], "on GPUs only"),
    ],
)  # fmt: skip
def test_weights_that_would_be_left_out(adapted, base, port, capsys, modules, words, told):
    assert main([given(adapted(modules=modules)), f"serving.port={port}", "dry_run=true", *words]) == 2
    assert told in capsys.readouterr().err


def test_slots_for_adapters_are_counted():
    serving = ServingConfig(slice="h100x2", tensor_parallel_size=2)
    arch = ARCHITECTURES["gemma4_31b"]
    adapters = [ServedAdapter(str(number), Path("x"), 60) for number in range(3)]
    found = estimate(arch, serving, adapters).weight_bytes - estimate(arch, serving).weight_bytes
    # K, V of 50 sliding and 10 global layers; all products have 5376 or 21504 on the other side or both
    sides = 60 * (7 * 5376 + 3 * 21504) + 50 * (2 * 8192 + 2 * 4096) + 10 * (2 * 16384 + 2 * 2048)
    assert found == 3 * 64 * sides * 2 / 2


def test_each_is_asked_and_one_like_the_base_ends_it(docker, adapted, port, tmp_path, stop_when_ready, serve, capsys):
    first = [{"tokens": [5, 6], "merged": 11, "base": 22}]
    second = [{"tokens": [8, 9], "merged": 12, "base": 23}]
    runs = given(adapted("a", probe=first), adapted("b", probe=second))
    words = [f"serving.port={port}", f"run_dir={tmp_path / 'record'}", runs, *GPU]
    docker.play(answer={"5": 11, "8": 23})
    assert main(words) == 2
    assert "b: the server answers 1 of 1 stored prompt like the base model" in capsys.readouterr().err
    docker.play(answer={"5": 11, "8": 12})
    stop_when_ready(signal.SIGTERM)
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["model: base", "adapter: a", "adapter: b"]
    assert {name: probe["as_merged"] for name, probe in result(serve)["probe"].items()} == {"a": 1, "b": 1}
    assert docker.containers == []


def test_where_v_is_k_vllm_is_told_of_v_too(adapted, tmp_path):
    k = [MODULE.replace("0.self_attn.q_proj", f"{layer}.self_attn.k_proj") for layer in (0, 5)]
    run = adapted(modules=k, probe=[{"tokens": [5], "merged": 1, "base": 2}])
    adapter = ServedAdapter("a", run / "adapter", 8)
    arch = ARCHITECTURES["gemma4_31b"]  # whose layer 5 is global
    for _ in range(2):  # a record that is opened again
        (copy,) = copied([adapter], arch, tmp_path / "copies")
    names = set(load_file(copy.folder / "adapter_model.safetensors"))
    before = set(load_file(adapter.folder / "adapter_model.safetensors"))
    assert names - before == {f"{k[1].replace('k_proj', 'v_proj')}.lora_{x}.weight" for x in "AB"}
    for file in ("adapter_config.json", "probe.json"):
        assert (copy.folder / file).read_bytes() == (adapter.folder / file).read_bytes()
    assert copied([copy], arch, tmp_path / "again") == (copy,)
    assert copied([adapter], ARCHITECTURES["gemma4_e2b"], tmp_path / "again") == (adapter,)  # V has its own weight
    assert not (tmp_path / "again").exists()
