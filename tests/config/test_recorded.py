"""`replay=` on the command line: the recorded values are what counts, problems are found before JAX starts."""

import subprocess
import sys

import pytest

from gemma4_tpu.config.load import load, to_yaml
from gemma4_tpu.errors import UserError
from gemma4_tpu.plan import PLAN
from gemma4_tpu.train import load_train
from tests.tpu_compiler import needs_tpu_compiler

RECORDED = ["experiment=smoke", "lora.rank=6", "trainer.seed=7", "data.train.0.weight=0.5", "tracker=jsonl"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with the configuration of a run whose values are in no file of conf/; it was resumed and previewed."""
    folder = tmp_path_factory.mktemp("runs") / "rank=6,seed=7"  # as sweeps name them
    folder.mkdir()
    root = load_train([*RECORDED, f"run_dir='{folder}'", "preview=true"]).root
    (folder / "config.yaml").write_text(to_yaml(root))
    return folder


def replay(folder, *words):
    return load_train([f"replay='{folder}'", *words])


def test_the_record_is_loaded_into_a_new_folder(recorded):
    loaded = replay(recorded)
    root = loaded.root
    assert (root.name, root.lora.rank, root.trainer.seed, root.trainer.max_updates) == ("smoke", 6, 7, 4)
    assert root.data.train[0].weight == 0.5 and root.tracker.kind == "jsonl"
    assert (root.replay, root.run_dir, root.preview) == (str(recorded), None, False)
    assert loaded.overrides == [f"replay='{recorded}'"]


def test_further_words_change_the_record(recorded):
    loaded = replay(recorded, "lora.rank=8", "tracker=none", "lora=qlora_int8", "replay_allow=[code,packages]")
    root = loaded.root
    assert (root.lora.rank, root.lora.quantize, root.trainer.seed, root.tracker.kind) == (8, "int8", 7, "none")
    assert root.replay_allow == ["code", "packages"]
    assert "lora.rank=8" in loaded.overrides


def test_values_that_the_recorded_version_did_not_have_are_todays(recorded, tmp_path):
    text = (recorded / "config.yaml").read_text()
    assert "  eval_every: 2\n" in text and "distributed:" in text
    older = text.replace("  eval_every: 2\n", "")
    older = older[: older.index("distributed:")] + older[older.index("mesh:") :]
    (tmp_path / "config.yaml").write_text(older)
    now, today = replay(tmp_path).root, load_train([]).root
    assert (now.trainer.eval_every, now.distributed) == (today.trainer.eval_every, today.distributed)
    assert now.lora.rank == 6


@needs_tpu_compiler
def test_a_recorded_run_can_be_planned(recorded):
    root = load([f"replay='{recorded}'", "hardware=v5p8", "mesh=fsdp"], PLAN).root
    assert (root.name, root.lora.rank, root.hardware.name, root.plan.parallel) == ("plan", 6, "v5p-8", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["replay=nowhere"], r"replay=nowhere: not a run folder \(no config.yaml\)"),
        (["replay="], "replay=: not a run folder"),
        (["replay=HERE", "experiment=smoke"], "experiment=smoke: replay already has a whole recipe"),
        (["replay=HERE", "replay_allow=[cod]"], r"'cod' is not a part that is compared; did you mean code\?"),
        (["replay=HERE", "run_dir=HERE"], "holds the run to repeat; give another run_dir"),
        (["replay=HERE", "lora.rnk=3"], r"lora.rnk=3: no such key; did you mean lora.rank\?"),
        (["replay=HERE", "lora.rank=0"], "lora.rank=0"),
        (["replay_allow=[code]"], r"replay_allow=\[code\]: only with replay=<run folder>"),
    ],
)
def test_refusals(recorded, words, message):
    with pytest.raises(UserError, match=message):
        load_train([word.replace("HERE", f"'{recorded}'") for word in words])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: x\nexport: {}\n", "not the folder of a training run"),
        ("lora: [\n", "config.yaml can't be read"),
        ("- 1\n", "not the folder of a training run"),
        ("trainer:\n  sede: 1\n", r"config.yaml: trainer.sede: no such key; did you mean trainer.seed\?"),
        ("trainer:\n  seed: many\n", "config.yaml: trainer.seed=many: not an int"),
    ],
)
def test_damaged_records_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        replay(tmp_path)


def test_a_record_on_a_bucket_is_read_there(recorded, bucket):
    import fsspec

    fsspec.filesystem("gs").pipe_file(f"{bucket}/runs/one/config.yaml", (recorded / "config.yaml").read_bytes())
    assert replay(f"{bucket}/runs/one").root.lora.rank == 6
    with pytest.raises(UserError, match="not a run folder"):
        replay(f"{bucket}/runs/two")


def test_the_record_is_checked_before_jax_is_there(recorded):
    code = (
        "import sys; from gemma4_tpu.train import load_train; "
        f"load_train(['replay=\\'{recorded}\\'']); print(sorted({{'jax', 'numpy'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
