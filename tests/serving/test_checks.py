"""Command lines in, container commands or refusals out: `python -m gemma4_tpu.serve … dry_run=true`."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.conf import groups_of
from gemma4_tpu.config.load import load
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import GIB
from gemma4_tpu.models.kv_cache import kv_cache_bytes, parameter_count
from gemma4_tpu.serve import SERVE, main
from gemma4_tpu.serving.flag_checks import known_flags
from gemma4_tpu.serving.memory import estimate


@pytest.fixture
def dry_run(capsys, port, monkeypatch, tmp_path):
    """The words that a dry run prints, comments left out."""
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no container engine
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def run(model, *words):
        capsys.readouterr()
        given = model if str(model).startswith("run=") else f"run={model}"
        assert main([given, f"serving.port={port}", "dry_run=true", *words]) == 0
        return shlex.split(capsys.readouterr().out.replace("\\\n", " "), comments=True)

    return run


@pytest.fixture
def refused(port):
    def run(model, *words):
        with pytest.raises(UserError) as caught:
            load([f"run={model}", f"serving.port={port}", *words], SERVE)
        return str(caught.value)

    return run


SIZES = {"moe": "gemma4_26b_a4b", "12b": "gemma4_12b", "e4b": "gemma4_e4b"}
"""By the end of a recipe's name; the others are for 31B."""


def recipe_words(option, merged):
    """What a recipe is given: a model of its size, and a drafter where it speculates with one."""
    if option == "vllm_cpu":
        model = merged("tiny", head_dim=32, global_head_dim=32, per_layer_config={})
    else:
        model = merged(SIZES.get(option.rpartition("_")[2], "gemma4_31b"))
    words = [f"serving={option}", f"run={model}"]
    if option.endswith("_mtp"):
        words.append(f"serving.drafter={make_drafter(model.parent / 'drafter', 5376)}")
    return words


