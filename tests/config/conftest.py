"""Command lines in, configuration or refusal out."""

import json

import pytest

from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.errors import UserError
from gemma4_tpu.train import load_train

# Values that the rules under test look at are set here, so that tuning conf/ changes no test.
BASE = [
    "model=tiny_moe",
    "trainer.max_updates=100", "trainer.epochs=null",
    "trainer.global_batch_sequences=8", "trainer.global_batch_tokens=null", "trainer.microbatches=1",
    "data.sequence_length=512", "optimizer.warmup_updates=10",
]  # fmt: skip


@pytest.fixture
def load():
    """Loads a command line, words after the base ones."""
    return lambda *words: load_train([*BASE, *words])


@pytest.fixture
def refused():
    """The message that refuses a command line, words after the base ones."""

    def refuse(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            load_train([*BASE, *words])
        return str(caught.value)

    return refuse


@pytest.fixture
def checkpoint(tmp_path):
    """Makes the folder of a checkpoint as far as the checks look: config.json, a weights file, a tokenizer."""

    def make(architecture: str, **changes):
        folder = tmp_path / f"checkpoint-{architecture}"
        folder.mkdir()
        config = to_hf_config(ARCHITECTURES[architecture]) | changes
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").touch()
        (folder / "tokenizer.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        return folder

    return make
