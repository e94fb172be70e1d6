"""What `check` says of a checkpoint, and what training refuses before it reads a weight."""

import json
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from gemma4_tpu import train
from gemma4_tpu.check import main
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.config.tasks import ANY_SIZE
from gemma4_tpu.models.audit import look, look_from_afar
from gemma4_tpu.models.base import resolve_base
from gemma4_tpu.models.tensorfile import TensorFile
from tests.models.skeletons import write_skeleton

TEMPLATES = Path(__file__).resolve().parents[3] / "shared" / "data" / "templates"


def found(folder, name=ANY_SIZE, **options):
    return look(ModelConfig(name=name, path=str(folder), **options))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gemma4_31b", "30,697,345,340 of the text model; text only"),
        ("gemma4_12b", "11,907,350,320 of the text model; text only"),
        ("gemma4_26b_a4b", "25,233,141,790 of the text model, 3,822,530,590 of them active; text only"),
        ("gemma4_e4b", "7,463,013,418 of the text model; text only"),
        ("gemma4_e2b", "4,628,569,379 of the text model; text only"),
    ],
)
def test_every_released_size_is_recognised_by_its_headers(tmp_path, monkeypatch, capsys, name, told):
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("read a tensor"))
    folder = write_skeleton(tmp_path / "skeleton", name)
    assert main([f"model.path={folder}"]) == 0
    printed = capsys.readouterr().out
    assert f"model          {name} (" in printed and f"parameters     {told}" in printed
    assert "the embedding (tied)" in printed and "would be refused" not in printed


def test_parameters_of_images_are_counted_and_compared(tmp_path):
    """12B has no tower: 52,379,904 parameters of images and sound in all, by the released file's header."""
    vision = {"model.vision_embedder.patch_dense.weight": ("BF16", (3840, 6912)), "model.rest": ("BF16", (1,))}
    text = "model.language_model."
    unknown = found(write_skeleton(tmp_path / "unknown", "gemma4_12b", prefix=text, more=vision))
    assert re.search("1 unexpected: model.rest$", unknown.problems[0])
    del vision["model.rest"]
    other = found(write_skeleton(tmp_path / "other", "gemma4_12b", prefix=text, more=vision))
    assert other.problems == [] and "; 26,542,080 for images and audio" in other.facts["parameters"]
    assert "gemma4_12b as released has 52,379,904" in other.notes[0]


QUANTISED = {
    "bitsandbytes": {"self_attn.q_proj.weight": ("U8", (8192, 1)), "self_attn.q_proj.weight.absmax": ("F32", (256,))},
    "GPTQ or AWQ": {"mlp.up_proj.qweight": ("I32", (16, 384)), "mlp.up_proj.qzeros": ("I32", (1, 48))},
    "compressed-tensors": {"mlp.up_proj.weight_packed": ("I32", (384, 16))},
    "MXFP4": {"mlp.up_proj.weight_blocks": ("U8", (384, 4, 16)), "mlp.up_proj.weight_scales": ("U8", (384, 4))},
    "fp8 or another format with scales": {
        "mlp.up_proj.weight": ("F8_E4M3", (384, 128)), "mlp.up_proj.weight_scale_inv": ("F32", (3, 1)),
    },
}  # fmt: skip


STORED_INSTEAD = ("GPTQ or AWQ", "compressed-tensors", "MXFP4")
"""Methods that keep no tensor of the weight's own name."""


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_tensors_are_named_as_such(tmp_path, method):
    more = {f"model.layers.2.{name}": tensor for name, tensor in QUANTISED[method].items()}
    without = ["model.layers.2.mlp.up_proj.weight"] if method in STORED_INSTEAD else []
    (problem,) = found(write_skeleton(tmp_path / "base", "tiny", more=more, without=without)).problems
    assert f"quantised with {method}, though config.json has no quantization_config (model.layers.2." in problem
    assert "use the original weights" in problem


def test_a_weight_of_eight_bits_alone_is_refused(tmp_path):
    more = {"model.layers.2.mlp.up_proj.weight": ("F8_E4M3", (384, 128))}
    (problem,) = found(write_skeleton(tmp_path / "base", "tiny", more=more)).problems
    assert "model.layers.2.mlp.up_proj.weight is stored as float8_e4m3fn, not as a plain weight" in problem


