"""The paper's GPU recipe: transformers, PEFT and TRL's SFTTrainer, sharded by FSDP over two H100.

    python -m experiments.gpu_baseline_h100x2.train                          # the tiny model on CPU, under a minute

README.md has the command for two GPUs. Hyperparameters are those of the paper's section 5.1; the README says what its
text leaves open and what was chosen. It runs in an environment of its own (requirements.txt), without JAX.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import gemma4_tpu
from gemma4_tpu.data.codev import to_messages
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.sources import read_rows

LENGTH, RANK, PEAK, WARMUP, ROWS_PER_UPDATE = 4096, 64, 1e-4, 100, 8
TARGETS = r"^(?!.*(vision|audio)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
ASSETS = Path(gemma4_tpu.__file__).parent / "assets"


def examples(data: str, tokenizer: Any, length: int, limit: int) -> Dataset:
    """Conversations that fit into `length` tokens, in their order."""
    found: list[dict[str, Any]] = []
    dropped = 0
    for row in read_rows(data):
        try:
            messages = row.value["messages"] if "messages" in row.value else to_messages(row.value)
        except RowDropped:
            dropped += 1
            continue
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        if len(tokens) > length:
            dropped += 1
            continue
        found.append({"messages": messages})
        if len(found) == limit:
            break
    print(f"{len(found)} conversations of at most {length} tokens, {dropped} dropped")
    return Dataset.from_list(found)


def main() -> None:
    """Trains one epoch; leaves the adapters and `result.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with the Hugging Face checkpoint; none: the tiny one of the package")
    parser.add_argument("--data", help="CodeV-R1 rows or conversations; none: those of the package")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--packing", action="store_true", help="what the paper does not do: several examples in a row")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_baseline_h100x2"))
    asked = parser.parse_args()

    tiny, gpu = asked.model is None, torch.cuda.is_available()
    length, limit = (asked.length, asked.rows) if not tiny else (min(asked.length, 256), min(asked.rows, 80))
    model = AutoModelForCausalLM.from_pretrained(
        asked.model or ASSETS / "tiny", dtype=torch.bfloat16 if gpu else torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(asked.model or ASSETS / "tiny", trust_remote_code=False)
    data = examples(asked.data or str(ASSETS / "verilog_smoke" / "train.jsonl.gz"), tokenizer, length, limit)

    settings = SFTConfig(
        output_dir=str(asked.out), num_train_epochs=1, max_length=length, packing=asked.packing,
        per_device_train_batch_size=1, gradient_accumulation_steps=ROWS_PER_UPDATE // max(1, torch.cuda.device_count()),
        learning_rate=PEAK, lr_scheduler_type="cosine", warmup_steps=WARMUP if not tiny else 1, optim="adamw_torch",
        bf16=gpu, use_cpu=not gpu, gradient_checkpointing=True, save_steps=100, save_total_limit=3, logging_steps=1,
        report_to=[], seed=0,
    )  # fmt: skip
    adapter = LoraConfig(
        r=8 if tiny else RANK, lora_alpha=8 if tiny else RANK, lora_dropout=0.0, target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "updates": trainer.state.global_step,
            "seconds": round(seconds, 1),
            "seconds_per_example": round(seconds / len(data), 3),
            "first_losses": losses[:2],
            "last_losses": losses[-2:],
            "devices": torch.cuda.device_count() if gpu else 0,
        }
        (asked.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
