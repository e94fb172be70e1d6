"""Ceilings against arithmetic done by hand, and the ways in which they must move."""

import random

import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.costing import ceiling
from gemma4_tpu.costing.ceiling import COMPUTE, HBM, DoesNotFit, ModelDemand, Serving
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.models.kv_cache import kv_cache_bytes

DENSE, EXPERTS, SMALL = (ModelDemand.of(ARCHITECTURES[name]) for name in ("gemma4_31b", "gemma4_26b_a4b", "gemma4_e2b"))
V6E8, V6E4 = SLICES["v6e-8"], SLICES["v6e-4"]


def test_a_decode_step_of_31b_by_hand():
    # Weights: 30.7 B in two bytes. Cache at 4,096 tokens in fp8: 50 sliding layers keep keys and values of 1,024 tokens
    # (16 heads of 256), 10 global layers at least the keys of all (4 heads of 512).
    cache = 50 * 1024 * 2 * 16 * 256 + 10 * 4096 * 4 * 512
    seconds = (30_697_345_340 * 2 + 30 * cache) / (8 * 1640e9)
    step = ceiling.decode(Serving(model=DENSE, slice=V6E8, kv_dtype="fp8"), 4096, 30)
    assert step.seconds == pytest.approx(seconds)
    assert (step.tokens, step.bound_by) == (30, HBM)
    assert step.tokens_per_second == pytest.approx(30 / seconds)
    assert "61.4 GB of weights + 30 × 503 MB of cache) ÷ 13.1 TB/s = 5.83 ms" in step.arithmetic


def test_a_prompt_of_31b_by_hand():
    # 29.3 B multiplied parameters without the output table, attention over the causal mean, the table for one token.
    table = 262_144 * 5376
    window = (1024 * 1025 / 2 + 3072 * 1024) / 4096
    attention = 4 * 32 * (50 * 256 * window + 10 * 512 * 4097 / 2)
    flops = 4096 * (2 * (30_696_013_824 - table) + attention) + 2 * table
    first = ceiling.prefill(Serving(model=DENSE, slice=V6E8), 4096, one_request=True)
    assert first.seconds == pytest.approx(flops / (8 * 918e12))
    assert first.bound_by == COMPUTE


def test_a_short_prompt_alone_waits_for_the_weights():
    alone = ceiling.prefill(Serving(model=DENSE, slice=V6E8), 16, one_request=True)
    assert alone.bound_by == HBM
    assert alone.seconds > 10 * ceiling.prefill(Serving(model=DENSE, slice=V6E8), 16).seconds


@pytest.mark.parametrize("model", [DENSE, EXPERTS, SMALL], ids=lambda model: model.name)
@pytest.mark.parametrize("tokens", [1, 700, 5000])
def test_cache_is_what_engines_keep_without_values_that_follow_from_keys(model, tokens):
    arch = model.arch
    values = sum(
        tokens * arch.num_global_kv_heads * arch.global_head_dim * 2
        for i in range(arch.num_layers)
        if arch.is_global(i)
    )
    kept = kv_cache_bytes(arch, tokens, 2)
    assert model.kv_bytes(tokens, 2) == (kept - values if arch.k_eq_v else kept)


def test_beyond_the_window_only_global_layers_grow():
    grown = DENSE.kv_bytes(3000, 1) - DENSE.kv_bytes(2000, 1)
    assert grown == 1000 * 10 * 4 * 512


def test_experts_read_are_those_that_a_batch_chooses():
    assert EXPERTS.read(1) == pytest.approx(EXPERTS.multiplied, rel=1e-3)  # norms are read, not multiplied with
    assert EXPERTS.read(4096) == pytest.approx(EXPERTS.parameters, rel=1e-6)
    assert EXPERTS.read(4096, alike=True) == EXPERTS.read(1)
    rng = random.Random(0)
    drawn = [len({e for _ in range(16) for e in rng.sample(range(128), 8)}) for _ in range(2000)]
    expected = sum(drawn) / len(drawn)
    one = 30 * 3 * 2816 * 704
    # The mean of 2,000 draws with a deviation of about 3.4 experts is within 0.3 (four standard errors).
    assert (EXPERTS.read(16) - EXPERTS.read(1)) / one + 8 == pytest.approx(expected, abs=0.3)