def test_an_output_matrix_of_its_own_is_refused_and_a_copy_of_the_embedding_is_not(tmp_path):
    head = {"lm_head.weight": ("BF16", (512, 128))}
    untied = {"tie_word_embeddings": False}
    folder = write_skeleton(tmp_path / "base", "tiny", more=head, config=untied)
    assert found(folder).problems == []  # both are holes: all zeros
    assert "lm_head.weight, a copy of the embedding" in found(folder).facts["output matrix"]
    info = TensorFile(f"{folder}/model.safetensors").tensors["lm_head.weight"]
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(info.start)
        file.write(b"\x80\x3f" * 128)  # a row of ones
    (problem,) = found(folder).problems
    assert "model.safetensors: lm_head.weight is not model.embed_tokens.weight: a separate output matrix" in problem
    (problem,) = found(write_skeleton(tmp_path / "lost", "tiny", config=untied)).problems
    assert "config.json says tie_word_embeddings=false, but there is no lm_head.weight" in problem
    wrong = {"lm_head.weight": ("BF16", (513, 128))}
    (problem,) = found(write_skeleton(tmp_path / "wrong", "tiny", more=wrong)).problems
    assert problem.endswith("1 with another shape: lm_head.weight [513, 128] instead of [512, 128]")


def test_tokens_without_an_embedding_are_named(tmp_path):
    folder = write_skeleton(tmp_path / "base", "tiny")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 512, "content": "<mine>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (problem,) = found(folder).problems
    assert "tokenizer.json: 1 of its tokens have ids beyond the 512 rows of the embedding ('<mine>' 512)" in problem
    assert found(folder, tokenizer="embedded:tiny").problems == []
    (folder / "tokenizer.json").write_text('{"model": 5}')
    assert "tokenizer.json: not a readable tokenizer" in found(folder).problems[0]


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer.json", {"model": {"vocab": {"a": "x"}}}, "not a readable tokenizer .*'a' has the id 'x'"),
        ("tokenizer.json", "[" * 200_000, "tokenizer.json: not valid JSON"),
        ("config.json", "[" * 200_000, "config.json: not valid JSON"),
        ("generation_config.json", "[" * 200_000, "generation_config.json: not valid JSON"),
        ("model.safetensors.index.json", {"weight_map": {"a": ["b"]}}, r"places a in \['b'\], not a file name"),
    ],
)
def test_a_damaged_small_file_is_a_problem_and_no_traceback(tmp_path, file, content, told):
    folder = write_skeleton(tmp_path / "base", "tiny")
    if file == "model.safetensors.index.json":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    assert re.search(told, found(folder).problems[0])


def test_a_template_with_a_mistake_is_refused_as_training_would(tmp_path):
    folder = write_skeleton(tmp_path / "base", "tiny")
    for text, told in (
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "the chat template cannot be read (nested too deeply)"),
        ("a\n{% if %}", "the chat template cannot be read (line 2: Expected an expression"),
        ("{% for m in messages %}{% generation %}{{ m }}{% break %}{% endgeneration %}{% endfor %}", None),
    ):
        (folder / "chat_template.jinja").write_text(text)
        problems = found(folder).problems
        assert (told in problems[0]) if told else problems == []


def test_a_class_that_is_none_stops_nothing(tmp_path):
    folder = write_skeleton(tmp_path / "base", "tiny", config={"architectures": 5})
    assert found(folder).problems == [] and "no class named" in found(folder).facts["model"]


def test_a_per_layer_table_with_fewer_rows_limits_the_vocabulary(tmp_path):
    rows = {"model.embed_tokens_per_layer.weight": ("BF16", (500, 160))}
    folder = write_skeleton(tmp_path / "base", "tiny_e2b", more=rows, config={"vocab_size_per_layer_input": 500})
    told = found(folder).problems[0]
    assert "vocab_size_per_layer_input: model=tiny_e2b has 512, the checkpoint 500" in told  # of no size here


