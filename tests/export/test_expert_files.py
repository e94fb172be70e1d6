"""Adapters of experts on disk: merged, as PEFT holds them, expert by expert as vLLM loads them, and read back."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.expert_files import from_experts
from gemma4_tpu.models.layout import get
from gemma4_tpu.training.start import open_start
from tests.export.test_merge import lora_logits, peft_logits
from tests.export.test_start import arch_of, begin, logits
from tests.models.checkpoints import hf_logits, load_hf, make_batch, make_checkpoint

LORA = LoraConfig(rank=4, alpha=8.0, targets=["attention", "mlp", "experts"], dropout=0.1)
"""Of experts: rank 2, scale 4; two of the eight serve a token."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMS = ("fused", "per_expert")


def tokens():
    return np.maximum(make_batch(batch=2, length=32)[0], 3)


@pytest.mark.parametrize("prefix", ["causal", "multimodal"])
def test_transformers_and_peft_have_the_logits_of_the_lora_model(prefix, run_of, merge):
    run, base = run_of("moe", prefix=prefix, shards=3, lora=LORA, size=0.2)
    merge(run, "export=both")
    ours = lora_logits(run, tokens())
    # fp32 on both sides, as in test_merge.py
    np.testing.assert_allclose(hf_logits(run / "merged", tokens()), ours, atol=2e-3)
    np.testing.assert_allclose(peft_logits(base, run / "adapter", tokens()), ours, atol=2e-3)
    only_dense = without_experts(run / "adapter", run / "other")
    assert np.abs(peft_logits(base, only_dense, tokens()) - ours).max() > 0.1
    parity = json.loads(next(run.glob("merges/*/parity.json")).read_text())
    assert parity["passed"] and parity["weights"]["weights"] == 12 * 8  # K and V are one of ours
    assert parity["logits"]["merged_to_lora"] < 1e-4


def without_experts(adapter, target):
    """The same PEFT adapter with the B of experts zero."""
    target.mkdir()
    values = {n: x * 0 if "experts" in n and "lora_B" in n else x for n, x in load_file(adapter / WEIGHTS).items()}
    save_file(values, target / WEIGHTS)
    (target / CONFIG).write_bytes((adapter / CONFIG).read_bytes())
    return target


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_reader_that_knows_of_no_patterns_finds_the_merged_weights(form, rslora, run_of, merge):
    """vLLM takes `r` and `lora_alpha` for every module, and the ranks from the tensors."""
    run, base = run_of("moe", lora=replace(LORA, rslora=rslora))
    merge(run, "export=both", f"export.peft_experts={form}", "verify=stream")
    config = json.loads((run / "adapter" / CONFIG).read_text())
    scale = config["lora_alpha"] / (np.sqrt(config["r"]) if rslora else config["r"])
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run / "merged"))
    tensors = load_file(run / "adapter" / WEIGHTS)
    changed = set()
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[name.replace("lora_A", "lora_B")]
        for weight, where, delta in deltas(module, a, b, experts=8):
            found = after[weight][where] - before[weight][where]
            np.testing.assert_allclose(found, scale * delta, atol=3e-6)  # values of 1 before, rounded twice in fp32
            changed.add(weight)
    assert {name for name in after if np.any(after[name] != before[name])} == changed
    assert len(changed) == 12 * 9 - 2


def deltas(module, a, b, experts):
    """(weight, the part of it, B·A) of a module in a file, by the documented formulas of PEFT and vLLM."""
    if module.endswith((".experts", ".experts.base_layer")):
        own = "gate_up_proj" if module.endswith("base_layer") else "down_proj"
        b3, a3 = b.reshape(len(b), -1, experts), a.reshape(experts, -1, a.shape[1])
        yield f"{module.removesuffix('.base_layer')}.{own}", ..., np.einsum("orx,xri->xoi", b3, a3)
    elif one := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", module):
        rows = {"gate": slice(0, 24), "up": slice(24, 48), "down": slice(None)}[one[3]]
        own = "down_proj" if one[3] == "down" else "gate_up_proj"
        yield f"{one[1]}.{own}", (int(one[2]), rows), b @ a
    else:
        yield f"{module}.weight", ..., b @ a


@pytest.mark.parametrize("form", FORMS)
def test_what_no_server_takes_is_not_written(form, run_of, merge, caplog):
    run, _ = run_of("moe", lora=LORA)
    with caplog.at_level("WARNING"):
        merge(run, "export=peft", f"export.peft_experts={form}")
    assert "on TPUs serve the merged model" in caplog.text
    names = load_file(run / "adapter" / WEIGHTS).keys()
    assert not [name for name in names if "moe.experts" in name]
    of_one = [
        name for name in names if re.search(r"layers\.\d+\.experts\.\d+\.(gate|up|down)_proj\.lora_[AB]\.weight$", name)
    ]
    assert len(of_one) == {"fused": 0, "per_expert": 12 * 8 * 3 * 2}[form]
    config = json.loads((run / "adapter" / CONFIG).read_text())
    assert ("target_parameters" in config) == (form == "fused")
    modules = {name for name, _ in load_hf(make_checkpoint("moe")).named_modules()}
    matched = {name for name in modules if re.fullmatch(config["target_modules"], name)}
    assert matched and not [name for name in matched if "experts" in name]


