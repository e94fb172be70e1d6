"""`lora.modules_to_train`: the same training as PEFT's `modules_to_save`, on every mesh and under every policy."""

import math
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.config.schema import LoraConfig, OptimizerConfig
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import quantize, sharding, token_rows
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import Layout, build_tree, get, without
from gemma4_tpu.models.params import load_params, random_params
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.step.optimizer import make_optimizer
from gemma4_tpu.step.train_step import Step
from gemma4_tpu.training.checkpoint import Checkpoints
from gemma4_tpu.training.saved import SavedState
from gemma4_tpu.training.start import open_start
from tests.export.test_start import arch_of
from tests.house.scripts import ROOT
from tests.models.checkpoints import VOCAB_SIZE, load_hf, make_checkpoint
from tests.step.test_train_step import make_batch, mesh_of, relative_difference, small, started

RATE, UPDATES = 1e-3, 4
LORA = LoraConfig(rank=4, alpha=8.0, targets=["mlp"], modules_to_train=["norms", "embeddings"])
TEXT = {"causal": "model", "multimodal": "language_model"}


def the_step(arch, lora, mesh, **settings):
    model = Model(layout=Layout.of(arch, lora), compute_dtype=jnp.float32, mesh=mesh, **settings)
    leaves = adapters.trained_leaves(model.layout, len(model.token_rows))
    return Step(model, make_optimizer(OptimizerConfig(learning_rate=RATE, schedule="constant"), UPDATES, leaves), 16)


def batch_of(vocab, seed):
    batch = make_batch(2, seed)
    return batch | {name: batch[name] % (vocab - 3) + 3 for name in ("tokens", "targets")}


def peft_model(kind, prefix, modules, folder):
    """A model of PEFT with adapters on the MLPs and whole modules beside them, saved to `folder`."""
    import torch
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    base = make_checkpoint(kind, prefix=prefix)
    load_hf.cache_clear()  # PEFT changes the model in place
    plain = load_hf(base)
    whole = [n for n, module in plain.named_modules() if f"{TEXT[prefix]}." in n and any(m in n for m in modules)
             and getattr(module, "weight", None) is not None]  # fmt: skip
    torch.manual_seed(0)
    tower = r".*language_model\." if prefix == "multimodal" else r"model\."
    model = get_peft_model(plain, Theirs(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=rf"{tower}layers\.\d+\.mlp\.\w+_proj",
        modules_to_save=whole, ensure_weight_tying="embed_tokens" in modules,
    ))  # fmt: skip
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(folder)
    load_hf.cache_clear()
    return base, model


def peft_losses(model, batches):
    """Losses of PEFT's model under torch's AdamW, clipped like ours; segments as rows of their own."""
    import torch

    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for batch in batches:
        total = 0.0
        for row in range(batch["tokens"].shape[1]):
            for segment in (1, 2):
                at = batch["segment_ids"][0, row] == segment
                tokens, targets = (torch.tensor(batch[n][0, row, at]).long() for n in ("tokens", "targets"))
                logits = model(tokens[None]).logits[0].float()
                nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                total = total + nll[torch.tensor(batch["target_mask"][0, row, at])].sum()
        loss = total / int(batch["target_mask"].sum())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def ours(step, base, trained, batches):
    """Losses of as many updates, and the values after them."""
    state, train, losses = started(step, trained), jax.jit(step.train), []
    for batch in batches:
        state, metrics = train(state, base, batch)
        losses.append(float(metrics.loss))
    return losses, state.trained


def trained_tree(layout, params, factors):
    """Initial values: adapters, and the base's where it is trained in full."""
    own = {leaf.path for leaf in layout.trained_in_full()}
    leaves = adapters.trained_leaves(layout)
    return build_tree((leaf.path, get(params if leaf.path in own else factors, leaf.path)) for leaf in leaves), own


KINDS = [
    ("dense", "causal", ["norm", "embed_tokens"], ["norms", "embeddings"]),
    ("e2b", "multimodal", ["norm", "per_layer_"], ["norms", "per_layer_projections"]),
]