def test_a_template_is_missing_unknown_or_known(tmp_path):
    folder = write_skeleton(tmp_path / "base", "tiny")
    place = folder / "chat_template.jinja"
    text = place.read_text()
    assert found(folder).facts["chat template"] == "the embedded tiny model's" and not found(folder).notes
    place.write_text("{{ messages }}")
    assert "not a known revision (sha256 " in found(folder).facts["chat template"]
    assert any("the template is not a known revision" in note for note in found(folder).notes)
    place.write_text("\n")
    assert "the tokenizer has no chat template" in found(folder).problems[0]
    place.unlink()
    (problem,) = found(folder).problems
    assert "the tokenizer has no chat template (chat_template.jinja); use an instruction-tuned" in problem
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for template in (text, [{"name": "tools", "template": "x"}, {"name": "default", "template": text}]):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        assert found(folder).facts["chat template"] == "the embedded tiny model's"


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="../shared is absent: no templates of Google's")
def test_google_s_templates_are_told_apart(tmp_path):
    folder = write_skeleton(tmp_path / "base", "tiny")
    told = set()
    for path in TEMPLATES.glob("*.jinja"):
        for text in (path.read_text(), path.read_text().rstrip()):
            (folder / "chat_template.jinja").write_text(text)
            template = found(folder).facts["chat template"]
            assert path.stem.partition("_")[2] in template and path.stem[:3].upper()[:2] in template
        told.add(template)
    assert len(told) == 6


def test_stop_ids_without_the_end_of_a_turn_are_worth_knowing(tmp_path):
    folder = write_skeleton(tmp_path / "base", "tiny")
    assert found(folder).facts["stop ids"] == "1, 5"
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (note,) = found(folder).notes
    assert "eos_token_id is 1, without <turn|> (5)" in note
    (folder / "generation_config.json").unlink()
    assert found(folder).facts["stop ids"] == "none in generation_config.json" and found(folder).notes


def test_a_remote_checkpoint_is_read_where_it_is(tmp_path):
    folder = write_skeleton(tmp_path / "base", "tiny")
    fs = fsspec.filesystem("memory")
    for file in folder.iterdir():
        fs.pipe_file(f"/bucket/base/{file.name}", file.read_bytes())
    there = found("memory://bucket/base")
    assert there.problems == [] and there.facts == found(folder).facts
    fs.rm("/bucket", recursive=True)


def test_what_is_out_of_reach_is_no_reason_to_refuse(tmp_path):
    unreachable = look_from_afar(ModelConfig(name="tiny", path="http://127.0.0.1:9/base"))
    assert not unreachable.problems and "not checked from this machine (" in unreachable.notes[0]
    assert look_from_afar(ModelConfig(name="tiny", path="embedded:tiny")).facts["model"].startswith("tiny")


def test_the_command_says_that_a_checkpoint_is_out_of_reach(capsys):
    assert main(["model.path=http://127.0.0.1:9/base"]) == 2
    told = capsys.readouterr().err
    assert "model.path=http://127.0.0.1:9/base: not checked from this machine (" in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.path=random:0"], "random weights of which size? give model=<size>"),
        (
            ["model=gemma4_12b", "model.path=embedded:tiny"],
            "not a checkpoint of gemma4_12b; give model=tiny (num_layers",
        ),
        ([], "model.path is not set; set model.path=<folder"),
        (["model.path=nowhere"], "model.path=nowhere: no such folder"),
        (["model=gemma4_32b", "model.path=embedded:tiny"], "gemma4_32b"),
    ],
)
def test_the_command_ends_with_2_and_says_why(capsys, words, message):
    assert main(words) == 2
    assert message in "".join(capsys.readouterr())


def test_a_rope_factor_makes_no_other_size(tmp_path):
    wide = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25, "factor": 8.0}
    local = {"rope_type": "default", "rope_theta": 1e4}
    config = {"rope_parameters": {"sliding_attention": local, "full_attention": wide}}
    folder = write_skeleton(tmp_path / "base", "tiny", config=config)
    assert found(folder).problems == []
    assert found(folder).facts["RoPE"].endswith("on 25% of the head width, divided by 8")
    assert resolve_base(ModelConfig(path=str(folder))).arch.global_rope_factor == 8


def test_a_checkpoint_of_no_size_is_compared_with_the_nearest(tmp_path):
    folder = write_skeleton(tmp_path / "base", "tiny", config={"sliding_window": 100})
    (problem,) = found(folder).problems
    assert "matches no architecture of this project; the nearest is tiny (sliding_window: model=tiny has 128" in problem


def test_training_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("read a tensor"))
    more = {"model.layers.2.mlp.up_proj.weight_scale": ("F32", (1,))}
    folder = write_skeleton(tmp_path / "base", "tiny", more=more)
    assert train.main([f"model.path={folder}", "data.max_rows=20"]) == 2
    assert "quantised with fp8 or another format with scales" in capsys.readouterr().err


def test_the_command_does_without_jax():
    code = (
        "import sys; from gemma4_tpu.check import main; main(['model.path=embedded:tiny']); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines()[-1] == "False", done.stderr
