"""Finding the base model that a configuration names."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from gemma4_tpu import assets
from gemma4_tpu.architectures import ARCHITECTURES, to_hf_config
from gemma4_tpu.checkpoint_folder import read_config
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.base import Base, resolve_base
from gemma4_tpu.models.tensorfile import Checkpoint
from tests.models.checkpoints import make_checkpoint


@pytest.fixture
def tiny_moe(tmp_path):
    """A folder whose config.json is that of `tiny_moe`; its weights are not looked at."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(ARCHITECTURES["tiny_moe"])))
    (tmp_path / "model.safetensors").touch()
    return tmp_path


def test_a_local_checkpoint_brings_its_own_tokenizer(tiny_moe):
    base = resolve_base(ModelConfig(name="tiny_moe", path=str(tiny_moe)))
    assert (base.arch, base.folder, base.tokenizer_folder) == (ARCHITECTURES["tiny_moe"], str(tiny_moe), str(tiny_moe))
    assert base.seed is None
    other = resolve_base(ModelConfig(name="tiny_moe", path=str(tiny_moe), tokenizer="elsewhere"))
    assert other.tokenizer_folder == "elsewhere"


def test_a_remote_checkpoint_is_read_where_it_is(tiny_moe):
    fs = fsspec.filesystem("memory")
    for file in tiny_moe.iterdir():
        fs.pipe_file(f"/bucket/base/{file.name}", file.read_bytes())
    base = resolve_base(ModelConfig(name="tiny_moe", path="memory://bucket/base/"))
    assert base.folder == base.tokenizer_folder == "memory://bucket/base"
    with pytest.raises(UserError, match="memory://bucket/nothing: no such folder"):
        resolve_base(ModelConfig(name="tiny_moe", path="memory://bucket/nothing"))
    fs.rm("/bucket", recursive=True)


def test_random_weights_take_the_embedded_tokenizer_and_have_a_fingerprint_of_their_own():
    first, second, larger = (
        resolve_base(ModelConfig(name=name, path=path))
        for name, path in [("tiny_e2b", "random:0"), ("tiny_e2b", "random:1"), ("tiny_moe", "random:0")]
    )
    assert (first.folder, first.seed, first.arch) == (None, 0, ARCHITECTURES["tiny_e2b"])
    assert Path(first.tokenizer_folder) == assets.ROOT / "tiny"
    assert len({base.fingerprint for base in (first, second, larger)}) == 3


def test_the_fingerprint_is_that_of_the_weights(tmp_path):
    copy = shutil.copytree(make_checkpoint("dense"), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    assert read_config(str(copy)) == config
    base = Base(ARCHITECTURES["tiny"], str(copy), None, str(copy))
    assert base.fingerprint == Checkpoint(str(make_checkpoint("dense"))).fingerprint


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(name="gemma3_27b"), "model.name=gemma3_27b: no such architecture.*there are: gemma4_31b, "),
        (ModelConfig(name="gemma4_31b"), "model.path: gemma4_31b needs its checkpoint; set model.path=<folder"),
        (ModelConfig(path="random:x"), "model.path=random:x: write random:SEED"),
        (
            ModelConfig(path="no/such/folder"),
            "model.path=no/such/folder: no such folder .nor is there a folder no/such.; give a local or gs://",
        ),
        (
            ModelConfig(path="google/gemma-4-31b-it"),
            "no such folder.*; if that is a model's name, download it first: hf download google/gemma-4-31b-it --local",
        ),
        (ModelConfig(path=__file__), "is a file, not a folder; give a local"),
        (ModelConfig(path="embedded:huge"), "embedded:huge: no such embedded asset"),
        (ModelConfig(path=str(Path(__file__).parent)), "has no config.json and no model.safetensors"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        resolve_base(model)


def test_a_contradiction_names_the_fields_and_the_fitting_model(tiny_moe):
    message = r"^model\.path=/.*: not a checkpoint of tiny; give model=tiny_moe \(embed_dim: model=tiny has 128, the"
    with pytest.raises(UserError, match=message):
        resolve_base(ModelConfig(name="tiny", path=str(tiny_moe)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "a checkpoint quantised with gptq; use the original"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused(tiny_moe, change, message):
    config = json.loads((tiny_moe / "config.json").read_text())
    (tiny_moe / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        resolve_base(ModelConfig(name="tiny_moe", path=str(tiny_moe)))


def test_an_adapter_is_not_a_base(tiny_moe):
    (tiny_moe / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds adapter_config\.json: a PEFT adapter, not a model"):
        resolve_base(ModelConfig(name="tiny_moe", path=str(tiny_moe)))


def test_finding_and_reading_a_base_needs_no_jax():
    """Merging and configuration checks do without it; starting JAX takes seconds and may claim an accelerator."""
    code = "import sys, gemma4_tpu.models.base, gemma4_tpu.models.names; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
