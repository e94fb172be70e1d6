"""Generating the answers of an evaluation: ours, many problems in one decoding step, beside loops over the problems.

    python -m benchmarks.generation [--problems 64] [--tokens 96] [--times 3]

The same prompts (the package's held-out problems), the embedded tiny model in float32, greedy, the same limit. *Ours,
one by one* is our own generator with `eval.batch_size=1`; *transformers, one by one* is `generate` with its cache, as
evaluation scripts usually call it, on one thread (more are slower with so small a model); *transformers, 64 at a time*
pads on the left, sorts by length as we do, and has as many threads as we have, one for each core. Each way runs once
unmeasured (that compiles), then all in turns; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.pages import measured
from gemma4_tpu.markdown import table

BATCHED, SINGLE = "ours, 64 at a time", "ours, one by one"
PEER_BATCHED, PEER = "transformers, 64 at a time", "transformers, one by one"


def ours(batch_size: int, problems: int, tokens: int) -> Callable[[], int]:
    """Our generator: a call generates all answers and returns how many tokens they have."""
    from gemma4_tpu.config.machines import HardwareConfig, MeshConfig
    from gemma4_tpu.config.schema import ModelConfig
    from gemma4_tpu.config.tasks import EvalConfig
    from gemma4_tpu.evals.evaluated_models import of_checkpoint
    from gemma4_tpu.evals.generate import requests
    from gemma4_tpu.evals.verilog.smoke import VerilogSmoke

    config = EvalConfig(
        benchmark="verilog_smoke", n=1, temperature=0, max_new_tokens=tokens, batch_size=batch_size,
        compute_dtype="float32",
    )  # fmt: skip
    loaded = of_checkpoint(ModelConfig(path="embedded:tiny"), config, HardwareConfig(), MeshConfig())
    (backend,) = loaded.by_name.values()
    asked = requests(VerilogSmoke().load()[:problems], config)

    def run() -> int:
        return sum(sample.tokens or 0 for sample in backend.generate(asked))

    return run


def peer(batch_size: int, problems: int, tokens: int, threads: int) -> Callable[[], int]:
    """The same by transformers' `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    from gemma4_tpu.config.schema import ModelConfig
    from gemma4_tpu.config.tasks import EvalConfig
    from gemma4_tpu.data.chat import ChatFormat
    from gemma4_tpu.data.tokenizer import load_tokenizer
    from gemma4_tpu.evals.generate import checkpoint_stop_ids, messages
    from gemma4_tpu.evals.verilog.smoke import VerilogSmoke
    from gemma4_tpu.models.base import resolve_base

    base = resolve_base(ModelConfig(path="embedded:tiny"))
    tokenizer = load_tokenizer(base.tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, trust_remote_code=False).eval()
    chat, stops = ChatFormat(tokenizer, "drop"), list(checkpoint_stop_ids(base, tokenizer))
    asked = VerilogSmoke().load()[:problems]
    prompts = sorted(
        chat.encode([chat.render_prompt(list(messages(problem, EvalConfig()))) for problem in asked]), key=len
    )

    @torch.no_grad()
    def run() -> int:
        torch.set_num_threads(threads)
        count = 0
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(map(len, batch))
            given = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in batch])
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
            made: Any = model.generate(
                given, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=stops, pad_token_id=0
            )
            ends = torch.isin(made[:, width:], torch.tensor(stops)).int()
            before = (ends.cumsum(1) - ends).clamp(max=1)  # 1 behind the token that ended the answer
            count += int((1 - before).sum())
        return count

    return run


def rows_of(seconds: dict[str, list[float]], made: dict[str, int]) -> Iterator[str]:
    """The lines of the table."""
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    rates = {way: made[way] / medians[way] for way in medians}
    rows = [
        [way, f"{made[way]:,}", f"{medians[way]:.1f}", f"{rates[way]:,.0f}", f"{rates[way] / rates[PEER]:.1f}×"]
        for way in (PEER, PEER_BATCHED, SINGLE, BATCHED)
    ]
    return table(["way", "tokens generated", "seconds", "tokens/s", "ratio"], rows, "lrrrr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="at most, per answer")
    parser.add_argument("--times", type=int, default=3)
    args, stamp = parser.parse_args(), measured("jax", "transformers", "torch")
    ways = {
        BATCHED: ours(64, args.problems, args.tokens),
        SINGLE: ours(1, args.problems, args.tokens),
        PEER_BATCHED: peer(64, args.problems, args.tokens, os.cpu_count() or 1),
        PEER: peer(1, args.problems, args.tokens, 1),
    }
    made = {way: run() for way, run in ways.items()}
    print("tokens generated:", made, file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.times):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - started)
            print(way, f"{seconds[way][-1]:.1f} s", file=sys.stderr, flush=True)
    print("\n".join([stamp, "", *rows_of(seconds, made)]))


if __name__ == "__main__":
    main()
