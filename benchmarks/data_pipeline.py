"""The data pipeline on one core: ours, the published recipe's, and (optionally) TRL's, from JSONL to batches.

    python -m benchmarks.data_pipeline [--rows 3000] [--times 5] [--tokenizer FOLDER] [--trl PYTHON]

CodeV-R1-like rows (a prompt, a thought, an answer in a fence) made of the package's Verilog rows, with the lengths of
the recipe's data. Ours cleans, renders, checks, encodes and packs into rows of 4,096 tokens. The recipe's strips the
thought, encodes the two turns one by one, drops what is longer than 3,072 tokens and pads the rest to that, one
example per row, when Grain asks for a row. `--trl` names a Python with TRL: its SFTTrainer's preparation, packed, and
its loader.

Each way runs in a process of its own, held to one core, in turns; medians. Seconds are the process's own CPU time, so
that other work on the machine hardly counts, imports left out. *First epoch*: everything from opening the file to the
last batch; *later epochs*: what every further one takes. Without `--tokenizer` there are two: the package's tiny one,
and one with Gemma's rules (BPE over the whole text, without pieces) whose 32,768 tokens are learnt here from the
installed Python's own source and the rows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import measured
from benchmarks.step import PACKED, PADDED, lengths
from gemma4_tpu.markdown import table

GEMMA_LIKE = "Gemma's rules"
VOCABULARY, SOURCE_BYTES = 32_768, 8_000_000
SPLIT = r"▁?[A-Za-z_]+|[0-9]|▁?[^\s▁A-Za-z0-9_]+|▁+|\s+"
THOUGHT, ANSWER = re.compile(r"<think>.*?</think>", re.DOTALL), re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def pairs() -> Iterator[tuple[str, str]]:
    """(specification, module) of the package's rows, again and again, each module with a name of its own."""
    from gemma4_tpu import assets

    with gzip.open(assets.resolve("embedded:verilog_smoke/train.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    number = 0
    while True:
        for question, answer in rows:
            number += 1
            name, code = f"Part{number}", answer["content"].removeprefix("```verilog\n").removesuffix("\n```")
            yield question["content"].replace("TopModule", name), code.replace("TopModule", name)


def write_rows(path: Path, count: int, tokenizer: Any) -> None:
    """`count` CodeV-R1 rows: as many specifications and modules in each as its drawn length asks for."""
    source = pairs()
    with path.open("w", encoding="utf-8") as file:
        for wanted in lengths(count):
            prompts: list[str] = []
            modules: list[str] = []
            tokens = 40  # what markup and fence take
            while not prompts or tokens < wanted - 60:  # half of what one more would add
                prompt, module = next(source)
                prompts.append(prompt)
                modules.append(module)
                tokens += len(tokenizer(prompt + module, add_special_tokens=False)["input_ids"])
            code, prompt = "\n\n".join(modules), "\n".join(prompts)
            response = f"<think>\n{prompt}\n</think>\n<answer>\n```verilog\n{code}\n```\n</answer>"
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")


def gemma_like(folder: Path) -> None:
    """A tokenizer with Gemma's normalizer, BPE and byte fallback, the tiny one's control tokens and template."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from gemma4_tpu.data.tokenizer import load_tokenizer

    tiny = load_tokenizer("embedded:tiny")
    control = [str(token) for _, token in sorted(tiny.added_tokens_decoder.items())]
    source, texts, read = pairs(), [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace") + "\n".join(next(source))
        texts.append(text)
        read += len(text)
        if read > SOURCE_BYTES:
            break
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")  # to learn fast: words only
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=control + alphabet))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")  # Gemma's: never matches
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    made.chat_template = tiny.chat_template
    made.save_pretrained(folder)


class CpuClock:
    """CPU seconds of this process since the last look."""

    def __init__(self) -> None:
        self._at = time.process_time()

    def lap(self) -> float:
        """Since the last lap, or the beginning."""
        before, self._at = self._at, time.process_time()
        return self._at - before


Epoch = tuple[float, int, int, int]
"""CPU seconds, examples, real tokens, positions of all rows."""


def ours(rows: Path, tokenizer: Any) -> list[Epoch]:
    """`build_data` and the iterator that training reads, eight rows per update."""
    import grain  # noqa: F401  the iterator's; what is measured begins behind imports

    from gemma4_tpu.config.schema import DataConfig, DataSource
    from gemma4_tpu.data.build import build_data
    from gemma4_tpu.data.pipeline import Pipeline

    clock = CpuClock()
    data = DataConfig(format="codev_r1", train=[DataSource(path=str(rows))], sequence_length=PACKED)
    examples = build_data(data, tokenizer).train
    epochs: list[Epoch] = []
    run = Pipeline(examples=examples, data=data, rows_per_update=8, seed=0, epochs=2)
    visited = tokens = positions = 0
    for update in run:
        visited += sum(len(row) for group in update.rows for row in group)
        tokens += update.real_tokens
        positions += update.arrays["tokens"].size
        if update.epoch >= len(epochs) + 1:
            epochs.append((clock.lap(), visited, tokens, positions))
            visited = tokens = positions = 0
    return epochs


def recipe(rows: Path, tokenizer: Any) -> list[Epoch]:
    """One padded row per example, made by Grain in every epoch anew."""
    import grain

    def encoded(line: str) -> dict[str, np.ndarray] | None:
        row = json.loads(line)
        response = THOUGHT.sub("", row["response"])
        answer = found[1] if (found := ANSWER.search(response)) else response
        asked = tokenizer.encode(f"<|turn>user\n{row['prompt']}<turn|>\n<|turn>model\n")
        ids = [*asked, *tokenizer.encode(f"{answer.strip()}<turn|>")]
        if len(ids) > PADDED:
            return None
        tokens, mask = np.zeros(PADDED, np.int32), np.zeros(PADDED, bool)
        tokens[: len(ids)], mask[len(asked) : len(ids)] = ids, True
        return {"input_tokens": tokens, "input_mask": mask, "real": np.array(len(ids))}

    clock = CpuClock()
    lines = rows.read_text(encoding="utf-8").rstrip("\n").split("\n")
    source = grain.MapDataset.source(lines).seed(0).shuffle().map(encoded).filter(lambda row: row is not None)
    epochs: list[Epoch] = []
    for _ in range(2):
        reader = source.to_iter_dataset(grain.ReadOptions(num_threads=1)).batch(1)
        sizes = [(int(batch["real"].sum()), batch["input_tokens"].size) for batch in reader]
        epochs.append((clock.lap(), len(sizes), sum(real for real, _ in sizes), sum(size for _, size in sizes)))
    return epochs


def trl(rows: Path, tokenizer: Any) -> list[Epoch]:
    """SFTTrainer of prompts and completions, `packing=True` (best fit), and what its loader yields."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from gemma4_tpu import assets

    model = AutoModelForCausalLM.from_pretrained(assets.resolve("embedded:tiny"), trust_remote_code=False)

    def conversation(line: str) -> dict[str, Any]:
        row = json.loads(line)
        answer = ANSWER.findall(THOUGHT.sub("", row["response"]))[0].strip()
        turns = [{"role": "user", "content": row["prompt"]}], [{"role": "assistant", "content": answer}]
        return dict(zip(("prompt", "completion"), turns, strict=True))

    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(dir=rows.parent), max_length=PACKED, packing=True, report_to=[], use_cpu=True,
        per_device_train_batch_size=8, bf16=False, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    clock = CpuClock()
    dataset = Dataset.from_list(
        [conversation(line) for line in rows.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    )
    examples = len(dataset)
    loader = SFTTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer).get_train_dataloader()
    epochs: list[Epoch] = []
    for _ in range(2):
        tokens = positions = 0
        for batch in loader:
            tokens += int((batch["input_ids"] != tokenizer.pad_token_id).sum())
            positions += batch["input_ids"].numel()
        epochs.append((clock.lap(), examples, tokens, positions))
    return epochs


WAYS: dict[str, Callable[[Path, Any], list[Epoch]]] = {"the recipe's": recipe, "TRL, packed": trl, "ours": ours}


def measure(way: str, rows: Path, tokenizer: str, python: str) -> list[Epoch]:
    """Both epochs of one way, in a process of its own on one core."""
    answer = rows.parent / "answer.json"
    own = [python, "-m", "benchmarks.data_pipeline", "--way", way, str(rows), tokenizer, str(answer)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        own, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{way}: {done.stderr[-2000:]}")
    return [tuple(epoch) for epoch in json.loads(answer.read_text())]


def _measured(way: str, rows: str, tokenizer: str, answer: str) -> None:
    from gemma4_tpu.data.tokenizer import load_tokenizer

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    loaded = load_tokenizer(tokenizer)
    loaded("the first call builds what the others use")
    Path(answer).write_text(json.dumps(WAYS[way](Path(rows), loaded)))


def lines_of(name: str, found: dict[str, list[list[Epoch]]]) -> list[str]:
    """Lines of one tokenizer's table; ratios are medians of the turns' ratios."""
    heads = [
        name, "real tokens of all positions", "first epoch: rows/s", "real tokens/s", "ratio",
        "later epochs: real tokens/s", "ratio",
    ]  # fmt: skip
    rows = []
    first = next(iter(found.values()))
    for way, turns in found.items():
        share = turns[0][1][2] / turns[0][1][3]
        cells = [f"{way}", f"{share:.1%}", f"{statistics.median(t[0][1] / t[0][0] for t in turns):,.0f}"]
        for epoch in (0, 1):
            rates = [turn[epoch][2] / turn[epoch][0] for turn in turns]
            other = [turn[epoch][2] / turn[epoch][0] for turn in first]
            ratio = statistics.median(rate / beside for rate, beside in zip(rates, other, strict=True))
            cells += [f"{statistics.median(rates):,.0f}", f"{ratio:.2f}×"]
        rows.append(cells)
    return list(table(heads, rows, "lrrrrrr"))


def main() -> None:
    """Measures every way in turns and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--tokenizer", help="folder of a checkpoint; none: the tiny one and one with Gemma's rules")
    parser.add_argument("--trl", help="a Python with TRL and this package")
    parser.add_argument("--way", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        return _measured(*asked.way)
    from gemma4_tpu.data.tokenizer import load_tokenizer

    told = f"Medians of {asked.times} turns, each way in a process pinned to one core, per second of its own CPU time."
    lines = [measured("tokenizers", "transformers", "grain"), told, ""]
    with tempfile.TemporaryDirectory() as work:
        folders = {asked.tokenizer: asked.tokenizer} if asked.tokenizer else {"the tiny tokenizer": "embedded:tiny"}
        if not asked.tokenizer:
            folders[GEMMA_LIKE] = f"{work}/tokenizer"
            gemma_like(Path(folders[GEMMA_LIKE]))
        ways = {way: asked.trl or "" if way == "TRL, packed" else sys.executable for way in WAYS}
        for name, folder in folders.items():
            rows = Path(work) / "rows.jsonl"
            write_rows(rows, asked.rows, load_tokenizer(folder))
            found: dict[str, list[list[Epoch]]] = {way: [] for way, python in ways.items() if python}
            for _ in range(asked.times):
                for way, turns in found.items():
                    turns.append(measure(way, rows, folder, ways[way]))
            _, examples, tokens, _ = found["ours"][0][1]
            size = rows.stat().st_size / 1e6
            told = f"{asked.rows:,} rows of {tokens / examples:,.0f} tokens on average, {size:.1f} MB of JSON."
            lines += [*lines_of(name, found), told, ""]
    print("\n".join(lines))
    return None


if __name__ == "__main__":
    main()
