"""PiSSA and OLoRA against PEFT: factors, what is left of the base, updates, logits, and exports for the whole base."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.config.tasks import EvalConfig, ExportConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.evaluated_models import weights_of
from gemma4_tpu.export.logits import forward, stacked
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import Layout, get
from gemma4_tpu.models.lora_parts import Parts
from gemma4_tpu.models.names import adapted_tensors, peft_names
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.sharding import make_mesh, places
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.training.began import FOLDER
from gemma4_tpu.training.setup import holding
from gemma4_tpu.training.start import open_start
from tests.export.conftest import same
from tests.export.runs import make_run
from tests.export.test_merge import lora_logits, peft_logits
from tests.export.test_start import arch_of, begin, logits
from tests.export.test_training_as_peft import our_updates, peft_updates
from tests.models.checkpoints import VOCAB_SIZE, hf_logits, load_hf, make_checkpoint

TARGETS = ["q", "v", "down"]
CASES = {
    "pissa": LoraConfig(rank=4, alpha=6.0, init="pissa", targets=TARGETS, ranks={"down": 3}),
    "olora": LoraConfig(rank=4, alpha=2.0, init="olora", targets=TARGETS, rslora=True),
    "pissa with dora": LoraConfig(rank=4, init="pissa", targets=["o"], dora=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Tiny, with singular values that fall, as those of trained weights do: of random ones they are all alike."""
    folder = shutil.copytree(make_checkpoint("dense"), tmp_path_factory.mktemp("base") / "falling")
    tensors = load_file(folder / "model.safetensors")
    for name, x in tensors.items():
        if name.endswith("_proj.weight"):
            u, s, vt = np.linalg.svd(x, full_matrices=False)
            falling = s[0] * 0.8 ** np.arange(len(s))
            tensors[name] = np.ascontiguousarray((u * falling) @ vt, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_peft(base, lora):
    """The model that PEFT makes of it."""
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    load_hf.cache_clear()  # PEFT changes the model in place
    ranks = {f"{name}_proj": rank for name, rank in lora.ranks.items()}
    modules = "|".join(f"{name}_proj" for name in lora.targets)
    config = Theirs(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, init_lora_weights=lora.init, rank_pattern=ranks,
        use_rslora=lora.rslora, use_dora=lora.dora, target_modules=rf"model\.layers\.\d+\.\w+\.({modules})",
    )  # fmt: skip
    return get_peft_model(load_hf(base), config)


def on_mesh(base, lora, saved=None):
    """(model, weights as training holds them, A₀ and B₀)."""
    mesh = make_mesh(1, 1, jax.devices()[:1])
    layout = Layout.of(arch_of(base), lora)
    parts = Parts(lora.init, mesh, jax.random.key(0), saved)
    checkpoint = Checkpoint(str(base))
    held = load_params(checkpoint, layout.arch, layout, places(layout, mesh), np.float32, holding(lora, mesh, parts))
    return Model(layout=layout, compute_dtype=jnp.float32, mesh=mesh), held, parts


def in_memory(layout, factors):
    """PEFT's tensors as the trained arrays of a run, by Tunix name."""
    found = {}
    for name, tensor in adapted_tensors(layout.arch, layout.adapted).items():
        pairs = {hf: tuple(factors[key] for key in peft_names(hf, "model.")) for hf in tensor.hf_names}
        found |= dict(zip(tensor.lora_names, tensor.from_lora_factors(pairs, layout.adapted[name].rank), strict=True))
    for adapter in adapters.adapters(layout):
        for leaf in (adapter.a, adapter.b):
            found |= {name: found[name].reshape(leaf.shape) for name in leaf.tunix_names}
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_begins_trains_and_is_exported_as_peft_s(case, base, tmp_path, monkeypatch, merge):
    lora, tokens = CASES[case], np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 25))
    plain, theirs, whole = hf_logits(base, tokens), with_peft(base, lora), Checkpoint(str(base))
    before = {name: value.detach().numpy().copy() for name, value in theirs.state_dict().items()}
    factors = {name.replace(".default", ""): value for name, value in before.items() if ".lora_" in name}
    model, held, parts = on_mesh(base, lora, in_memory(Layout.of(arch_of(base), lora), factors).__getitem__)

    # the same part by the same formula; what is left of a weight; a model that is the base at first
    found = on_mesh(base, lora)[2].factors
    for adapter in adapters.adapters(model.layout):
        for i, name in enumerate(adapter.base.tunix_names):
            tensor = adapted_tensors(model.arch, model.layout.adapted)[name]
            own = tensor.lora_factors(*(np.asarray(get(found, leaf.path))[i] for leaf in (adapter.a, adapter.b)))
            for hf_name, (a, b) in own.items():
                a0, b0 = (factors[key] for key in peft_names(hf_name, "model."))
                size = np.abs(b0 @ a0).max()
                np.testing.assert_allclose(b @ a, b0 @ a0, atol=1e-4 * size, err_msg=hf_name)
                module = "base_model.model.model." + hf_name.removesuffix(".weight")
                left = whole.read("model." + hf_name) - adapter.how.scale * b0 @ a0
                np.testing.assert_allclose(before[f"{module}.base_layer.weight"], left, atol=1e-5)
    begun = adapters.init(model.layout, jax.random.key(0), held, parts.factors)
    ours = np.asarray(forward(model, held, begun, tokens, np.ones_like(tokens)))
    np.testing.assert_allclose(ours, plain, atol=2e-3)  # fp32, as in test_merge.py

    # updates
    trained, our_losses = our_updates(model, held, begun, tokens)
    peft, their_losses = peft_updates(theirs, tokens)
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-4)
    after = in_memory(model.layout, peft)
    for leaf in adapters.factors(model.layout):
        for i, name in enumerate(leaf.tunix_names):
            value, start = (np.asarray(get(tree, leaf.path))[i] for tree in (trained, begun))
            moved = np.abs(value - start).max()
            assert moved > 1e-5, name
            np.testing.assert_allclose(after[name], value, atol=0.02 * moved, err_msg=name)

    # the merged model and the PEFT adapter, on the whole base, are the model that was trained
    name = "test_falling"
    monkeypatch.setitem(ARCHITECTURES, name, replace(arch_of(base), name=name))
    run = make_run(tmp_path / "run", base, lora=lora, name=name, trained=trained, initial=parts.factors)
    merge(run, "export=both")
    ours = np.asarray(forward(model, held, trained, tokens, np.ones_like(tokens)))
    assert np.abs(ours - plain).max() > 0.05
    load_hf.cache_clear()
    for other in (hf_logits(run / "merged", tokens), peft_logits(base, run / "adapter", tokens),
                  lora_logits(run, tokens)):  # fmt: skip
        np.testing.assert_allclose(other, ours, atol=2e-3)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 * lora.rank and json.loads(next(run.glob("merges/*/parity.json")).read_text())["passed"]


