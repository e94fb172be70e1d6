"""Their configurations as our overrides: what is taken is what `train` takes, and nothing is lost without a reason."""

import shlex

import pytest

from gemma4_tpu import translate
from gemma4_tpu.config.load import compose_all
from gemma4_tpu.config.synonyms import BY_VALUE, BY_WORD, SAME, SETTLED
from gemma4_tpu.errors import UserError
from gemma4_tpu.train import TRAIN, load_train
from tests.house.scripts import ROOT, script

AXOLOTL = """\
base_model: ./gemma-4-E4B-it
load_in_4bit: true
adapter: qlora
datasets:
  - path: mlabonne/FineTome-100k
    type: chat_template
    split: train
  - {path: json, data_files: rows.jsonl, ds_type: json}
val_set_size: 0.05
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj, down_proj]
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
special_tokens:
"""
TRL = """\
model_name_or_path: google/gemma-4-31B-it
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 3
packing: true
per_device_train_batch_size: 2
lr_scheduler_type: cosine_with_min_lr
max_steps: -1
eval_strategy: steps
use_peft: true
lora_target_modules: all-linear
report_to: [wandb]
"""
MAXTEXT = """\
model_name: gemma4-31b
load_parameters_path: gs://bucket/gemma4-31b/0/items
hf_path: HuggingFaceH4/ultrachat_200k
per_device_batch_size: 1
gradient_accumulation_steps: 2
max_target_length: 2048
steps: 500
adam_b2: 0.95
ici_fsdp_parallelism: 4
enable_checkpointing: true
"""
TAKEN = {
    "axolotl": (AXOLOTL, 8, {
        "model=gemma4_e4b", "lora=qlora_nf4", "lora.quantize=nf4", "model.path=./gemma-4-E4B-it", "data=chat_jsonl",
        "data.train.0.path=hf:mlabonne/FineTome-100k", "data.train.0.split=train", "data.train.1.path=rows.jsonl",
        "data.heldout_fraction=0.05", "data.sequence_length=2048", "data.packing=true", "lora.rank=32",
        "lora.alpha=16", "lora.targets=[q,v,down]", "trainer.microbatches=4", "trainer.global_batch_sequences=64",
        "trainer.epochs=1", "optimizer.schedule=cosine", "optimizer.learning_rate=0.0002",
        "optimizer.warmup_fraction=0.1",
    }),
    "trl": (TRL, None, {
        "model=gemma4_31b", "lora=default", "data=chat_jsonl", "data.train.0.path=hf:trl-lib/Capybara", "tracker=wandb",
        "optimizer.learning_rate=0.0002", "trainer.epochs=3", "data.packing=true", "lora.targets=[attention,mlp]",
    }),
    "maxtext": (MAXTEXT, 4, {
        "model=gemma4_31b", "lora=none", "data=chat_jsonl", "data.train.0.path=hf:HuggingFaceH4/ultrachat_200k",
        "trainer.microbatches=2", "trainer.global_batch_sequences=8", "data.sequence_length=2048",
        "trainer.max_updates=500", "optimizer.b2=0.95", "mesh.fsdp=4",
    }),
}  # fmt: skip
LEFT = {
    "axolotl": {"optimizer", "bf16", "flash_attention", "evals_per_epoch", "special_tokens"},
    "trl": {"model_name_or_path", "per_device_train_batch_size", "lr_scheduler_type", "max_steps", "eval_strategy"},
    "maxtext": {"model_name", "load_parameters_path", "enable_checkpointing"},
}


@pytest.mark.parametrize("tool", TAKEN)
def test_a_configuration_of_theirs(tool, tmp_path, capsys):
    text, devices, expected = TAKEN[tool]
    (tmp_path / "theirs.yaml").write_text(text)
    assert translate.main([str(tmp_path / "theirs.yaml"), *([f"--devices={devices}"] if devices else [])]) == 0
    command, _, reasons = capsys.readouterr().out.partition("\n\n")
    words = shlex.split(command.replace("\\\n", ""))[3:]
    assert set(words) == expected
    assert compose_all(words, TRAIN)[2] == []
    named = dict(line.strip().split(": ", 1) for line in reasons.splitlines()[1:])
    assert named.keys() == LEFT[tool] and all(named.values())


def test_whatever_is_in_their_file_is_taken_or_named():
    odd = {
        "datasets": [{"path": "json", "data_files": ["a.jsonl", "b c.jsonl"]}, "c.csv", {}], "micro_batch_size": "auto",
        "learning_rate": {"a": [1]}, "lora_r": 8, "adapter": None, "num_epochs": [], "lr_scheduler": "a=b,c",
        "optimizer": ["adamw"], "fsdp": ["full_shard"], "sample_packing": "?",
    }  # fmt: skip
    words, left = translate.translate(odd, devices=2)
    assert compose_all(words, TRAIN)[2] == []
    assert left["lora_r"] == "there is no adapter" and "lora=none" in words
    assert "data.train.0.path=a.jsonl" in words and "a=b,c" in left["lr_scheduler"]
    assert "data.train.2.path=c.csv" in words and left["datasets"] == "{}: has no path"
    assert left.keys() == odd.keys()


def test_the_command_quotes_as_a_person_would(tmp_path, capsys):
    (tmp_path / "theirs.yaml").write_text("adapter: lora\ndatasets: [{path: my rows.jsonl, split: 'train[:9%]'}]\n")
    assert translate.main([str(tmp_path / "theirs.yaml")]) == 0
    command, _, reasons = capsys.readouterr().out.partition("\n\n")
    assert """ 'data.train.0.path="my rows.jsonl"' """ in command
    assert command.endswith(""" 'data.train.0.split="train[:9%]"'""")
    assert reasons == "Every key was translated.\n"


def test_what_is_no_configuration_is_one_message(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- 1")
    for name in ("list.yaml", "none.yaml"):
        assert translate.main([str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: ")


def test_the_page_is_made_of_the_same_words():
    made = script("docs/make_coming_from.py")
    text = (ROOT / "docs/coming_from.md").read_text(encoding="utf-8")
    assert made.page(text) == text, "run python docs/make_coming_from.py"
    named = {word for words in made.THEIRS.values() for word in words.split()}
    assert named <= {*BY_WORD, *BY_VALUE, *SAME, *SETTLED}


def test_every_key_of_the_page_is_refused_with_its_counterpart():
    made = script("docs/make_coming_from.py")
    words = sorted({word for words in made.THEIRS.values() for word in words.split()} - made.SETTLED.keys())
    with pytest.raises(UserError) as refused:
        load_train([f"{word}=1" for word in words])
    told = dict(line.strip("- ").split("=1: ", 1) for line in str(refused.value).splitlines() if "=1: " in line)
    assert [word for word in words if made.ours(word) not in f"{word}: {told[word]}"] == []