def test_peft_ignores_the_experts_in_the_form_of_vllm(run_of, merge):
    run, base = run_of("moe", lora=LORA, size=0.2)
    merge(run, "export=peft", "export.peft_experts=per_expert")
    only_dense = without_experts(run / "adapter", run / "other")
    assert any(".experts.7." in name for name in load_file(only_dense / WEIGHTS))
    found, expected = (peft_logits(base, folder, tokens()) for folder in (run / "adapter", only_dense))
    np.testing.assert_array_equal(found, expected)


def test_peft_has_no_dora_for_experts_either():
    import torch
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.down_proj = torch.nn.Parameter(torch.zeros(2, 3, 4))
    model.config = {"model_type": "any"}
    with pytest.raises(ValueError, match="does not work with use_dora"):
        get_peft_model(model, Theirs(r=2, use_dora=True, target_parameters=["experts.down_proj"]))


@pytest.mark.parametrize("targets", [LORA.targets, ["experts"]])
def test_from_a_run_and_from_both_forms_to_the_bit(targets, run_of, merge):
    run, base = run_of("moe", lora=replace(LORA, targets=targets, dropout=0.0))
    places = [run]
    for form in FORMS:
        merge(run, "export=peft", f"export.peft_experts={form}", f"target={run / form}")
        places.append(run / form)
    trained, arch = open_trained(run, ExportConfig()), arch_of(base)
    for place in places:
        start = open_start(replace(trained.lora, start=str(place)), arch)
        tree = begin(start, arch)
        assert not start.fresh and not start.idle
        for leaf in adapters.leaves(trained.layout):
            for number, name in enumerate(leaf.tunix_names):
                np.testing.assert_array_equal(np.asarray(get(tree, leaf.path))[number], trained.state.read(name))


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids="+".join)
def test_from_what_peft_saved(parameters, tmp_path):
    """One parameter alone is stored under the name that the second of two has."""
    import torch
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    base = make_checkpoint("moe")
    load_hf.cache_clear()  # PEFT changes the model in place
    torch.manual_seed(0)
    targets = [f"experts.{name}" for name in parameters]
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["o_proj"], "target_parameters": targets}
    model = get_peft_model(load_hf(base), Theirs(task_type="CAUSAL_LM", rank_pattern={"o_proj": 2}, **settings))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(tmp_path)
    load_hf.cache_clear()
    lora = LoraConfig(rank=3, alpha=9.0, expert_rank=3, targets=["attention", "experts"], start=str(tmp_path))
    with pytest.raises(UserError, match=r"scale is 2.*not a power of two apart"):
        open_start(lora, arch_of(base))
    lora = replace(lora, alpha=6.0)
    with pytest.raises(UserError, match=r"its experts need rank 3, lora\.expert_rank is 1: .*; merge it into its base"):
        open_start(replace(lora, expert_rank=None), arch_of(base))
    with pytest.raises(UserError, match=r"leaves out .*experts.*give lora\.targets=\[attention,experts\]"):
        open_start(replace(lora, targets=["attention"], expert_rank=None), arch_of(base))
    # o_proj's scale is 6 / 2 there, 2 here: no power of two apart
    with pytest.raises(UserError, match="its scale is 3, here it is 2"):
        open_start(lora, arch_of(base))
    recorded = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(recorded | {"alpha_pattern": {"o_proj": 4}}))
    start = open_start(lora, arch_of(base))
    assert {n.rpartition(".")[2] for n in start.given if "experts" in n} == set(parameters)
    ours = logits(base, lora, begin(start, arch_of(base)), tokens())
    np.testing.assert_allclose(ours, peft_logits(base, tmp_path, tokens()), atol=2e-3)


def test_gate_and_up_with_an_a_of_their_own_take_both_ranks():
    rng = np.random.default_rng(0)
    gate, up = ([(rng.standard_normal((2, 5)), rng.standard_normal((3, 2))) for _ in range(4)] for _ in range(2))
    a, b = from_experts([gate, up])
    assert a.shape == (4, 4, 5) and b.shape == (4, 6, 4)
    for expert in range(4):
        expected = np.concatenate([gate[expert][1] @ gate[expert][0], up[expert][1] @ up[expert][0]])
        np.testing.assert_allclose(b[expert] @ a[expert], expected, rtol=1e-5)
    shared = [(a, up_b) for (a, _), (_, up_b) in zip(gate, up, strict=True)]
    assert from_experts([gate, shared])[0].shape == (4, 2, 5)


def test_an_expert_that_is_missing_and_a_rank_that_does_not_do_are_named(run_of, merge, tmp_path):
    run, base = run_of("moe", lora=LORA)
    merge(run, "export=peft", "export.peft_experts=per_expert")
    tensors = load_file(run / "adapter" / WEIGHTS)
    (tmp_path / "part").mkdir()
    save_file({n: x for n, x in tensors.items() if ".2.experts.5.up_proj." not in n}, tmp_path / "part" / WEIGHTS)
    (tmp_path / "part" / CONFIG).write_bytes((run / "adapter" / CONFIG).read_bytes())
    with pytest.raises(UserError, match=r"no adapter for layers\.2\.experts\.5\.up_proj, although other experts"):
        open_start(replace(LORA, start=str(tmp_path / "part")), arch_of(base))
    save_file({n: x * 2 if "up_proj.lora_A" in n else x for n, x in tensors.items()}, tmp_path / "part" / WEIGHTS)
    with pytest.raises(UserError, match=r"its experts need rank 4, lora\.expert_rank is 2"):  # gate and up share none
        open_start(replace(LORA, start=str(tmp_path / "part")), arch_of(base))
