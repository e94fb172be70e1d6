"""Settings of other trainers (Hugging Face's, TRL, PEFT, Unsloth, axolotl, nanoGPT) and their names here: data for
hints, which are never applied automatically.
"""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from gemma4_tpu.config.keys import is_group, leaf_keys, type_at, unknown_key
from gemma4_tpu.config.lists import in_full
from gemma4_tpu.config.values import bad_value

_ROWS = "rows of data.sequence_length tokens per update, over all devices and microbatches"
_TIMES = "{} times devices times accumulation, " + _ROWS
_SPLIT = "splits an update's rows (trainer.global_batch_sequences) into this many instead of multiplying them"
_ROLES = "attention is q, k, v, o; mlp is gate, up, down; or some of these, such as [q,v]; experts: those of experts"
_FOLDER = "a folder with the Hugging Face checkpoint, local or gs://"
_DATA = "a file, a folder, gs://… or hf:NAME"
_HELDOUT = "its loss is measured every trainer.eval_every updates"
_UPDATES = "counted in updates"

MEANINGS: tuple[tuple[str, str, str], ...] = (
    # their words; our setting, with {} for their value; remark about the value
    ("lr base_lr peak_lr max_lr", "optimizer.learning_rate={}", ""),
    ("lr_scheduler lr_scheduler_type lr_schedule scheduler", "optimizer.schedule={}", "cosine, linear, constant, wsd"),
    ("warmup_ratio warmup_steps_fraction", "optimizer.warmup_fraction={}", "of the run's updates"),
    ("warmup warmup_steps num_warmup_steps warmup_iters", "optimizer.warmup_updates={}", _UPDATES),
    ("min_lr lr_min min_learning_rate", "optimizer.end_fraction=…", "{} as a fraction of the peak"),
    (
        "min_lr_ratio min_lr_rate cosine_min_lr_ratio learning_rate_final_fraction cosine_learning_rate_final_fraction",
        "optimizer.end_fraction={}",
        "of the peak",
    ),
    ("adam_beta1 beta1 adam_b1", "optimizer.b1={}", ""),
    ("adam_beta2 beta2 adam_b2", "optimizer.b2={}", ""),
    ("adam_epsilon adam_eps epsilon", "optimizer.eps={}", ""),
    ("wd adam_weight_decay", "optimizer.weight_decay={}", ""),
    (
        "grad_clip clip_grad_norm gradient_clipping gradient_clip_val gradient_clipping_threshold",
        "optimizer.max_grad_norm={}",
        "",
    ),
    ("optim optimizer_type optimizer_name opt_type", "optimizer=adamw", "or adafactor, lion, muon, schedule_free"),
    (
        "max_steps num_steps total_steps train_steps num_train_steps max_iters steps",
        "trainer.max_updates={}",
        f"{_UPDATES}; null: the length of trainer.epochs",
    ),
    ("num_epochs num_train_epochs n_epochs max_epochs train_epochs epoch", "trainer.epochs={}", ""),
    ("batch_size train_batch_size global_batch_size total_batch_size", "trainer.global_batch_sequences={}", _ROWS),
    (
        "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size device_batch_size micro_batch_size"
        " train_micro_batch_size_per_gpu",
        "trainer.global_batch_sequences=…",
        _TIMES,
    ),
    (
        "gradient_accumulation_steps gradient_accumulation grad_accumulation_steps grad_accum accumulate_grad_batches",
        "trainer.microbatches={}",
        _SPLIT,
    ),
    (
        "max_seq_length max_seq_len max_sequence_length max_length seq_length seq_len sequence_len block_size"
        " cutoff_len context_length model_max_length max_target_length",
        "data.sequence_length={}",
        "longer examples are dropped, never cut",
    ),
    (
        "save_steps save_every save_interval checkpointing_steps save_strategy checkpoint_period",
        "checkpoint.every={}",
        _UPDATES,
    ),
    ("save_total_limit", "checkpoint.keep={}", ""),
    ("load_best_model_at_end", "checkpoint.keep_best={}", "merge and evaluate take checkpoint=best"),
    ("early_stopping_patience", "trainer.patience={}", "held-out evaluations, every trainer.eval_every updates"),
    ("early_stopping_threshold early_stopping_min_delta", "trainer.min_delta={}", ""),
    ("max_time max_train_time time_budget", "trainer.time_limit={}", "such as 2h30m, or minutes"),
    ("eval_steps eval_interval eval_strategy evaluation_strategy", "trainer.eval_every={}", _UPDATES),
    ("logging_steps log_interval log_every_n_steps logging_interval", "trainer.log_every={}", _UPDATES),
    ("output_dir out_dir save_dir logging_dir base_output_directory", "run_dir={}", ""),
    (
        "resume_from_checkpoint auto_resume_from_checkpoints",
        "run_dir=…",
        "the run's folder: the same command resumes from its newest checkpoint",
    ),
    ("run_name experiment_name", "name={}", ""),
    ("report_to", "tracker={}", "none, wandb, mlflow, trackio, tensorboard or jsonl"),
    ("wandb_project project_name", "tracker.project={}", ""),
    ("wandb_entity", "tracker.entity={}", ""),
    (
        "bf16 fp16 dtype torch_dtype precision mixed_precision",
        "trainer.compute_dtype=bfloat16",
        "or float32, or auto; adapters and optimizer are always float32",
    ),
    ("random_seed random_state data_seed", "trainer.seed={}", ""),
    (
        "model_name_or_path model_id model_path model_name pretrained_model_name_or_path base_model"
        " base_model_name_or_path load_parameters_path",
        "model.path={}",
        _FOLDER,
    ),
    ("tokenizer_name tokenizer_path", "model.tokenizer={}", "a folder"),
    (
        "dataset datasets dataset_name dataset_path data_path data_files data_dir hf_path train_file train_data"
        " train_dataset",
        "data.train={}",
        _DATA,
    ),
    (
        "eval_dataset eval_file eval_data validation_file validation_data test_file val_data",
        "data.heldout={}",
        _HELDOUT,
    ),
    ("rl use_dpo", "objective=dpo", "or ipo, orpo"),
    ("val_set_size validation_split eval_split test_size", "data.heldout_fraction={}", "a share of the training rows"),
    ("max_samples max_train_samples num_samples", "data.max_rows={}", ""),
    ("sample_packing", "data.packing={}", ""),
    ("group_by_length", "data.packing=buckets", "instead of true, which packs and needs no grouping"),
    (
        "train_on_inputs train_on_responses_only completion_only_loss assistant_only_loss",
        "data.train_on=all",
        "all or the last of the assistant's turns; only these carry loss",
    ),
    ("r lora_r lora_rank lora_dim", "lora.rank={}", ""),
    ("lora_alpha", "lora.alpha={}", ""),
    ("lora_dropout", "lora.dropout={}", ""),
    ("target_modules lora_target_modules lora_target", "lora.targets=[attention,mlp]", _ROLES),
    ("layers_to_transform", "lora.layers={}", "layers and ranges, such as [0-11,24]"),
    ("rank_pattern", "lora.ranks={}", ""),
    ("target_parameters lora_target_parameters", "lora.targets=[attention,mlp,experts]", _ROLES),
    (
        "modules_to_save lora_modules_to_save additional_target additional_trainable_modules",
        "lora.modules_to_train=[embeddings]",
        "or norms, per_layer_projections, names and patterns of modules; embeddings include the output matrix",
    ),
    (
        "tokens add_tokens added_tokens new_special_tokens additional_special_tokens trainable_token_indices",
        "model.new_tokens=['<result>']",
        "their embedding rows are trained; lora.modules_to_train=[embeddings] trains the whole table",
    ),
    ("use_rslora peft_use_rslora", "lora.rslora={}", ""),
    ("use_dora peft_use_dora", "lora.dora={}", ""),
    ("init_lora_weights", "lora.init={}", "default, pissa or olora"),
    ("load_in_4bit use_4bit", "lora.quantize=nf4", "null for false"),
    ("load_in_8bit use_8bit", "lora.quantize=int8", "null for false"),
    (
        "adapter finetuning_type use_qlora",
        "lora=qlora_nf4",
        "for QLoRA; lora=default is LoRA, lora=none trains all weights",
    ),
    ("use_lora use_peft", "lora.enabled={}", ""),
    (
        "adapter_name_or_path adapter_path lora_path lora_weights lora_model_dir peft_model_id",
        "lora.start={}",
        "a run folder or a PEFT adapter's",
    ),
    (
        "gradient_checkpointing use_gradient_checkpointing activation_checkpointing remat_policy",
        "trainer.remat=auto",
        "or none, products, attention, decoder",
    ),
    ("attn_implementation flash_attention flash_attn", "trainer.attention=auto", "or splash, chunked, einsum"),
    ("tensor_parallel_size tp_size ici_tensor_parallelism", "mesh.tp={}", "devices on that axis"),
    ("data_parallel_size dp_size ici_data_parallelism", "mesh.dp={}", "devices on that axis"),
    ("fsdp_size ici_fsdp_parallelism", "mesh.fsdp={}", "devices on that axis"),
    ("context_parallel_size cp_size ici_context_parallelism", "mesh.cp={}", "devices on that axis"),
    (
        "num_gpus n_gpu num_devices device devices accelerator",
        "hardware=<slice>",
        "such as v5p8; local uses this machine's devices",
    ),
)
BY_WORD = {word: (setting, remark) for words, setting, remark in MEANINGS for word in words.split()}
"""Their word → (our setting, remark about the value)."""
SAME = {"learning_rate": "optimizer", "weight_decay": "optimizer", "max_grad_norm": "optimizer", "seed": "trainer"}
"""Their words that are also ours → our group."""
VALUES: dict[str, dict[str, str]] = {
    "adapter": {"lora": "lora=default", "qlora": "lora=qlora_nf4"},
    "use_peft": {"true": "lora=default"},
    "load_in_4bit": {"true": "lora.quantize=nf4"},
    "load_in_8bit": {"true": "lora.quantize=int8"},
    "lora_target_linear": {"true": "lora.targets=[attention,mlp]"},
    "lora_target_modules": {"all-linear": "lora.targets=[attention,mlp]"},
    "rl": {kind: f"objective={kind}" for kind in ("dpo", "ipo", "orpo")},
    "use_dpo": {"true": "objective=dpo"},
    "optimizer optim opt_type": dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw"), "optimizer=adamw")
    | {kind: f"optimizer={kind}" for kind in ("adafactor", "lion", "muon")},
    "packing sample_packing": {"true": "data.packing=true", "false": "data.packing=false"},
}
"""Their words → their value → our word, unless it is simply the value; used by `translate`."""
SETTLEMENTS = {
    "train_on_inputs assistant_only_loss completion_only_loss sft_train_on_completion_only": "loss is on answers only",
    "gradient_checkpointing gradient_checkpointing_kwargs remat_policy": "trainer.remat=auto recomputes as needed",
    "bf16 fp16 tf32 dtype torch_dtype weight_dtype": "bfloat16 on TPUs; adapters and optimizer are float32",
    "flash_attention attn_implementation attention": "trainer.attention=auto selects the kernel",
    "deepspeed fsdp fsdp_config fsdp_version": "mesh=auto shards over the slice; or set mesh.fsdp, mesh.tp, mesh.dp",
    "trust_remote_code": "code from a checkpoint never runs",
    "output_dir base_output_directory": "runs are written to outputs/train; run_dir=<folder> sets another folder",
    "load_parameters_path": "names a converted checkpoint; set model.path=<folder> to the original safetensors",
    "chat_template": "the checkpoint's own template is used",
    "special_tokens": "the tokenizer's own are used; model.new_tokens adds more",
    "dataset_config dataset_train_split": "set for each data set: data.train.0.subset, data.train.0.split",
}
"""Their words → why there is nothing to set here, or why their value has no effect."""
BY_VALUE = {word: values for words, values in VALUES.items() for word in words.split()}
SETTLED = {word: reason for words, reason in SETTLEMENTS.items() for word in words.split()}


