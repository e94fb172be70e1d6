"""A small tokenizer with Gemma 4's control tokens at Gemma 4's ids, and a template that behaves like the stock one.

The template strips thoughts from past answers, opens a non-thinking generation prompt with an empty thought channel,
marks a thinking conversation in its system turn, and renders tools' responses inside the model's turn.
"""

import gzip
import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gemma4_tpu.data.examples import ExamplesBuilder, Origin
from gemma4_tpu.data.tokenizer import load_tokenizer

CONTROL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
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

TEMPLATE = """
{%- macro final(text) -%}
  {%- set kept = namespace(text='') -%}
  {%- for piece in (text or '').split('<channel|>') -%}
    {%- set kept.text = kept.text + piece.split('<|channel>')[0] -%}
  {%- endfor -%}
  {{- kept.text | trim -}}
{%- endmacro -%}
{%- set thinking = enable_thinking is defined and enable_thinking -%}
{%- set at = namespace(turn=none, open=false) -%}
{{- bos_token -}}
{%- if messages[0].role == 'system' or thinking or tools -%}
  {{- '<|turn>system\\n' -}}
  {%- if thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
  {%- if messages[0].role == 'system' -%}{{- messages[0].content | trim -}}{%- endif -%}
  {%- for tool in tools or [] -%}{{- '<|tool>' + tool.function.name + '<tool|>' -}}{%- endfor -%}
  {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages if message.role != 'system' -%}
  {%- if message.role == 'user' and message.content == '' -%}{{- raise_exception('an empty question') -}}{%- endif -%}
  {%- if message.role == 'tool' -%}
    {{- '<|tool_response>response : ' + message.content + '<tool_response|>' -}}
  {%- else -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {%- if not (role == 'model' and at.open) -%}{{- '<|turn>' + role + '\\n' -}}{%- endif -%}
    {%- set at.open = false -%}
    {%- if message.tool_calls and message.get('reasoning') -%}
      {{- '<|channel>thought\\n' + message.reasoning + '\\n<channel|>' -}}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
      {{- '<|tool_call>call : ' + call.function.name -}}
      {%- for key, value in (call.function.arguments or {}) | dictsort -%}
        {{- ' ' ~ key ~ ' = ' ~ value -}}
      {%- endfor -%}
      {{- '<tool_call|>' -}}
      {%- set at.open = true -%}
    {%- endfor -%}
    {{- final(message.content) if role == 'model' else message.content | trim -}}
    {%- if at.open -%}
      {%- if loop.last -%}{{- '<|tool_response>' -}}{%- endif -%}
    {%- else -%}
      {{- '<turn|>\\n' -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not at.open -%}
  {{- '<|turn>model\\n' -}}
  {%- if not thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""


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
