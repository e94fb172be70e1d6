"""Writes the tables of `docs/coming_from.md` from `config/synonyms.py`: `python docs/make_coming_from.py`.

A test compares the committed page with what this makes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gemma4_tpu.config.synonyms import BY_WORD, SAME, SETTLEMENTS, VALUES
from gemma4_tpu.markdown import table

PAGE = Path(__file__).with_name("coming_from.md")
BEGIN, END = "<!-- made by: python docs/make_coming_from.py -->", "<!-- end of tables -->"
THEIRS = {
    "TRL, PEFT": "model_name_or_path dataset_name max_length packing assistant_only_loss per_device_train_batch_size"
    " gradient_accumulation_steps num_train_epochs max_steps learning_rate lr_scheduler_type warmup_ratio warmup_steps"
    " weight_decay max_grad_norm adam_beta1 adam_beta2 optim use_peft r lora_r lora_alpha lora_dropout target_modules"
    " lora_target_modules modules_to_save use_dora use_rslora init_lora_weights load_in_4bit load_in_8bit"
    " gradient_checkpointing bf16 attn_implementation save_steps save_total_limit eval_steps logging_steps"
    " load_best_model_at_end resume_from_checkpoint report_to run_name seed output_dir trust_remote_code",
    "axolotl": "base_model datasets val_set_size sequence_len sample_packing train_on_inputs micro_batch_size"
    " gradient_accumulation_steps num_epochs max_steps learning_rate lr_scheduler warmup_ratio warmup_steps"
    " weight_decay max_grad_norm optimizer adapter lora_r lora_alpha lora_dropout lora_target_modules"
    " lora_target_linear lora_modules_to_save lora_model_dir peft_use_dora peft_use_rslora load_in_4bit load_in_8bit rl"
    " gradient_checkpointing bf16 tf32 flash_attention deepspeed fsdp_config save_steps save_total_limit eval_steps"
    " logging_steps early_stopping_patience resume_from_checkpoint wandb_project wandb_entity seed output_dir"
    " chat_template special_tokens",
    "MaxText": "model_name load_parameters_path tokenizer_path hf_path max_target_length packing"
    " sft_train_on_completion_only per_device_batch_size gradient_accumulation_steps steps learning_rate"
    " warmup_steps_fraction cosine_learning_rate_final_fraction adam_b1 adam_b2 adam_weight_decay"
    " gradient_clipping_threshold opt_type remat_policy ici_fsdp_parallelism ici_tensor_parallelism"
    " ici_data_parallelism checkpoint_period eval_interval run_name base_output_directory use_dpo dtype attention",
}
"""Tool → its keys that the page names, as of 2026; all are known to `translate`."""
OWN = {
    "dataset_name": "data.train", "datasets": "data.train",
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size", "per_device_batch_size"),
                    "trainer.global_batch_sequences"),
    **dict.fromkeys(("adapter", "use_peft"), "lora"), **dict.fromkeys(("rl", "use_dpo"), "objective"),
    **dict.fromkeys(("optimizer", "optim", "opt_type"), "optimizer"), "lora_target_linear": "lora.targets",
    **dict.fromkeys(("packing", "sample_packing"), "data.packing"),
}  # fmt: skip
"""Their keys that `translate` treats on their own → our key or group."""
SETTLED = {word: words for words in SETTLEMENTS for word in words.split()}


def ours(word: str) -> str:
    """Our key or group for one of theirs."""
    if word in OWN:
        return OWN[word]
    return f"{SAME[word]}.{word}" if word in SAME else BY_WORD[word][0].partition("=")[0]


def tables() -> list[str]:
    """Both tables: keys with a counterpart, and keys with nothing to set."""
    known = {tool: words.split() for tool, words in THEIRS.items()}
    keys = sorted({ours(word) for words in known.values() for word in words if word not in SETTLED}, key=_order)
    rows = [
        [f"`{key}`", *(_cell(word for word in words if word not in SETTLED and ours(word) == key)
                       for words in known.values())]
        for key in keys
    ]  # fmt: skip
    lines = ["", *table(["here", *THEIRS], rows)]
    by_value = [
        [_cell(words.split()), "; ".join(f"`{value}` → `{mine}`" for value, mine in values.items())]
        for words, values in VALUES.items()
    ]
    lines += ["Where the value decides:", "", *table(["theirs", "their value → here"], by_value)]
    lines += ["Nothing to set:", ""]
    settled = [[_cell(words.split()), reason.replace("<", "\\<")] for words, reason in SETTLEMENTS.items()]
    return [*lines, *table(["theirs", "why"], settled)]


def _order(key: str) -> tuple[int, str]:
    groups = ("model", "data", "trainer", "optimizer", "lora", "objective", "mesh", "checkpoint", "tracker")
    group = key.partition(".")[0]
    return (groups.index(group) if group in groups else len(groups), key)


def _cell(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words) or "–"


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    return "\n".join([before + BEGIN, *tables()]) + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
