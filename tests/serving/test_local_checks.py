"""What `serving=local` refuses before it starts, each in one message."""

import json
import socket
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from gemma4_tpu.serve import main
from gemma4_tpu.serving import local, local_checks
from tests.ports import free_port
from tests.serving import TINY


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["serving.image=vllm/vllm-tpu:v0.32.0"],
            "serving.image=vllm/vllm-tpu:v0.32.0: for vLLM, which serving=local does not use",
        ),
        (
            ["serving.tensor_parallel_size=2"],
            "serving.tensor_parallel_size=2: for vLLM, which serving=local does not use",
        ),
        (["serving.weight_dtype=fp8"], "serving.weight_dtype=fp8: serving=local computes in float32 or bfloat16"),
        (["serving.max_model_len=200000"], "the model's longest sequence is 131072 tokens"),
        (["run=nowhere"], "run=nowhere: no such folder"),
        (["serving=v6e8", "serving.weight_dtype=float32"], "serving.weight_dtype=float32: only for serving=local"),
    ],
)
def test_one_message_says_what_is_wrong(words, told, capsys):
    assert main(["serving=local", f"run={TINY}", f"serving.port={free_port()}", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error


def test_a_missing_extra_comes_with_its_install_command(monkeypatch, capsys):
    monkeypatch.setattr(local_checks, "NEEDED", ("json", "no_such_web_framework"))
    assert main(["serving=local", f"run={TINY}", f"serving.port={free_port()}"]) == 2
    error = capsys.readouterr().err
    assert "serving=local needs no_such_web_framework: pip install 'gemma4-tpu[local-serving]'" in error


def test_a_port_that_is_taken_is_one_message(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serving=local", f"run={TINY}", f"serving.port={port}"]) == 2
    assert f"serving.port={port}: can't listen on 127.0.0.1" in capsys.readouterr().err


def test_a_checkpoint_larger_than_the_memory_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(local.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**6}))
    assert main(["serving=local", f"run={TINY}", f"serving.port={free_port()}", "dry_run=true"]) == 2
    assert "serving=local is for small checkpoints" in capsys.readouterr().err


def test_a_server_whose_engine_fails_ends_with_its_error(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("out of everything")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(RuntimeError, match="out of everything"):  # a traceback, on the command line
        main(["serving=local", f"run={TINY}", f"serving.port={free_port()}", f"run_dir={tmp_path / 'record'}"])
    result = json.loads((tmp_path / "record/result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "out of everything")


def test_a_dry_run_starts_nothing(capsys):
    port = free_port()
    assert main(["serving=local", f"run={TINY}", f"serving.port={port}", "dry_run=true"]) == 0
    assert f"this process would serve on http://127.0.0.1:{port}/v1" in capsys.readouterr().out


def test_serving_in_a_container_needs_neither_torch_nor_fastapi():
    code = (
        "import sys, gemma4_tpu.serve, gemma4_tpu.serving.server;"
        "print([name for name in ('torch', 'fastapi', 'uvicorn', 'jax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
