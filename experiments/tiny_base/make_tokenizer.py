"""Make the tokenizer of the embedded tiny models: `python experiments/tiny_base/make_tokenizer.py`.

A byte-level BPE, trained on the synthetic problems and documents alone, with Gemma 4's control tokens. Writes
`config.json`, `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` next to the chat template, which
is written by hand.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from experiments.verilog_smoke.families import draw_designs
from experiments.verilog_smoke.prompts import answer, document, specification
from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.assets import ROOT

# Ids are positions. The first four are where Gemma has them too.
CONTROL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<|turn>",
    "<turn|>",
    "<|think|>",
    "<|channel>",
    "<channel|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
)
# Words with the space before them, single digits, runs of punctuation, white space.
SPLIT = r" ?[A-Za-z_]+|[0-9]| ?[^\sA-Za-z0-9_]+|\s+(?!\S)|\s+"


def corpus(seed: int, designs: int) -> list[str]:
    """Specifications, answers and documents of training designs. Held-out modules are not among them."""
    rng = Random(f"{seed}-tokenizer")
    texts = []
    for design in islice(draw_designs(rng, heldout=False), designs):
        texts += [f"user\n{specification(design, rng)}", f"model\n{answer(design)}", document(design, rng)]
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries, control tokens included. Prepends `<bos>` as Gemma's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(CONTROL_TOKENS),
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", CONTROL_TOKENS.index("<bos>"))]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} entries, not {vocab_size}: give more designs")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tiny", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--designs", type=int, default=4000, help="designs in the corpus")
    args = parser.parse_args()

    architecture = ARCHITECTURES["tiny"]
    tokenizer = train_tokenizer(corpus(args.seed, args.designs), architecture.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))

    eos_ids = [CONTROL_TOKENS.index("<eos>"), CONTROL_TOKENS.index("<turn|>")]
    ids = {"pad_token_id": CONTROL_TOKENS.index("<pad>"), "bos_token_id": CONTROL_TOKENS.index("<bos>")}
    _write_json(
        args.out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 131_072,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "pad_token": "<pad>",
            "eos_token": "<eos>",
            "bos_token": "<bos>",
            "unk_token": "<unk>",
            "additional_special_tokens": list(CONTROL_TOKENS[4:]),
        },
    )
    _write_json(
        args.out / "generation_config.json",
        {**ids, "eos_token_id": eos_ids, "do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
    )
    _write_json(args.out / "config.json", {**to_hf_config(architecture), **ids, "eos_token_id": eos_ids})
    print(f"{args.out}: {tokenizer.get_vocab_size()} entries")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
