"""`lora.start`: what was trained, here or with PEFT, is what a new run begins with; anything else is refused."""

import json
import shutil
from dataclasses import replace

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma4_tpu.architectures import from_hf_config
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.logits import forward
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import Layout, get
from gemma4_tpu.models.params import load_params
from gemma4_tpu.models.sharding import make_mesh, places
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.start import FILE, open_start
from tests.export.test_merge import peft_logits
from tests.models.checkpoints import load_hf, make_batch, make_checkpoint

BASES = [("dense", "multimodal"), ("moe", "causal"), ("e2b", "multimodal"), ("e4b", "causal")]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def arch_of(base):
    return from_hf_config(json.loads((base / "config.json").read_text()), name="test")


def begin(start, arch, base=None):
    """The tree that a run would begin with; DoRA's needs the base's folder."""
    layout = Layout.of(arch, start.lora)
    params = base and weights(base, layout)
    return start.place(adapters.init(layout, jax.random.key(5), params), layout, mesh_of_one(), params)


def mesh_of_one():
    return make_mesh(1, 1, jax.devices()[:1])


def weights(base, layout):
    return load_params(Checkpoint(str(base)), layout.arch, layout, places(layout, mesh_of_one()), np.float32)


def logits(base, lora, tree, tokens):
    """Logits [B, T, V] of base + adapters by the forward pass of training."""
    layout = Layout.of(arch_of(base), lora)
    model = Model(layout=layout, compute_dtype=jnp.float32, mesh=mesh_of_one())
    return np.asarray(forward(model, weights(base, layout), tree, tokens, np.ones_like(tokens)))


@pytest.mark.parametrize(("kind", "prefix"), BASES)
def test_from_a_run_and_from_its_export_to_the_bit(kind, prefix, run_of, merge):
    """Its own adapters, so that loss and logits are those of the run: the same arrays go into the same program."""
    run, base = run_of(kind, prefix=prefix)
    merge(run, "export=peft")
    trained, arch = open_trained(run, ExportConfig()), arch_of(base)
    for folder in (run, run / "adapter"):
        start = open_start(replace(trained.lora, start=str(folder)), arch)
        tree = begin(start, arch)
        assert not start.fresh and not start.idle
        for leaf in adapters.leaves(trained.layout):
            for number, name in enumerate(leaf.tunix_names):
                np.testing.assert_array_equal(np.asarray(get(tree, leaf.path))[number], trained.state.read(name))


def test_from_adapters_of_some_layers_modules_and_ranks_to_the_bit(run_of, merge):
    lora = LoraConfig(rank=4, alpha=8.0, targets=["v", "o"], layers=["1-7"], ranks={"layers.2.*": 6})
    run, base = run_of(lora=lora)
    merge(run, "export=peft")
    trained, arch = open_trained(run, ExportConfig()), arch_of(base)
    for folder in (run, run / "adapter"):
        start = open_start(replace(lora, start=str(folder)), arch)
        tree = begin(start, arch)
        assert not start.fresh and not start.idle
        for leaf in adapters.leaves(trained.layout):
            for number, name in enumerate(leaf.tunix_names):
                np.testing.assert_array_equal(np.asarray(get(tree, leaf.path))[number], trained.state.read(name))
    with pytest.raises(UserError, match=r"lora\.layers=\[1-5\] leaves out .*layers\.6\..*lora\.layers=null"):
        open_start(replace(lora, layers=["1-5"], start=str(run)), arch)


def test_dora_from_a_run_and_from_its_export_to_the_bit(run_of, merge):
    lora = LoraConfig(rank=4, alpha=8.0, dora=True, targets=["v", "o"])
    run, base = run_of(lora=lora)
    merge(run, "export=peft")
    trained, arch = open_trained(run, ExportConfig()), arch_of(base)
    for folder in (run, run / "adapter"):
        tree = begin(open_start(replace(lora, start=str(folder)), arch), arch, base)
        for leaf in adapters.leaves(trained.layout):
            for number, name in enumerate(leaf.tunix_names):
                np.testing.assert_array_equal(np.asarray(get(tree, leaf.path))[number], trained.state.read(name))
        with pytest.raises(UserError, match=r"also trained row lengths \(DoRA\); set lora\.dora=true"):
            open_start(replace(lora, dora=False, start=str(folder)), arch)


