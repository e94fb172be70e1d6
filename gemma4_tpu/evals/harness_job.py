"""Runs lm-evaluation-harness as a child process, configured by a file, and reads back its results.

It runs as its own command in its own environment, so neither its packages nor its tasks' code enter ours. It uses the
server's `/completions`, both to score and to generate; the tokenizer renders questions as turns. Answers are cached, so
a second start resumes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from gemma4_tpu import assets
from gemma4_tpu.children import run_logged
from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.overseer import bytes_of_its_own
from gemma4_tpu.data.tokenizer import apply_template, encode, load_tokenizer
from gemma4_tpu.errors import UserError, last_words
from gemma4_tpu.evals.checks import LM_EVAL, find_command
from gemma4_tpu.evals.endpoint import served_model
from gemma4_tpu.evals.harness import HarnessOutcome, read_written, write_documents
from gemma4_tpu.scratch import scratch_folder
from gemma4_tpu.tracking.files import jsonable, write_json, write_text

log = logging.getLogger(__name__)

TOLD, LOG, WRITTEN, CACHE = "lm_eval.yaml", "lm_eval.log", "lm_eval", "responses"
SILENT_SECONDS = 1800.0
"""In addition to what a request with all its retries can take; lm_eval prints a bar while it works."""
_BAR = "%|"  # in every line of a progress bar, which can follow the last words


def run_harness(config: EvalConfig, tokenizer: str, folder: Path) -> HarnessOutcome:
    """Runs the tasks on `eval.endpoint` and writes their scores to `folder`.

    Args:
      config: server, tasks, limits.
      tokenizer: folder of the model's tokenizer.
      folder: the record's.

    Raises:
      UserError: no server answers, or lm_eval failed; repeats its last words.
    """
    model = served_model(config)
    told = arguments(config, tokenizer, folder, model)
    write_text(folder / TOLD, yaml.safe_dump(told, sort_keys=False))
    try_tokenizer(tokenizer, config)
    log.info("lm_eval: %s on %s; its log: %s", ", ".join(config.lm_eval.tasks), model["id"], folder / LOG)
    started = time.perf_counter()
    with scratch_folder() as scratch:  # lm_eval needs its configuration with secrets, and repeats it in its results
        (scratch / TOLD).write_text(yaml.safe_dump(told | {"output_path": str(scratch / WRITTEN)}), encoding="utf-8")
        _run([find_command() or LM_EVAL, "run", "--config", str(scratch / TOLD)], folder / LOG, config, tokenizer)
        _keep(scratch / WRITTEN, folder / WRITTEN)
    version, tasks, values = read_written(folder / WRITTEN)
    settings = {
        "endpoint": config.endpoint, "model": model["id"], "tokenizer": tokenizer, "limit": config.max_problems,
        "system": config.system, "chat_template": config.lm_eval.chat_template,
    }  # fmt: skip
    outcome = HarnessOutcome(
        model=model["id"], lm_eval=version, settings=settings, tasks=tasks, seconds=time.perf_counter() - started
    )
    write_documents(folder, values)
    outcome.write(folder)
    return outcome


def arguments(config: EvalConfig, tokenizer: str, folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    """The configuration for `lm_eval run --config`. `model`: the server's entry for it."""
    longest = model.get("max_model_len")
    server = {
        "base_url": f"{config.endpoint}/completions", "model": model["id"], "tokenizer": assets.resolve(tokenizer),
        "tokenizer_backend": "huggingface", "num_concurrent": config.concurrency, "max_retries": config.retries + 1,
        "timeout": int(config.request_timeout_seconds), **({"max_length": longest} if longest else {}),
    }  # fmt: skip
    harness = config.lm_eval
    return {
        "model": "local-completions", "model_args": server, "tasks": list(harness.tasks),
        "include_path": harness.include, "num_fewshot": harness.shots, "limit": config.max_problems,
        "apply_chat_template": harness.chat_template, "system_instruction": config.system, "log_samples": True,
        "output_path": str(folder / WRITTEN), "use_cache": str(folder / CACHE),
    }  # fmt: skip


def try_tokenizer(folder: str, config: EvalConfig) -> None:
    """Renders and encodes a question as lm_eval will, within the limits of our own evaluations.

    Raises:
      UserError: the tokenizer cannot be loaded, or its template refuses the question.
    """
    tokenizer, text = load_tokenizer(folder), "x"
    if config.lm_eval.chat_template:
        system = [{"role": "system", "content": config.system}] if config.system else []
        try:
            text = apply_template(tokenizer, [*system, {"role": "user", "content": text}], add_generation_prompt=True)
        except RowDropped as problem:
            raise UserError(f"{folder}: the chat template cannot render a question ({problem})") from problem
    encode(tokenizer, [text])


def _run(command: Sequence[str], path: Path, config: EvalConfig, tokenizer: str) -> None:
    """Runs lm_eval, and ends it if it hangs or fills memory, whatever a question makes of template and tokenizer."""
    path.unlink(missing_ok=True)
    silent_seconds = SILENT_SECONDS + (config.retries + 1) * config.request_timeout_seconds
    most_bytes = psutil.virtual_memory().available // 2
    advice = f"if the tokenizer or template of {tokenizer} is to blame, use the original checkpoint's; its log: {path}"

    def watch(pid: int, silent: float) -> None:
        if silent > silent_seconds:
            raise UserError(f"lm_eval has printed nothing for {silent_seconds:,.0f} s and was ended; {advice}")
        if bytes_of_its_own(pid) > most_bytes:
            told = f"more than {most_bytes / 2**30:.1f} GiB, half of the memory that was free"
            raise UserError(f"lm_eval took {told}, and was ended; {advice}")

    if code := run_logged(command, path, watch=watch):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        said = last_words("\n".join(line for line in lines if _BAR not in line))
        raise UserError(f"lm_eval ended with code {code}: {said}; see its log: {path}")


def _keep(written: Path, folder: Path) -> None:
    """Copies lm_eval's own files (JSON, and JSONL for samples) without secrets."""
    for path in sorted(path for path in written.rglob("*.json*") if path.is_file()):
        place = folder / path.relative_to(written)
        place.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            write_json(place, json.loads(text))
        else:
            rows = (json.loads(line) for line in text.split("\n") if line)
            write_text(place, "".join(json.dumps(jsonable(row)) + "\n" for row in rows))