def synonym(schema: type, key: str, value: str) -> str | None:
    """Our setting for a word of another trainer, bare or after any group (`lora.r`), with a remark about its value.

    Args:
      schema: the command's root; a word that is one of its keys, in any group, is not a synonym.
      key: as typed, not a key of `schema`.
      value: as typed.

    Returns:
      such as `trainer.max_updates=60 (counted in updates)`; None for an unknown word.
    """
    plain = key.lower().replace("-", "_")
    ours = {leaf.rsplit(".", 1)[-1] for leaf in leaf_keys(schema)}
    candidates = (plain.rsplit(".", 1)[-1], plain.replace(".", "_"))  # `dataset.path` is their `dataset_path`
    word = next((c for c in candidates if c in BY_WORD and c not in ours), None)
    if word is None:
        return None
    setting, remark = BY_WORD[word]
    where, _, written = setting.partition("=")
    if unknown_key(schema, where) is not None:
        return None
    text = written.format(value)
    setting = f"{where}={text if _fits(schema, where, text) else written.format('…')}"
    return f"{setting} ({remark.format(value or '…')})" if remark else setting


def _fits(schema: type, key: str, text: str) -> bool:
    """Whether the command line accepts `text` for our `key`; a hint must not suggest what it refuses."""
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(f"{key}={text}")
        override = parser.parse_override(in_full(f"{key}={text}", override, schema))
    except HydraException:
        return False
    if not text or override.is_sweep_override():
        return bool(text)
    if is_group(type_at(schema, key)):
        return isinstance(override.value(), str)
    return bad_value(schema, key, override.value()) is None