def test_dora_from_plain_adapters_begins_as_the_same_model(run_of):
    """Magnitudes are the lengths that rows have, also where fresh ranks are added and where nothing was given."""
    run, base = run_of(lora=LoraConfig(rank=4, alpha=8.0, targets=["v", "o"]))
    arch, tokens = arch_of(base), np.maximum(make_batch(batch=1, length=16)[0], 3)
    plain = LoraConfig(rank=4, alpha=8.0, targets=["v", "o"], start=str(run))
    wider = LoraConfig(rank=6, alpha=12.0, targets=["v", "o", "up"], dora=True, start=str(run))
    before, after = (
        logits(base, lora, begin(open_start(lora, arch), arch, base), tokens) for lora in (plain, wider)
    )  # fmt: skip
    np.testing.assert_allclose(after, before, atol=1e-4)  # of 10: a division by a norm and its product, in fp32


@pytest.mark.slow
def test_dora_from_what_peft_saved(by_peft):
    base, folder = by_peft("e2b", "causal", use_dora=True)
    lora = LoraConfig(rank=8, alpha=16.0, dora=True, start=str(folder))
    tree = begin(open_start(lora, arch_of(base)), arch_of(base), base)
    tokens = np.maximum(make_batch(batch=2, length=32)[0], 3)
    np.testing.assert_allclose(logits(base, lora, tree, tokens), peft_logits(base, folder, tokens), atol=2e-3)


@pytest.fixture(scope="module")
def by_peft(tmp_path_factory):
    """Makes an adapter with PEFT itself, B not zero: (base, adapter folder)."""

    def make(kind, prefix, **settings):
        import torch
        from peft import LoraConfig as Theirs
        from peft import get_peft_model

        base = make_checkpoint(kind, prefix=prefix)
        folder = tmp_path_factory.mktemp(f"{kind}-{prefix}")
        load_hf.cache_clear()  # PEFT changes the model in place
        torch.manual_seed(0)
        towers = r".*language_model\." if prefix == "multimodal" else r"model\."
        modules = "|".join(ALL_LINEAR)
        options = {"r": 4, "lora_alpha": 8, "target_modules": rf"{towers}layers\.\d+\.\w+\.({modules})", **settings}
        model = get_peft_model(load_hf(base), Theirs(task_type="CAUSAL_LM", **options))
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.05)
            elif "magnitude" in name:
                value.data *= 1.2
        model.save_pretrained(folder)
        load_hf.cache_clear()
        return base, folder

    return make


@pytest.mark.parametrize(("kind", "prefix"), BASES)
@pytest.mark.slow
def test_from_what_peft_saved(kind, prefix, by_peft):
    """K and V of PEFT have an A each, which takes 4 + 4 ranks where they share one; alpha follows the rank."""
    base, folder = by_peft(kind, prefix)
    lora = LoraConfig(rank=8, alpha=16.0, start=str(folder))
    start = open_start(lora, arch_of(base))
    assert len(start.given) == len(load_file(folder / WEIGHTS)) // 2 and not start.fresh
    tokens = np.maximum(make_batch(batch=2, length=32)[0], 3)
    ours = logits(base, lora, begin(start, arch_of(base)), tokens)
    # fp32 on both sides; the forward passes alone differ by up to 3e-4 (E4B), see test_merge.py
    np.testing.assert_allclose(ours, peft_logits(base, folder, tokens), atol=2e-3)


def copy_with(folder, target, *, name=lambda name: name, value=lambda name, x: x, **config):
    """The adapter with other names, values or configuration."""
    target.mkdir()
    tensors = {name(key): value(key, x) for key, x in load_file(folder / WEIGHTS).items()}
    save_file(tensors, target / WEIGHTS)
    recorded = json.loads((folder / CONFIG).read_text()) | config
    (target / CONFIG).write_text(json.dumps(recorded))
    return target