@pytest.mark.parametrize(("kind", "prefix", "theirs", "modules"), KINDS)
@pytest.mark.slow
def test_losses_are_those_of_peft(kind, prefix, theirs, modules, tmp_path):
    base, model = peft_model(kind, prefix, theirs, tmp_path)
    arch, lora = arch_of(base), replace(LORA, modules_to_train=modules, start=str(tmp_path))
    layout, mesh = Layout.of(arch, lora), mesh_of(1, 1)
    params = load_params(Checkpoint(str(base)), arch, layout, sharding.places(layout, mesh), np.float32)
    initial, own = trained_tree(layout, params, adapters.init(layout, jax.random.key(5)))
    trained = open_start(lora, arch).place(initial, layout, mesh)
    batches = [batch_of(VOCAB_SIZE, seed) for seed in range(UPDATES)]
    losses, after = ours(the_step(arch, lora, mesh), without(params, own), trained, batches)
    # Before the first update, fp32 in another order. Then Adam moves a value by the whole rate however small its
    # gradient is: those that are rounding alone move either way, a few in a thousand.
    expected = peft_losses(model, batches)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
    last = f"{TEXT[prefix]}.norm.modules_to_save.default.weight"
    (norm,) = [value for name, value in model.named_parameters() if name.endswith(last)]
    moved = np.asarray(after["final_norm"]["scale"])
    assert np.median(np.abs(moved - np.asarray(params["final_norm"]["scale"]))) > RATE
    assert np.median(np.abs(moved - norm.detach().numpy())) < 0.01 * RATE


@pytest.mark.parametrize(("shape", "remat"), [((2, 2), "none"), ((1, 1), "decoder")])
@pytest.mark.slow
def test_gradients_agree_across_meshes_and_under_remat(shape, remat):
    """fp32 sums of some hundred addends in another order."""
    found, expected = gradients(shape, remat), gradients((1, 1), "none")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert relative_difference(found[1], expected[1]) < 5e-5


@cache
def gradients(shape, remat):
    arch, mesh = small("tiny_e2b"), mesh_of(*shape)
    lora = replace(LORA, modules_to_train=["norms", "embeddings", "per_layer_projections", "self_attn.q_proj"])
    layout = Layout.of(arch, lora)
    params = random_params(arch, layout, sharding.places(layout, mesh), jnp.float32, 0)
    place = adapters.shardings(layout, mesh)
    factors = jax.jit(partial(adapters.init, layout), out_shardings=place)(jax.random.key(1))
    trained, own = trained_tree(layout, params, factors)
    step = the_step(arch, lora, mesh, remat=remat)
    return jax.jit(step.gradients)(step.init(trained, jax.random.key(0)), without(params, own), make_batch(4))


def test_such_weights_get_no_adapter_and_stay_unquantised():
    lora = LoraConfig(quantize="int8", modules_to_train=["down_proj", "k_proj", "v_proj"])
    layout = Layout.of(small("tiny"), lora)
    adapted = {adapter.base.weight.name for adapter in adapters.adapters(layout)}
    quantised = {leaf.weight.name for leaf in layout.leaves() if quantize.is_quantized(leaf, lora)}
    assert adapted == quantised
    assert layout.in_full == {"mlp.down_proj.kernel", "attn.kv_einsum.w", "attn.k_einsum.w"}
    assert not adapted & layout.in_full and "attn.q_einsum.w" in adapted


def test_the_page_counts_the_parameters_of_each_group():
    page = (ROOT / "docs/new_tokens.md").read_text(encoding="utf-8")
    sizes = [ARCHITECTURES[f"gemma4_{size}"] for size in ("e2b", "e4b", "12b", "26b_a4b", "31b")]
    for group in ("norms", "embeddings", "per_layer_projections"):
        layouts = [Layout.of(arch, LoraConfig(modules_to_train=[group])) for arch in sizes]
        counts = [sum(math.prod(leaf.array_shape) for leaf in one.trained_in_full()) for one in layouts]
        cell = next(line for line in page.splitlines() if line.startswith(f"| `{group}` |")).split("|")[3]
        told = [float(number) * {"M": 1e6, "G": 1e9}[unit] for number, unit in re.findall(r"([\d.]+) ([MG])", cell)]
        np.testing.assert_allclose(told, list(filter(None, counts)), rtol=0.08)  # one digit: 0.6 for 0.56


@pytest.mark.slow
def test_rows_of_tokens_have_the_gradient_that_they_have_in_the_whole_table():
    """To which the others' part in the table adds nothing; fp32 sums in another order."""
    arch, mesh, ids = small("tiny"), mesh_of(2, 2), (5, 499, 77)
    layout, batch = Layout.of(arch), make_batch(4)
    batch["tokens"][:, :, 3] = batch["targets"][:, :, 2] = ids[1]
    params = random_params(arch, layout, sharding.places(layout, mesh), jnp.float32, 0)
    factors = adapters.init(Layout.of(arch, replace(LORA, modules_to_train=[])), jax.random.key(1))
    found = {}
    for modules in ([], ["embeddings"]):
        lora = replace(LORA, modules_to_train=modules)
        layout = Layout.of(arch, lora)
        step = the_step(arch, lora, mesh, token_rows=token_rows.trained_alone(layout, ids))
        trained, own = trained_tree(layout, params, factors)
        if not modules:
            trained.setdefault("embedder", {})["token_rows"] = params["embedder"]["input_embedding"][jnp.array(ids)]
        state = step.init(trained, jax.random.key(0))
        loss, grads, *_ = jax.jit(step.gradients)(state, without(params, own), batch)
        found[len(modules)] = loss, grads["embedder"]["token_rows" if not modules else "input_embedding"]
    rows, table = np.asarray(found[0][1]), np.asarray(found[1][1])
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(rows, table[list(ids)], atol=5e-5 * np.abs(table).max())
    assert (np.abs(rows).max(axis=1) > 0).all()


