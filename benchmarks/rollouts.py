"""Drawing the answers of an update: how many tokens a second, and how many that are decoded are of no answer.

    python -m benchmarks.rollouts [--prompts 32] [--samples 8] [--slots 32] [--tokens 128] [--times 5]

The sampler of `objective=grpo` with the trainer's own step, the embedded tiny model in float32 with adapters of rank
16, prompts of the package's training rows. A draw is all of it: prompts are read once each, slots are filled again as
answers end, tokens and log-probabilities come back to the host. Once unmeasured (that compiles); medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from benchmarks.pages import measured
from gemma4_tpu.markdown import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="at most, per answer")
    parser.add_argument("--times", type=int, default=5)
    args, stamp = parser.parse_args(), measured("jax")

    from gemma4_tpu.data.build import build_data
    from gemma4_tpu.data.tokenizer import load_tokenizer
    from gemma4_tpu.evals.generate import checkpoint_stop_ids, padded_width
    from gemma4_tpu.hardware import MeshSizes
    from gemma4_tpu.models.base import resolve_base
    from gemma4_tpu.models.sharding import make_mesh
    from gemma4_tpu.rollouts.policy_tasks import of_rows
    from gemma4_tpu.rollouts.sampler import Sampler, SamplerShapes, Wanted
    from gemma4_tpu.train import load_train
    from gemma4_tpu.training.recipe import Recipe
    from gemma4_tpu.training.setup import set_up

    config = load_train(["objective=grpo", "rollouts.reward=nobody:asks", "trainer.remat=none"]).root
    base, mesh = resolve_base(config.model), make_mesh(1, 1)
    tokenizer = load_tokenizer(base.tokenizer_folder)
    tasks = of_rows(build_data(config.data, tokenizer).train, tokenizer)[: args.prompts]
    recipe = Recipe(
        arch=base.arch, hardware=config.hardware, lora=config.lora, optimizer=config.optimizer, trainer=config.trainer,
        mesh=MeshSizes(**mesh.shape), rows=1, length=config.data.sequence_length, updates=1, objective=config.objective,
    )  # fmt: skip
    setup = set_up(base, recipe, mesh)
    width = padded_width([task.ids for task in tasks])
    shapes = SamplerShapes(args.slots, args.prompts, width, args.tokens)
    sampler = Sampler(setup.step, checkpoint_stop_ids(base, tokenizer), shapes)

    def draw(seed: int) -> tuple[int, int, float]:
        """(tokens of answers, tokens decoded, seconds)."""
        wanted = [Wanted(p, s, seed + 1000 * p + s) for p in range(len(tasks)) for s in range(args.samples)]
        before, started = sampler.decoded_slots, time.perf_counter()
        kept = sum(
            len(one.tokens) for one in sampler(setup.state.trained, setup.base, [task.ids for task in tasks], wanted)
        )
        return kept, sampler.decoded_slots - before, time.perf_counter() - started

    draw(0)
    draws = []
    for number in range(args.times):
        draws.append(draw(100_000 * (number + 1)))
        print(draws[-1], file=sys.stderr, flush=True)
    kept, decoded, seconds = (statistics.median(column) for column in zip(*draws, strict=True))
    rates = (statistics.median(k / s for k, _, s in draws), statistics.median(d / s for _, d, s in draws))
    cells = [f"{kept:,.0f}", f"{seconds:.1f}", f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{1 - kept / decoded:.0%}"]
    heads = ["tokens of answers", "seconds", "tokens/s", "decoded tokens/s", "of no answer"]
    print("\n".join([stamp, "", *table(heads, [cells], "rrrrr")]))


if __name__ == "__main__":
    main()
