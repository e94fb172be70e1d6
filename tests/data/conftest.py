"""A small tokenizer with Gemma 4's control tokens at Gemma 4's ids, and the tiny models' template."""

import gzip
import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gemma4_tpu.assets import ROOT
from gemma4_tpu.data.examples import ExamplesBuilder, Origin
from gemma4_tpu.data.tokenizer import load_tokenizer

CONTROL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    '<|"|>': 52,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}
WORDS = {"\n": 107, "user": 2364, "model": 4368, "system": 9731, "thought": 45518, "tool": 5000}
PLAIN = "be brief add two and three 5 7 sum is then now call response value why because x y a b c ok { } : = ; ( ) ,"

TEMPLATE = (ROOT / "tiny" / "chat_template.jinja").read_text(encoding="utf-8")


def make_tokenizer(template=TEMPLATE):
    vocabulary = {**CONTROL, **WORDS}
    for number, word in enumerate(PLAIN.split()):
        vocabulary.setdefault(word, 6000 + number)
    taken = set(vocabulary.values())
    vocabulary |= {f"unused{i}": i for i in range(max(taken)) if i not in taken}  # ids without holes
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[ \t]+"), behavior="removed"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL)[4:]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """Gemma 4's ids and the stock template's behaviour, with a vocabulary of a few words."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tokenizer that travels with the package."""
    return load_tokenizer("embedded:tiny")


@pytest.fixture
def write_jsonl(tmp_path):
    """Write rows to a JSONL file (gzipped if so named) and return its path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


def chat_row(question, answer, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def make_examples(lengths, weights=(1.0,), sources=None):
    """Examples whose ids tell where they come from: example i holds the ids 1000 i + 1, 1000 i + 2, …"""
    builder = ExamplesBuilder(list(weights))
    for number, length in enumerate(lengths):
        ids = [1000 * number + 1 + k for k in range(length + 1)]
        flags = [k > length // 2 for k in range(length + 1)]
        source = sources[number] if sources else 0
        builder.add(ids, flags, source, Origin(f"part{source}.jsonl", number + 1))
    return builder.build({"rows": "abc", "tokenizer": "def"})