@pytest.fixture(scope="module")
def dense(by_peft):
    return by_peft("dense", "causal")


SPELLINGS = {
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "language_model inside": lambda key: key.replace("model.layers", "model.language_model.layers"),
    "older language_model": lambda key: key.replace("model.model.layers", "model.language_model.model.layers"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "compiled": lambda key: f"_orig_mod.{key}",
    "checkpointed, FSDP": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn").replace(
        "base_model", "_fsdp_wrapped_module.base_model"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_adapter(spelling, dense, tmp_path):
    base, folder = dense
    other = copy_with(folder, tmp_path / "other", name=SPELLINGS[spelling])
    lora = LoraConfig(rank=8, alpha=16.0)
    one, two = (open_start(replace(lora, start=str(place)), arch_of(base)) for place in (folder, other))
    assert one.given.keys() == two.given.keys()
    trees = [begin(start, arch_of(base)) for start in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_patterns_mean_the_module_whatever_it_was_wrapped_in(spelling, dense, tmp_path):
    """A pattern that no longer matches would be a scale that nothing checks."""
    base, folder = dense
    pattern = {"layers.0.self_attn.q_proj": 16}
    other = copy_with(folder, tmp_path / "other", name=SPELLINGS[spelling], alpha_pattern=pattern)
    start = open_start(LoraConfig(rank=8, alpha=16.0, start=str(other)), arch_of(base))
    assert [n for n, given in start.given.items() if given.scale == 4] == ["layers.0.self_attn.q_proj.weight"]


def test_from_a_bucket(dense):
    base, folder = dense
    for name in (WEIGHTS, CONFIG):
        fsspec.filesystem("memory").pipe(f"/adapter/{name}", (folder / name).read_bytes())
    lora = LoraConfig(rank=8, alpha=16.0)
    starts = [open_start(replace(lora, start=str(place)), arch_of(base)) for place in (folder, "memory://adapter")]
    assert starts[0].sha256 == starts[1].sha256
    jax.tree.map(np.testing.assert_array_equal, *[begin(start, arch_of(base)) for start in starts])


def test_a_scale_that_is_a_power_of_two_away_goes_into_b(dense, caplog):
    base, folder = dense
    tokens = np.maximum(make_batch(batch=1, length=16)[0], 3)
    made = []
    for alpha in (16.0, 4.0):  # 2 as in the adapter, and a quarter of it
        lora = LoraConfig(rank=8, alpha=alpha, start=str(folder))
        made.append(logits(base, lora, begin(open_start(lora, arch_of(base)), arch_of(base)), tokens))
    np.testing.assert_array_equal(*made)


def test_a_smaller_rank_is_filled_up_with_fresh_ranks(run_of):
    run, base = run_of(lora=LoraConfig(rank=4, alpha=8.0))
    arch, lora = arch_of(base), LoraConfig(rank=6, alpha=12.0, start=str(run))
    initial = adapters.init(Layout.of(arch, lora), jax.random.key(5))
    tree, state = begin(open_start(lora, arch), arch), open_trained(run, ExportConfig()).state
    for adapter in adapters.adapters(Layout.of(arch, lora)):
        a, b = (np.asarray(get(tree, leaf.path)) for leaf in (adapter.a, adapter.b))
        np.testing.assert_array_equal(a[0, ..., :4], state.read(adapter.a.tunix_names[0]))
        np.testing.assert_array_equal(a[..., 4:], np.asarray(get(initial, adapter.a.path))[..., 4:])
        np.testing.assert_array_equal(b[0, :4], state.read(adapter.b.tunix_names[0]))
        assert not b[:, 4:].any()


def test_what_nothing_was_given_for_starts_afresh_and_is_named(by_peft, tmp_path, caplog):
    base, folder = by_peft("moe", "causal", target_modules=["q_proj", "v_proj"])
    lora = LoraConfig(rank=4, alpha=8.0, start=str(folder))
    start = open_start(lora, arch_of(base))
    assert "layers.0.self_attn.k_proj.weight" in start.fresh and "layers.0.mlp.up_proj.weight" in start.fresh
    with caplog.at_level("INFO"):
        start.tell(RunFolder(tmp_path, write=True), base="")
    assert f"nothing given for {len(start.fresh)} weights" in caplog.text
    record = json.loads((tmp_path / FILE).read_text())
    assert record["fresh"] == start.fresh and record["given"] == sorted(start.given)
    tree, initial = begin(start, arch_of(base)), adapters.init(Layout.of(arch_of(base), lora), jax.random.key(5))
    same = tree["stages"][0][0]["mlp"]["up_proj"]["kernel_lora_a"]
    np.testing.assert_array_equal(same, initial["stages"][0][0]["mlp"]["up_proj"]["kernel_lora_a"])


def test_whose_adapters_they_are_is_told(run_of, dense, tmp_path, caplog):
    run, base = run_of()
    start = open_start(LoraConfig(rank=4, alpha=8.0, start=str(run)), arch_of(base))
    start.tell(RunFolder(tmp_path, write=True), base=start.base)
    assert "another base" not in caplog.text
    start.tell(RunFolder(tmp_path, write=True), base="f" * 64)
    assert f"trained on another base (fingerprint {start.base[:12]}, here ffffffffffff)" in caplog.text
    base, folder = dense
    place = copy_with(folder, tmp_path / "named", base_model_name_or_path="google/gemma-4-31B-it")
    named = open_start(LoraConfig(rank=8, alpha=16.0, start=str(place)), arch_of(base))
    assert named.source == f"PEFT adapter {place} (trained on google/gemma-4-31B-it)"  # which the log begins with


def of_a_tower(folder, target, *, trained):
    """As PEFT saves an adapter of all linear modules: those of the vision tower had no gradient, their B stayed 0."""
    tensors = load_file(folder / WEIGHTS)
    module = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"
    tensors |= {f"{module}.lora_A.weight": np.ones((4, 16), np.float32)}
    tensors |= {f"{module}.lora_B.weight": np.full((16, 4), float(trained), np.float32)}
    shutil.copytree(folder, target)
    save_file(tensors, target / WEIGHTS)
    return target


def test_what_adds_nothing_is_left_out_and_named(dense, tmp_path):
    base, folder = dense
    lora = LoraConfig(rank=8, alpha=16.0, start=str(of_a_tower(folder, tmp_path / "idle", trained=False)))
    assert open_start(lora, arch_of(base)).idle == ("vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",)


REFUSALS = {
    "ranks add up": ({"rank": 4, "alpha": 8.0}, {}, r"needs rank 8 \(K and V share A.*lora.rank=8 lora.alpha=16\b"),
    "rank too small": ({"rank": 2}, {}, "lora.rank is 2"),
    "scale": ({"rank": 8, "alpha": 12.0}, {}, r"scale is 2, here it is 1.5.*give lora.rank=8 lora.alpha=16\b"),
    "scales that no alpha fits": ({}, {"alpha_pattern": {"q_proj": 24}}, r"scale is 6, here it is 2: .*rounded; merge"),
    "more than LoRA": ({}, {"bias": "lora_only"}, r"bias=lora_only: .*merge_and_unload\) and give model.path="),
    "targets": (
        {"targets": ["mlp"]},
        {},
        r"lora.targets=\[mlp\] leaves out .*q_proj.*give lora.targets=\[attention,mlp\]",
    ),
    "DoRA without magnitudes": ({"dora": True}, {"use_dora": True}, "no magnitudes, but .* says use_dora=true"),
    "a key of a later PEFT": ({}, {"use_novelty": {"depth": 2}}, "use_novelty="),
    "whole modules": ({}, {"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
    "PiSSA": ({}, {"init_lora_weights": "pissa"}, "init_lora_weights=pissa: changed the base weights"),
    "another method": ({}, {"peft_type": "LOHA"}, "peft_type=LOHA: only LORA"),
    "another rank in the configuration": ({}, {"r": 5}, "says rank 5"),
    "a pattern": ({}, {"alpha_pattern": {"(a+)+b": 3}}, "regular expressions, but only module names are read"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_begun_from_is_refused(case, dense, tmp_path):
    base, folder = dense
    ours, theirs, told = REFUSALS[case]
    place = copy_with(folder, tmp_path / "other", **theirs)
    lora = LoraConfig(**{"rank": 8, "alpha": 16.0, **ours}, start=str(place))
    with pytest.raises(UserError, match=f"(?s){told}"):
        open_start(lora, arch_of(base))


def renamed(old, new):
    return {"name": lambda key: key.replace(old, new)}


DAMAGE = {
    "a trained tower": (lambda f, t: of_a_tower(f, t, trained=True), "get no adapters.*vision_tower"),
    "an expert": (
        lambda f, t: copy_with(f, t, **renamed("0.mlp.up_proj", "0.experts.base_layer")),
        "experts.base_layer",
    ),
    "another layer": (lambda f, t: copy_with(f, t, **renamed("layers.1.", "layers.99.")), r"layers\.99\."),
    "A without B": (lambda f, t: copy_with(f, t, **renamed("0.mlp.up_proj.lora_B", "0.mlp.x.lora_B")), "A without B"),
    "no adapter": (
        lambda f, t: copy_with(f, t, **renamed("0.mlp.up_proj.lora_", "0.mlp.up_proj.hada_")),
        "neither the A or B",
    ),
    "NaN": (lambda f, t: copy_with(f, t, value=lambda _, x: x * np.float32("nan")), "NaN or infinity"),
    "all zero": (lambda f, t: copy_with(f, t, **renamed("layers", "blocks"), value=lambda _, x: x * 0), "adds nothing"),
    "another size": (
        lambda f, t: copy_with(f, t, value=lambda n, x: x[:, :-1] if "lora_A" in n else x),
        "another shape",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_are_not_these_adapters_are_refused(case, dense, tmp_path):
    base, folder = dense
    spoil, told = DAMAGE[case]
    lora = LoraConfig(rank=8, alpha=16.0, start=str(spoil(folder, tmp_path / "other")))
    with pytest.raises(UserError, match=f"(?s){told}"):
        begin(open_start(lora, arch_of(base)), arch_of(base))


def test_a_pickle_is_never_read(dense, tmp_path):
    base, folder = dense
    shutil.copy(folder / CONFIG, tmp_path / CONFIG)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UserError, match=r"adapter_model\.bin: pickled, and pickles are not read"):
        open_start(LoraConfig(start=str(tmp_path)), arch_of(base))


def test_other_folders_are_refused(run_of, tmp_path, dense):
    full, base = run_of(lora=LoraConfig(enabled=False))
    with pytest.raises(UserError, match=r"trained every weight .*model\.path="):
        open_start(LoraConfig(start=str(full)), arch_of(base))
    with pytest.raises(UserError, match=r"neither a run folder .* nor a PEFT adapter"):
        open_start(LoraConfig(start=str(base)), arch_of(base))
    shutil.copytree(dense[1], tmp_path / "trainer" / "checkpoint-40")
    with pytest.raises(UserError, match=rf"give one of the adapters below it: {tmp_path}/trainer/checkpoint-40$"):
        open_start(LoraConfig(start=str(tmp_path / "trainer")), arch_of(dense[0]))


def test_which_checkpoint(run_of):
    run, base = run_of(updates=(3, 5), best=3)
    arch, lora = arch_of(base), LoraConfig(rank=4, alpha=8.0, start=str(run))
    assert [open_start(replace(lora, start_checkpoint=which), arch).source.split()[1] for which in
            ("latest", "best", "3")] == ["5", "3", "3"]  # fmt: skip
    with pytest.raises(UserError, match=r"lora\.start_checkpoint=4: .* has no such checkpoint; there are 3, 5"):
        open_start(replace(lora, start_checkpoint="4"), arch)
