"""The table of weights: what follows from a row is tested where it is used; here, what a row must not lose."""

import pytest

from gemma4_tpu.models.weights import BY_NAME, LAYER, MODULES, OUTER


def test_single_modules_are_named_as_people_name_them():
    assert {"q": "attention", "k": "attention", "v": "attention", "o": "attention"}.items() <= MODULES.items()
    assert {"gate": "mlp", "up": "mlp", "down": "mlp"}.items() <= MODULES.items()


def test_dropout_is_drawn_as_it_was_for_runs_that_go_on_from_older_checkpoints():
    folds = {weight.name: weight.fold for weight in LAYER if weight.role in ("attention", "mlp")}
    older = {
        "attn.q_einsum.w": 0, "attn.kv_einsum.w": 1, "attn.k_einsum.w": 2, "attn.attn_vec_einsum.w": 3,
        "mlp.gate_proj.kernel": 4, "mlp.up_proj.kernel": 5, "mlp.down_proj.kernel": 6,
    }  # fmt: skip
    assert older.items() <= folds.items()


def test_no_two_adapters_share_a_dropout_mask():
    folds = [weight.fold for weight in LAYER if weight.role not in (None, "experts")]  # theirs have no dropout
    assert len(set(folds)) == len(folds) and min(folds) >= 0


@pytest.mark.parametrize("weight", [*OUTER, *LAYER], ids=lambda weight: weight.name)
def test_a_weight_has_the_same_dims_on_disk_and_in_memory(weight):
    counted = "c" if len(weight.hf_names) > 1 else ""
    assert sorted(weight.dims) == sorted("".join(weight.groups) + counted)
    assert BY_NAME[weight.name] is weight
