"""What lines of a server's log mean."""

import pytest

from gemma4_tpu.serving.troubles import trouble_in


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("ValueError: To serve at least one request with the models's max seq len (40960), (5.62 GiB KV cache is"
         " needed, which is larger than the available KV cache memory (4.50 GiB). Based on the available memory, the"
         " estimated maximum model length is 32768.", "serving.max_model_len=32768 or less"),
        ("RESOURCE_EXHAUSTED: Error loading program 'jit__multi_slice': Attempting to reserve 6.14G at the bottom of"
         " memory.", "serving.gpu_memory_utilization"),
        ("RuntimeError: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space smem.",
         "on-chip memory"),
        ("RuntimeError: Unable to initialize backend 'tpu': UNKNOWN: TPU initialization failed: open(/dev/vfio/1):"
         " Device or resource busy", "another process holds the TPU"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "nvidia-smi"),
        ("OSError: [Errno 98] Address already in use", "another serving.port"),
        ("huggingface_hub.errors.HFValidationError: Repo id must be in the form x", "the container does not see it"),
        ("vllm: error: unrecognized arguments: --max-num-seq 3", "does not know --max-num-seq 3"),
        ("AttributeError: 'Gemma4TextConfig' object has no attribute 'text_config'", "multimodal base"),
        ("(APIServer pid=23354) ERROR 11-26 16:14:15 [registry.py:1120] ModuleNotFoundError: Could not import module"
         " 'Gemma4Processor'. Are this object's requirements defined correctly?", "has no torchvision"),
        ("OSError: [Errno 28] No space left on device", "a disk is full"),
        ("RuntimeError: Compilation failed: stack overflow", "NUM_PRECOMPILE_WORKERS: 1"),
    ],
)  # fmt: skip
def test_known_errors_have_a_remedy(line, advice):
    assert advice in trouble_in(line).remedy


@pytest.mark.parametrize(
    "line",
    [
        "INFO 10-01 10:00:00 [utils.py:299] non-default args: {'model': '/model', 'max_model_len': 16384}",
        "INFO:     127.0.0.1:1 - \"GET /health HTTP/1.1\" 200 OK",
        "TpuClient::AllocateBuffer returning error after 1 attempt(s): RESOURCE_EXHAUSTED: to allocate 1.96G.",
    ],
)  # fmt: skip
def test_other_lines_mean_nothing(line):
    assert trouble_in(line) is None