def test_a_merge_adds_what_was_trained_to_the_whole_base_and_no_more(run_of, merge):
    """Written out once more from the run's own values; untouched adapters are the base to the bit."""
    lora = LoraConfig(rank=4, alpha=6.0, init="olora", targets=["o"], layers=["0-1"])
    layout = Layout.of(arch_of(make_checkpoint("dense")), lora)
    rng = np.random.default_rng(3)
    initial = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32),
                           adapters.init(layout, jax.random.key(0)))  # fmt: skip
    run, base = run_of(lora=lora, initial=initial)
    merge(run, "verify=stream")
    state = open_trained(run, ExportConfig()).state
    leaf = next(adapter for adapter in adapters.adapters(layout))
    (a0, b0), (a, b) = ([np.asarray(get(initial, x.path))[0] for x in (leaf.a, leaf.b)],
                        [state.as_trained.read(x.tunix_names[0]) for x in (leaf.a, leaf.b)])  # fmt: skip
    name = "model.layers.0.self_attn.o_proj.weight"
    before, after = (Checkpoint(str(folder)).read(name) for folder in (base, run / "merged"))
    added = 1.5 * ((a.reshape(-1, 4) @ b).T - (a0.reshape(-1, 4) @ b0).T)
    np.testing.assert_allclose(after, before + added, atol=2e-5)
    assert state.read(leaf.a.tunix_names[0]).shape[-1] == state.shape(leaf.a.tunix_names[0])[-1] == 8


def test_a_new_run_begins_from_it_with_plain_adapters_of_twice_the_rank(run_of):
    """Its base is whole, so that A₀ and B₀ are in what it begins with."""
    lora = LoraConfig(rank=4, alpha=6.0, init="pissa", targets=["o"])
    layout = Layout.of(arch_of(make_checkpoint("dense")), lora)
    initial = jax.tree.map(lambda x: x + 0.01, adapters.init(layout, jax.random.key(0)))
    run, base = run_of(lora=lora, initial=initial)
    with pytest.raises(UserError, match=r"needs rank 8.*give lora\.rank=8 lora\.alpha=12\b"):
        open_start(LoraConfig(rank=4, alpha=6.0, targets=["o"], start=str(run)), arch_of(base))
    plain = LoraConfig(rank=8, alpha=12.0, targets=["o"], start=str(run))
    tree = begin(open_start(plain, arch_of(base)), arch_of(base))
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (1, 16))
    same(logits(base, plain, tree, tokens), lora_logits(run, tokens))


def test_a_quantised_rest_is_evaluated_as_it_was_trained(run_of):
    """Whole weights, quantised, are others than a quantised rest and what was taken out of it."""
    lora = LoraConfig(rank=4, init="pissa", targets=["o"], quantize="int8")
    parts = on_mesh(make_checkpoint("dense"), lora)[2]
    run, base = run_of(lora=lora, initial=parts.factors)
    trained, mesh = open_trained(run, ExportConfig()), make_mesh(1, 1, jax.devices()[:1])
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (1, 16))

    def logits_of(model, params, lora):
        return np.asarray(forward(model, params, lora, tokens, np.ones_like(tokens)))

    at_first, after = (logits_of(one.model, one.params, one.lora) for one in weights_of(trained, EvalConfig(), mesh))
    model, held, _ = on_mesh(base, lora, trained.state.began.read)
    same(after, logits_of(model, held, stacked(trained.as_trained, adapters.leaves(model.layout))))
    same(at_first, logits_of(model, held, parts.factors))
    # of 10: int8 of the rest of one matrix in each layer
    assert 1e-4 < np.abs(at_first - hf_logits(base, tokens)).max() < 0.5


def test_without_what_they_began_as_nothing_is_made_of_them(run_of, refused):
    run, _ = run_of(lora=LoraConfig(rank=4, init="olora"))
    told = refused(f"run={run}")
    assert f"checkpoints/{FOLDER}: the initial adapters (lora.init) can't be read" in told
    assert not (run / "merged").exists()