def test_embeddings_per_layer_are_looked_up_not_read():
    arch = SMALL.arch
    assert SMALL.parameters - SMALL.read(1) == 262_144 * arch.num_layers * arch.per_layer_input_dim


def test_replicas_read_weights_of_their_own():
    one = ceiling.decode(Serving(model=DENSE, slice=V6E8, weights_dtype="fp8"), 1024, 64)
    two = ceiling.decode(Serving(model=DENSE, slice=V6E8, weights_dtype="fp8", replicas=2), 1024, 64)
    assert two.seconds - one.seconds == pytest.approx(DENSE.parameters / (8 * 1640e9))
    alone = ceiling.prefill(Serving(model=DENSE, slice=V6E8, replicas=2), 4096, one_request=True)
    assert alone.seconds == 2 * ceiling.prefill(Serving(model=DENSE, slice=V6E8), 4096).seconds


def test_eight_bits_double_the_peak_and_halve_the_reads():
    half, full = (Serving(model=DENSE, slice=V6E8, weights_dtype=dtype) for dtype in ("int8", "bfloat16"))
    assert ceiling.prefill(half, 2048).tokens_per_second == 2 * ceiling.prefill(full, 2048).tokens_per_second
    assert half.weight_bytes * 2 == full.weight_bytes


def test_speculated_tokens_share_the_reads_until_compute_binds():
    plain = ceiling.decode(Serving(model=DENSE, slice=V6E8), 512, 8)
    guessed = ceiling.decode(Serving(model=DENSE, slice=V6E8, speculated=3), 512, 8)
    assert guessed.tokens_per_second == pytest.approx(4 * plain.tokens_per_second)
    crowd = ceiling.decode(Serving(model=EXPERTS, slice=V6E4, speculated=3), 16, 2048)
    assert crowd.bound_by == COMPUTE


def test_sequences_without_room_wait():
    serving = Serving(model=DENSE, slice=SLICES["h100x2"])
    room = serving.room(15360)
    assert room == int((160e9 - DENSE.parameters * 2) // DENSE.kv_bytes(15360, 2))
    assert ceiling.decode(serving, 15360, 10_000) == ceiling.decode(serving, 15360, room)
    assert ceiling.decode(serving, 15360, None) == ceiling.decode(serving, 15360, room)


def test_what_does_not_fit_has_no_ceiling():
    with pytest.raises(DoesNotFit, match=r"61\.\d GB of weights and one sequence's cache, 33\.6 GB of HBM on v6e-1"):
        ceiling.decode(Serving(model=DENSE, slice=SLICES["v6e-1"]), 512, 1)


def test_prompts_take_their_share_of_whole_requests():
    serving = Serving(model=DENSE, slice=SLICES["h100x2"])
    whole = ceiling.served(serving, 15360, 512, 30)
    assert whole.bound_by == COMPUTE
    assert whole.tokens_per_second < ceiling.decode(serving, 15360, 30).tokens_per_second
    assert whole.tokens_per_second < 512 / ceiling.prefill(serving, 15360).seconds


def test_a_model_that_fits_on_the_chips_is_not_bound_by_hbm():
    tiny = Serving(model=ModelDemand.of(ARCHITECTURES["tiny"]), slice=SLICES["h200"])
    step = ceiling.decode(tiny, 1, 1)
    assert tiny.weight_bytes / tiny.bandwidth > step.seconds


def test_training_is_bound_by_flops_and_adapters_save_weight_gradients():
    lora = ceiling.train(DENSE, SLICES["v5p-8"], LoraConfig(rank=64), 922)
    full = ceiling.train(DENSE, SLICES["v5p-8"], LoraConfig(enabled=False), 922)
    assert lora.seconds == pytest.approx(4 * DENSE.multiplied / (4 * 459e12), rel=0.05)  # attention and adapters on top
    assert 1.4 < full.seconds / lora.seconds < 1.5
