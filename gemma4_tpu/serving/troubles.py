"""Known errors in a server's log that mean it will not start, each with a fix."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SMALLER = (
    "lower serving.max_model_len, serving.max_num_seqs or serving.gpu_memory_utilization, use"
    " serving.kv_cache_dtype=fp8 or serving.weight_dtype=fp8, or split over more chips"
)
_KNOWN: tuple[tuple[str, str], ...] = (
    (r"estimated maximum model length is ([\d,]+)",
     "the KV cache of one sequence does not fit; set serving.max_model_len={0} or less"),
    (r"No available memory for the cache blocks", f"the weights leave no room for a KV cache; {_SMALLER}"),
    (r"Ran out of memory in memory space (?:smem|vmem)",
     "a program does not fit into a chip's on-chip memory; lower serving.max_model_len or serving.max_num_seqs"),
    (r"RESOURCE_EXHAUSTED|Ran out of memory in memory space hbm|exceeding available bytes",
     f"the chips' memory (HBM) is exhausted; {_SMALLER}"),
    (r"CUDA out of memory|torch\.OutOfMemoryError|less than desired GPU memory utilization",
     f"the GPUs' memory is exhausted, perhaps by another process (nvidia-smi shows them); {_SMALLER}"),
    (r"Device or resource busy|libtpu\.so (?:is )?already in use|TPU is already in use",
     "another process holds the TPU (a training run, another server); sudo lsof -w /dev/vfio/* /dev/accel* shows it"),
    (r"No accelerator found|Unable to initialize backend 'tpu'|Failed to initialize TPU|No CUDA GPUs are available",
     "the container sees no accelerator; is this machine the slice that serving.slice names?"),
    (r"(?i:address already in use)|Errno 98",
     "another program took the port in the meantime; set another serving.port"),
    (r"HFValidationError|Repo id must be (?:in the form|a string)",
     "vLLM took the model's folder for a name on the Hub because the container does not see it; is the folder on a"
     " file system that the container engine can mount?"),
    (r"GatedRepoError|401 Client Error|Access to model .* is restricted",
     "vLLM tries to fetch something from the Hub that needs permission; set HF_TOKEN to a token that has it"),
    (r"unrecognized arguments?: (.+)",
     "the image's vllm serve does not know {0}; leave it out of serving.flags or serving.extra_args"),
    (r"[Ii]nvalid (tool call|reasoning) parser|(?:[Tt]ool|[Rr]easoning) parser '?\S+'? not found",
     "there is no parser of that name; Gemma 4's is gemma4"),
    (r"'Gemma4TextConfig' object has no attribute 'text_config'",
     "this vLLM does not accept text-only checkpoints of Gemma 4; merge onto Google's multimodal base"),
    (r"Could not import module 'Gemma4\w*Processor'",
     "this vLLM has no torchvision, which checkpoints that take images need (make vllm installs none); serving=local"
     " serves their text model"),
    (r"does not recognize this architecture|Model architectures .* (?:are not supported|failed to be inspected)",
     "the image is too old for Gemma 4; set a newer serving.image"),
    (r"must be divisible by tensor parallel size|not divisible by (?:tp|tensor parallel)",
     "the model's heads cannot be split that way; set another serving.tensor_parallel_size"),
    (r"greater than the derived max_model_len", "serving.max_model_len is more than the model's longest sequence"),
    (r"No space left on device", "a disk is full: the compile cache's, the model's, or /dev/shm"),
    (r"Compilation failed:",
     "a program could not be compiled; serving.env={{NUM_PRECOMPILE_WORKERS: 1}} compiles one at a time, with less"
     " memory"),
    (r"SafetensorError|MetadataIncompleteBuffer|header too (?:large|small)",
     "a weights file is damaged or truncated; copy the merged folder again"),
)  # fmt: skip
_PATTERNS = tuple((re.compile(pattern), remedy) for pattern, remedy in _KNOWN)
_HARMLESS = re.compile(r"\bDEBUG\b|\bINFO\b.*non-default args|after \d+ attempt\(s\)")
"""Lines that contain such words without meaning them: settings, allocations that are retried."""


@dataclass(frozen=True)
class Trouble:
    """A log line which means that the server will not start."""

    line: str
    remedy: str


def trouble_in(line: str) -> Trouble | None:
    """The meaning of a log line, if it is a known error."""
    if _HARMLESS.search(line):
        return None
    for pattern, remedy in _PATTERNS:
        if found := pattern.search(line):
            return Trouble(line.strip(), remedy.format(*(group or "" for group in found.groups())))
    return None
