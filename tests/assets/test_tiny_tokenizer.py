"""The tiny models' tokenizer and chat template, as any user of Hugging Face's classes meets them."""

import json
import subprocess
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

from gemma4_tpu.architectures import ARCHITECTURES, contradictions, from_hf_config
from gemma4_tpu.assets import ROOT

FOLDER = ROOT / "tiny"
REPOSITORY = Path(__file__).parents[2]
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
EOS, BOS, TURN_START, TURN_END = 1, 2, 4, 5


def _render(messages, **options):
    return TOKENIZER.apply_chat_template(messages, tokenize=False, **options)


def test_control_tokens_are_single_ids():
    assert [TOKENIZER.convert_tokens_to_ids(t) for t in ("<pad>", "<eos>", "<bos>", "<unk>")] == [0, 1, 2, 3]
    assert TOKENIZER.convert_tokens_to_ids(["<|turn>", "<turn|>"]) == [TURN_START, TURN_END]
    for token in (
        "<|think|>",
        "<|channel>",
        "<channel|>",
        "<|tool>",
        "<tool|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
    ):
        assert len(TOKENIZER(token, add_special_tokens=False).input_ids) == 1
        assert TOKENIZER.decode(TOKENIZER(token).input_ids, skip_special_tokens=True) == ""


def test_vocabulary_and_configs_agree_with_the_architectures():
    config = json.loads((FOLDER / "config.json").read_text())
    assert contradictions(ARCHITECTURES["tiny"], from_hf_config(config)) == []
    assert {ARCHITECTURES[name].vocab_size for name in ("tiny", "tiny_moe", "tiny_e2b")} == {len(TOKENIZER)}
    assert config["eos_token_id"] == GenerationConfig.from_pretrained(FOLDER).eos_token_id == [EOS, TURN_END]
    assert (config["pad_token_id"], config["bos_token_id"]) == (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text())
def test_any_text_survives(text):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert TOKENIZER.decode(ids) == text or any(i < 16 for i in ids)  # a control token spelt out is one


def test_turns_look_like_gemma_4s():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello \n"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "More"},
    ]
    assert _render(messages, add_generation_prompt=True) == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHello<turn|>\n<|turn>model\nHi.<turn|>\n"
        "<|turn>user\nMore<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    )
    ids = TOKENIZER.apply_chat_template(messages)["input_ids"]
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    assert ids.count(TURN_START) == ids.count(TURN_END) == 4


def test_thinking_marks_the_system_turn_and_past_thoughts_are_left_out():
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<|channel>thought\nlong\n<channel|>The answer."},
    ]
    assert _render(messages, enable_thinking=True) == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nq<turn|>\n<|turn>model\nThe answer.<turn|>\n"
    )


def test_the_committed_tokenizer_is_what_its_script_makes(tmp_path):
    script = REPOSITORY / "experiments/tiny_base/make_tokenizer.py"
    subprocess.run(
        [sys.executable, script, "--out", tmp_path],
        check=True,
        cwd=REPOSITORY,
        capture_output=True,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    for made in tmp_path.iterdir():
        assert json.loads(made.read_text()) == json.loads((FOLDER / made.name).read_text()), made.name
