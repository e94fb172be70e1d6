"""Runs lm-evaluation-harness as a child process, configured by a file, and reads back its results.

It runs as its own command in its own environment, so neither its packages nor its tasks' code enter ours. It uses the
server's `/completions`, both to score and to generate; the tokenizer renders questions as turns. Answers are cached, so
a second start resumes.
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gemma4_tpu import assets
from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.errors import UserError, last_words
from gemma4_tpu.evals.checks import LM_EVAL, find_command
from gemma4_tpu.evals.endpoint import served_model
from gemma4_tpu.evals.harness import HarnessOutcome, read_written, write_documents
from gemma4_tpu.serving.runners import end_with_parent
from gemma4_tpu.tracking.files import write_text

log = logging.getLogger(__name__)

TOLD, LOG, WRITTEN, CACHE = "lm_eval.yaml", "lm_eval.log", "lm_eval", "responses"
END_SECONDS = 10.0
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
    text = yaml.safe_dump(told, sort_keys=False)
    write_text(folder / TOLD, text)
    log.info("lm_eval: %s on %s; its log: %s", ", ".join(config.lm_eval.tasks), model["id"], folder / LOG)
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as whole:  # the record's is without secrets
        whole.write(text)
        whole.flush()
        _run([find_command() or LM_EVAL, "run", "--config", whole.name], folder / LOG)
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


def _run(command: Sequence[str], log_path: Path) -> None:
    """Runs a command and waits for it; it ends with this process, however that ends."""
    with log_path.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, preexec_fn=end_with_parent
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    if code:
        lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        said = last_words("\n".join(line for line in lines if _BAR not in line))
        raise UserError(f"lm_eval ended with code {code}: {said}; see its log: {log_path}")