def make_drafter(folder, width):
    """A drafter as far as anything here looks."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma4_assistant", "backbone_hidden_size": width}))
    return folder


def after(words, flag):
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("option", [option for option in groups_of(SERVE)["serving"] if option != "local"])
def test_every_recipe_passes_the_checks_and_holds_flags_that_vllm_has(option, merged, dry_run, port):
    given = recipe_words(option, merged)
    root = load([*given, f"serving.port={port}"], SERVE).root
    assert re.search(r"\b20\d\d\b", root.serving.source)
    words = dry_run(*given[1:], given[0])
    serve = words[words.index("serve") :]
    assert {word[2:] for word in serve if word.startswith("--")} <= known_flags()
    assert len(known_flags()) == 408
    assert after(words, "--reasoning-parser") == "gemma4"  # else thoughts get into the answers


@pytest.mark.parametrize(
    "tag",
    ["v0.32.0", "nightly-20261001", "0.32.0-cu130", "9f8e7d6c5b4a", "nightly-2026-10-01-9f8e7d6", "tpu-v0.32.0rc1"],
)
def test_tags_that_stay(merged, dry_run, tag):
    assert f"vllm/vllm-tpu:{tag}" in dry_run(merged(), f"serving.image=vllm/vllm-tpu:{tag}")


def test_a_process_gets_the_same_flags(merged, dry_run, port):
    model = merged()
    inside = dry_run(model, "serving=v6e8_tuned")
    words = dry_run(model, "serving=v6e8_tuned", "serving.runner=process", "serving.executable='~/v/bin/vllm'")
    serve = words.index("serve")
    assert words[0] == "env" and "USE_BATCHED_RPA_KERNEL=1" in words[:serve]
    assert words[serve - 1] == str(Path("~/v/bin/vllm").expanduser())
    assert words[serve + 1] == str(model)
    assert words[serve + 2 :] == inside[inside.index("serve") + 2 :]


def test_heads_that_vllm_on_cpus_does_not_take(merged, refused):
    assert "heads of width 16: vLLM's attention on CPUs supports 32, 64" in refused(merged("tiny"), "serving=vllm_cpu")


def test_the_papers_command(merged, dry_run, port):
    model = merged()
    words = dry_run(model, "serving=v6e8")
    assert words[:2] == ["docker", "run"]
    assert "--privileged" in words and after(words, "--network") == "host" and after(words, "--entrypoint") == "vllm"
    assert f"type=bind,source={model},target=/model,readonly" in words
    assert words[words.index("vllm/vllm-tpu:v0.32.0") :] == [
        "vllm/vllm-tpu:v0.32.0", "serve", "/model", "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "model", "--tensor-parallel-size", "8", "--max-model-len", "16384",
        "--gpu-memory-utilization", "0.9", "--disable-chunked-mm-input", "--reasoning-parser", "gemma4",
        "--no-trust-remote-code",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serving=v6e4_12b", "serving.env={MODEL_IMPL_TYPE: flax_nnx}"], True),
        (["serving=v6e4_12b"], False),
        (["serving=h100x2"], False),
    ],
)
def test_that_tpus_have_no_jax_model_of_12b_is_told(words, told, merged, port):
    model = merged("gemma4_12b")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gemma4_unified"}))
    notes = load([f"run={model}", f"serving.port={port}", *words], SERVE).checked.notes
    assert any("model_type=gemma4_unified (12B) is not in" in note for note in notes) == told


def test_flags_become_words(merged, dry_run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_this_test")
    words = dry_run(
        merged(), "serving=v6e8_tuned",
        "serving.flags={enable_prefix_caching: false, seed: 3, async-scheduling: null}",
        "serving.flags={limit-mm-per-prompt: {image: 2}}",
        "serving.extra_args=[--brand-new-flag,7]", "serving.env={NUM_PRECOMPILE_WORKERS: 8}",
    )  # fmt: skip
    assert "--no-enable-prefix-caching" in words and "--async-scheduling" not in words
    assert (after(words, "--seed"), after(words, "--limit-mm-per-prompt")) == ("3", '{"image":2}')
    assert words[-3:] == ["--brand-new-flag", "7", "--no-trust-remote-code"]
    assert "NUM_PRECOMPILE_WORKERS=8" in words and "HF_TOKEN" in words
    assert not any("hf_secret" in word for word in words)
    rules = json.loads(after(words, "--additional-config"))["quantization"]["qwix"]["rules"]
    assert rules[0]["weight_qtype"] == "float8_e4m3fn"


def test_experts_in_fp8_are_no_business_of_qwix(merged, dry_run):
    words = dry_run(merged("gemma4_26b_a4b"), "serving=v6e8_moe")
    assert "MOE_REQUANTIZE_WEIGHT_DTYPE=float8_e4m3fn" in words
    (rule,) = json.loads(after(words, "--additional-config"))["quantization"]["qwix"]["rules"]
    matched = [
        path
        for path in ("layers.3.self_attn.q_proj", "layers.3.mlp.gate_proj", "layers.3.experts", "layers.3.moe.kernel")
        if re.fullmatch(rule["module_path"], path)
    ]
    assert matched == ["layers.3.self_attn.q_proj", "layers.3.mlp.gate_proj"]
    dense = dry_run(merged(folder="dense"), "serving=v6e8_tuned")
    assert not any("MOE_REQUANTIZE" in word for word in dense)


def test_a_drafter_is_a_second_mount(merged, dry_run, refused, tmp_path):
    model, drafter = merged(), make_drafter(tmp_path / "drafter", 5376)
    words = dry_run(model, "serving=v6e4_mtp", f"serving.drafter={drafter}")
    assert f"type=bind,source={drafter},target=/drafter,readonly" in words
    speculation = {"method": "mtp", "num_speculative_tokens": 5, "model": "/drafter"}
    assert json.loads(after(words, "--speculative-config")) == speculation
    words = dry_run(model, "serving=v6e4_mtp", f"serving.drafter={drafter}", "serving.runner=process")
    assert json.loads(after(words, "--speculative-config"))["model"] == str(drafter)
    assert "serving.drafter: this recipe needs a drafter" in refused(model, "serving=v6e4_mtp")
    other = make_drafter(tmp_path / "other", 2816)
    assert "made for a model of width 2816" in refused(model, "serving=v6e4_mtp", f"serving.drafter={other}")
    assert "is not a Gemma 4 drafter" in refused(model, "serving=v6e8", f"serving.drafter={model}")


def test_a_quantised_folder_is_counted_and_named_as_what_it_is(merged, dry_run, refused, capsys, tmp_path, port):
    quantised = merged(folder="my_run/int8")
    (tmp_path / "my_run/checkpoints").mkdir()
    (tmp_path / "my_run/config.yaml").write_text("{}")
    config = json.loads((quantised / "config.json").read_text())
    about = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    with open(quantised / "model.safetensors", "wb") as file:
        file.truncate(32 * GIB)  # no block of it is on the disk
    assert main([f"run={quantised}", f"serving.port={port}", "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    assert "weights 4.00 GiB = 32.00 GiB of quantised files / 8 chips" in shown and "my_run-int8" in shown
    assert "already quantised by compressed-tensors" in refused(quantised, "serving=v6e8_tuned")
    assert "use the merged folder" in refused(quantised, "serving=local")
    notes = load([f"run={quantised}", f"serving.port={port}", "serving=v6e8"], SERVE).checked.notes
    assert any("tpu-inference #3305" in note.replace("\n", " ") for note in notes)
    about["config_groups"] = {"group_0": {"weights": {"num_bits": 8}, "input_activations": None}}
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    assert "no kernel for 8 bits without quantised activations" in refused(quantised, "serving=vllm_cpu")


def test_gpus_reach_the_container_their_own_way(merged, dry_run):
    words = dry_run(merged(), "serving=h100x2", "serving.weight_dtype=fp8")
    assert after(words, "--gpus") == "all" and "--privileged" not in words
    assert after(words, "--quantization") == "fp8"


def test_refusals_of_flags_name_key_and_remedy_all_at_once(merged, refused):
    flags = {
        "max-num-seq": (3, "did you mean max-num-seqs"),
        "disable-log-requests": ("true", "no-enable-log-requests"),
        "port": (3, "serving.flags.port: give serving.port instead"),
        "enable_lora": ("true", "serving.flags.enable-lora: serve adapters with adapters=["),
        "tool-call-parser": ("hermes", "Gemma 4's is gemma4"),
        "hf-token": ("x", "set HF_TOKEN in the environment instead"),
        "seed": ("false", "has no --no-seed"),
        "trust-remote-code": ("true", "would run code from a checkpoint"),
    }
    given = ", ".join(f"{name}: {value}" for name, (value, _) in flags.items())
    words = [
        f"serving.flags={{{given}}}",
        "serving.extra_args=['--lora-modules=a=b']",
        "serving.env={HF_TOKEN: x, DB_PASS: planted-12345}",
    ]
    message = refused(merged(), *words)
    told = [told for _, told in flags.values()]
    for part in (
        *told,
        "serving.extra_args: --lora-modules: serve adapters with",
        "serving.env.HF_TOKEN: no secrets",
        "serving.env.DB_PASS: no secrets",
        "11 problems",
    ):
        assert part in message, part


@pytest.mark.parametrize("image", ["vllm/vllm-tpu:v0.32.0", "other/vllm:v0.33.0"])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("serving.flags={trust_remote_code: true}", "serving.flags.trust-remote-code: would run code from"),
        ("serving.flags={trust-rem: true}", "serving.flags.trust-rem: would run code from a checkpoint"),
        ("serving.extra_args=[--trust-rem]", "serving.extra_args: --trust-rem: would run code from a checkpoint"),
        ("serving.extra_args=['--trust_remote_code=true']", "--trust_remote_code=true: would run code"),
        ("serving.flags={config: flags.yaml}", "serving.flags.config: the flags in a file of vLLM's would"),
        ("serving.extra_args=[--config,flags.yaml]", "serving.extra_args: --config: the flags in a file of vLLM's"),
        ("serving.extra_args=[--api-k,x]", "serving.extra_args: --api-k: secrets come from the environment"),
        ("serving.extra_args=[--lora_mod,a]", "serving.extra_args: --lora_mod: serve adapters with"),
    ],
)  # fmt: skip
def test_what_vllm_would_take_for_a_refused_flag_is_refused(merged, refused, image, given, told):
    assert told in refused(merged(), f"serving.image={image}", given)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serving.image=vllm/vllm-tpu:nightly"], "the tag nightly can refer to another image tomorrow"),
        (["serving.image=vllm/vllm-tpu"], "no tag can refer to another image"),
        (["serving.image=vllm/vllm-tpu:latest"], "the tag latest can refer to another image tomorrow"),
        (["serving.image=vllm/vllm-tpu:gemma4"], "the tag gemma4 can refer to another image tomorrow"),
        (["serving.image=vllm/vllm-tpu:v0"], "the tag v0 can refer to another image tomorrow"),
        (["serving.image=vllm/vllm-tpu:v0.32"], "the tag v0.32 can refer to another image tomorrow"),
        (["serving.image=vllm/vllm-tpu:latest-cuda12.8.1"], "the tag latest-cuda12.8.1 can refer to another image"),
        (["serving.image=vllm/vllm-tpu:nightly-v0.32.0"], "the tag nightly-v0.32.0 can refer to another image"),
        (["serving.image=vllm/vllm-tpu:py3.12.1"], "the tag py3.12.1 can refer to another image"),
        (["serving.image=localhost:5000/vllm"], "no tag can refer to another image"),
        (["serving.image=vllm/vllm-tpu@latest"], "latest is not a digest; it has the form sha256:<64 digits>"),
        (["serving.image=vllm/vllm-tpu:v0.32.0@sha256:abc"], "sha256:abc is not a digest"),
        (["serving.executable=/opt/vllm"], "the container has its own; leave it out, or set serving.runner=process"),
        (["serving=local", "serving.executable=/opt/vllm"], "for vLLM, which serving=local does not use"),
        (["serving.gke.max_replicas=2"], "serving.gke: only for serving.runner=gke"),
        (["serving.slice=local"], "on a CPU, use serving=local (PyTorch in this process) or serving=vllm_cpu"),
        (["serving.runner=embedded", "serving.image=''"], "serving.runner=embedded serves on this machine's CPU"),
        (["serving=vllm_cpu", "serving.weight_dtype=fp8"], "a CPU takes float32 or bfloat16"),
        (["serving=vllm_cpu", "serving.data_parallel_size=2"], "a CPU holds one copy"),
        (["serving.weight_dtype=fp8", "serving.env={MODEL_IMPL_TYPE: vllm}"], "weights would silently stay bfloat16"),
        (["serving.weight_dtype=float32"], "v6e-8 takes bfloat16 or fp8"),
        (["serving.tensor_parallel_size=3"], "does not divide the model's 32 query heads; it can be 1, 2, 4, 8"),
        (["serving.data_parallel_size=2"], "× serving.data_parallel_size=2: v6e-8 has 8 devices"),
        (["serving.slice=v6e-16"], "has 4 hosts"),
        (["serving.slice=v6e8"], "did you mean serving.slice=v6e-8"),
        (["serving.max_model_len=300000"], "the model's longest sequence is 131072 tokens"),
        (["serving.compile_cache=gs://b/cache", "serving.kv_cache_dtype=int4"], "local disk"),
    ],
)  # fmt: skip
def test_refusals_name_key_and_remedy(merged, refused, words, told):
    assert told in refused(merged(), *words)


def test_an_image_of_another_version_brings_its_own_flags(merged, dry_run):
    words = dry_run(merged(), "serving.image=vllm/vllm-tpu@sha256:" + "0" * 64, "serving.flags={brand-new: 1}")
    assert after(words, "--brand-new") == "1"


def test_a_value_that_begins_with_a_dash_is_no_flag(merged, dry_run):
    words = dry_run(merged(), "serving.served_model_name='--port'", "serving.flags={seed: -1}")
    assert {"--served-model-name=--port", "--seed=-1"} <= set(words)


def test_folders_that_are_not_a_merged_model(merged, refused, tmp_path):
    adapter = merged(folder="adapter")
    (adapter / "adapter_config.json").write_text("{}")
    assert "an adapter; serve it on its base with adapters=[" in refused(adapter)
    training = tmp_path / "training"
    (training / "checkpoints").mkdir(parents=True)
    (training / "config.yaml").write_text("{}")
    assert f"python -m gemma4_tpu.merge run={training}" in refused(training)
    assert "hf download google/gemma-4-31B-it" in refused("google/gemma-4-31B-it")
    assert "copy it to a local disk first" in refused("gs://bucket/model")
    linked = merged(folder="linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(adapter / "model.safetensors")
    assert "cp -rL" in refused(linked)
    bare = merged(folder="bare")
    (bare / "tokenizer.json").unlink()
    assert "there is no tokenizer.json" in refused(bare)
    cut = merged(folder="cut")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names model-00001-of-00002.safetensors, which does not exist (1 missing)" in refused(cut)


def test_a_run_folder_stands_for_its_merged_model(merged, dry_run, tmp_path):
    model = merged(folder="my_run/merged")
    (tmp_path / "my_run/checkpoints").mkdir()
    (tmp_path / "my_run/config.yaml").write_text("{}")
    words = dry_run(tmp_path / "my_run")
    assert f"type=bind,source={model},target=/model,readonly" in words
    assert after(words, "--served-model-name") == "my_run"


def test_what_does_not_fit_is_refused_with_the_arithmetic_and_what_would(merged, capsys, port):
    words = [f"run={merged()}", f"serving.port={port}", "dry_run=true", "serving.tensor_parallel_size=2"]
    assert main([*words, "serving.max_model_len=100000"]) == 2
    told = capsys.readouterr().err
    # 30.70 G parameters × 2 bytes / 2 chips; every layer keeps all tokens on a TPU: (50·16·256 + 10·4·512)·2·2·1e5/2.
    assert "weights 28.59 GiB = 30.70 G parameters × 2 bytes / 2 chips" in told
    assert f"KV cache of one sequence {(50 * 16 * 256 + 10 * 4 * 512) * 2 * 2 * 100_000 / 2 / GIB:.2f} GiB" in told
    assert "what would fit: serving.tensor_parallel_size=8 serving.data_parallel_size=1" in told


def test_the_memory_estimate(merged, port):
    def of(*words):
        root = load([f"run={model}", f"serving.port={port}", *words], SERVE).root
        return estimate(ARCHITECTURES["gemma4_31b"], root.serving)

    model = merged()
    tpu, gpu = of("serving=v6e8"), of("serving=h100x2")
    # Four global KV heads are repeated to eight; on GPUs sliding layers keep their window of 1024 only.
    assert tpu.kv_bytes == (50 * 16 * 256 + 10 * 8 * 512) * 2 * 2 * 16384 / 8
    assert gpu.kv_bytes == (50 * 16 * 256 * 1024 + 10 * 4 * 512 * 16384) * 2 * 2 / 2
    assert of("serving=v6e8_tuned").weight_bytes == parameter_count(ARCHITECTURES["gemma4_31b"]) / 4
    longest = tpu.longest_tokens
    fits = of("serving=v6e8", f"serving.max_model_len={min(longest, 131072)}")
    assert fits.sequences >= 1 and longest > 131072
    assert of("serving=v6e8", "serving.data_parallel_size=1").sequences == tpu.sequences == 11


HEADS = ("| `serving=` |", "| recipe | weights GiB per chip |")
"""Of the tables in docs/serving.md."""


def test_the_page_lists_every_recipe_and_what_is_estimated_for_it(merged, port):
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    recipes, estimated = (
        {name: rest for name, *rest in ([cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows)}
        for rows in (page.partition(head)[2].partition("\n\n")[0].splitlines()[2:] for head in HEADS)
    )
    assert recipes.keys() == set(groups_of(SERVE)["serving"]) and len(estimated) == 5
    for name, (what, *_) in recipes.items():
        if name == "local":
            continue

        def model(*size, name=name, **more):
            return merged(*size, folder=f"{name}/model", **more)

        root = load([*recipe_words(name, model), f"serving.port={port}"], SERVE)
        serving = root.root.serving
        for pattern, value in ((r"tp (\d+)", serving.tensor_parallel_size), (r"(\d+) tokens", serving.max_model_len)):
            assert re.findall(pattern, what) in ([], [str(value)]), name
        if name in estimated:
            found = estimate(root.checked.architecture, serving)
            told = [f"{value / GIB:.2f}" for value in (found.weight_bytes, found.kv_bytes, found.room_bytes)]
            assert [*told, str(found.sequences)] == [*estimated[name][:3], estimated[name][3].split()[0]], name


def test_kv_cache_bytes_count_what_layers_keep():
    e2b = ARCHITECTURES["gemma4_e2b"]  # the last 20 of 35 layers share; of the first 15, three are global
    assert kv_cache_bytes(e2b, 512) == 2 * 2 * 512 * (12 * 256 + 3 * 512)
    assert kv_cache_bytes(e2b, 2048) == 2 * 2 * (12 * 256 * 512 + 3 * 512 * 2048)
    assert kv_cache_bytes(e2b, 2048, windowed=False) == 2 * 2 * 2048 * (12 * 256 + 3 * 512)


def test_a_dry_run_needs_no_jax(merged, port):
    code = """
import sys
from gemma4_tpu.serve import main
main(sys.argv[1:])
print(sorted({"jax", "numpy", "transformers"} & set(sys.modules)))
"""
    words = [f"run={merged()}", f"serving.port={port}", "dry_run=true"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
