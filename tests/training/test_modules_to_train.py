"""Weights and rows of tokens that are trained in full beside the adapters, by the real command line."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.tracking.result import Result
from gemma4_tpu.training.setup import _with_new_rows
from tests.test_new_tokens import with_reserve
from tests.training.conftest import HARD
from tests.training.test_resume import last_state

WORDS = [
    *HARD, "lora=qlora_int8", "lora.rank=4", "lora.dropout=0.1", "lora.modules_to_train=[norms,q_proj]",
    "model.new_tokens=['<result>','<note>']", "mesh.fsdp=2", "trainer.remat=decoder", "optimizer.schedule=constant",
]  # fmt: skip


@pytest.mark.slow
def test_resumed_it_ends_with_the_very_bits_and_counts_them(shallow, tmp_path):
    words = [*WORDS, f"model.tokenizer={with_reserve(tmp_path / 'tokenizer')}"]

    def train(updates, run):
        return shallow(*words, f"trainer.max_updates={updates}", f"run_dir={run}", cwd=tmp_path, devices=2)

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    done = train(2, whole)
    train(1, halves)
    train(2, halves)
    (update, expected), (_, found) = last_state(whole), last_state(halves)
    assert update == 2 and found.keys() == expected.keys()
    assert not [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    own = {name: x for name, x in expected.items() if name.startswith("trained/") and "_lora_" not in name}
    wanted = "embedder.token_rows", "final_norm.scale", "layers.1.attn.q_einsum.w"
    assert {f"trained/{name}" for name in wanted} <= own.keys()
    assert all(x.dtype == "float32" for x in own.values())
    result = Result.read(whole / "result.json")
    assert result.in_full_parameters == sum(x.size for x in own.values())
    assert f"also trained in full: {result.in_full_parameters:,} parameters" in done.stderr + done.stdout


def test_new_tokens_begin_as_the_mean_of_the_table():
    table = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    begun = _with_new_rows({"embedder": {"input_embedding": jnp.array(table)}}, (1, 4))["embedder"]["input_embedding"]
    np.testing.assert_allclose(begun[np.array([1, 4])], np.tile(table.mean(axis=0), (2, 1)), rtol=1e-5)
    np.testing.assert_array_equal(np.delete(begun, [1, 4], axis=0), np.delete(table, [1, 4], axis=0))