def begun(arch, lora, **settings):
    """(step, frozen weights, trained values before the first update) with random weights on one device."""
    mesh = mesh_of(1, 1)
    step = the_step(arch, lora, mesh, **settings)
    layout = step.model.layout
    params = random_params(arch, layout, sharding.places(layout, mesh), jnp.float32, 0)
    trained, own = trained_tree(layout, params, adapters.init(layout, jax.random.key(1), params))
    if ids := step.model.token_rows:
        trained.setdefault("embedder", {})["token_rows"] = token_rows.take(params["embedder"]["input_embedding"], ids)
    return step, without(params, own), trained


def test_dora_and_whole_weights_do_not_disturb_each_other():
    """From the same point the gradients of each are those that it has without the other."""
    arch, dora = small("tiny"), LoraConfig(rank=4, dora=True, targets=["o", "up"], modules_to_train=["norms", "q_proj"])
    found = []
    for lora in (dora, replace(dora, modules_to_train=[]), replace(dora, dora=False)):
        step, base, trained = begun(arch, lora)
        _, grads, *_ = jax.jit(step.gradients)(step.init(trained, jax.random.key(0)), base, make_batch(2))
        found.append(dict(jax.tree_util.tree_leaves_with_path(grads)))
    together, *apart = found
    for path, grad in together.items():
        others = [grads[path] for grads in apart if path in grads]
        assert others, path
        assert np.abs(grad).max() > 0 or "lora_a" in str(path[-1])  # nothing goes through a B that is zero
        for other in others:  # magnitudes are the rows' lengths: a ratio of 1, and fp32 sums in another order
            np.testing.assert_allclose(grad, other, atol=5e-5 * np.abs(grad).max(), err_msg=str(path))


def test_an_average_is_kept_of_whole_weights_too_and_saved(tmp_path):
    """Of two updates at a decay of 1/2: one part of the first, two of the second."""
    step, base, trained = begun(small("tiny"), replace(LORA, targets=["o"], modules_to_train=["norms", "q_proj"]))
    step = replace(step, ema_decay=0.5)
    state, train, after = started(step, trained), jax.jit(step.train), []
    for seed in range(2):
        state, _ = train(state, base, make_batch(2, seed))
        after.append(state.trained)
    layout = step.model.layout
    saver = Checkpoints(tmp_path, CheckpointConfig(), adapters.trained_leaves(layout), step.model.mesh)
    saver.save(state, {})
    saver.wait()
    saved = SavedState(str(tmp_path / "2"), 2)
    for leaf in layout.trained_in_full():
        first, second = (np.asarray(get(tree, leaf.path)) for tree in after)
        expected = (first + 2 * second) / 3
        assert np.abs(first - second).max() > 0
        np.testing.assert_allclose(get(state.average, leaf.path), expected, rtol=1e-5)
        exported = [saved.read(name) for name in leaf.tunix_names]
        np.testing.assert_array_equal(exported if leaf.stacked else exported[0], get(state.average, leaf.path))
    restored, _ = saver.restore(2, state)
    jax.tree.map(np.testing.assert_array_equal, (restored.trained, restored.average), (state.trained, state.average))
    saver.close()


def test_gradients_reach_the_rows_of_tokens_below_the_first_adapted_layer():
    """What has no adapter runs forward only, unless something below it is trained."""
    arch, ids, batch, found = small("tiny"), (5, 77), make_batch(2), []
    batch["tokens"][:, :, 3] = batch["tokens"][:, :, 9] = ids[0]
    batch["targets"][:, :, 2] = ids[1]
    for layers in (["1"], None):  # at first adapters add nothing, wherever they are
        lora = LoraConfig(rank=4, targets=["o"], layers=layers)
        step, base, trained = begun(arch, lora, token_rows=ids)
        _, grads, *_ = jax.jit(step.gradients)(step.init(trained, jax.random.key(0)), base, batch)
        found.append(np.asarray(grads["embedder"]["token_rows"]))
    assert (np.abs(found[0]).max(axis=1) > 0).all()
    np.testing.assert_allclose(*found, atol=5e-5 * np.abs(found[1]).max())
