"""Composition: where `conf/` is found, what the command line may say, what comes out."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import gemma4_tpu
from gemma4_tpu.check import CHECK
from gemma4_tpu.config import conf as conf_module
from gemma4_tpu.config import load as load_module
from gemma4_tpu.config.conf import config_dir, groups_of
from gemma4_tpu.config.durations import seconds_of
from gemma4_tpu.config.load import from_yaml, to_yaml
from gemma4_tpu.errors import UserError
from gemma4_tpu.evaluate import EVALUATE
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.merge import MERGE
from gemma4_tpu.plan import PLAN
from gemma4_tpu.report import REPORT
from gemma4_tpu.serve import SERVE
from gemma4_tpu.step.objective_kinds import KINDS
from gemma4_tpu.step.warmup import warmup_updates
from gemma4_tpu.train import TRAIN, load_train

GROUPS = groups_of(TRAIN)
BIG = ("gemma4_31b", "gemma4_12b", "gemma4_26b_a4b", "gemma4_e4b", "gemma4_e2b")
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options if group != "local"]


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_every_option_composes_and_passes_the_checks(group, option, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    words = [f"{group}={option}"]
    own_rows = group == "objective" and KINDS[option].rows != KINDS["sft"].rows
    words += ["data=chat_jsonl"] * own_rows
    if group == "experiment" or option == "chat_jsonl" or own_rows:  # rows of the user's own
        words += [f"data.train=[{{path: {rows}}}]", "data.heldout=[]"]
    if group == "objective" and KINDS[option].taught:
        words.append("objective.teacher=embedded:tiny")
    if group == "objective" and KINDS[option].rewarded:  # problems of the user's own
        words.append(f"rollouts.problems_path={rows}")
    if f"{group}={option}" != "model=tiny":  # which has its own checkpoint
        words.append("model.path=random:0")
    if group == "hardware" and option != "local":  # rows must divide over the largest mesh
        words.append("trainer.global_batch_sequences=512")
    loaded = load_train(words)
    assert loaded.overrides == words


LONG = "a" * 300


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (TRAIN, [f"run_dir={LONG}"]),
        (TRAIN, [f"model.path={LONG}"]),
        (TRAIN, ["data=chat_jsonl", f"data.train='{LONG}.jsonl'"]),
        (TRAIN, [f"--config-dir={LONG}"]),
        (PLAN, ["hardware=v6e1", f"trainer.plan={LONG}/plan"]),
        (MERGE, [f"run={LONG}"]),
        (EVALUATE, [f"run={LONG}"]),
        (SERVE, [f"run={LONG}", "dry_run=true"]),
        (REPORT, [f"sweep={LONG}"]),
        (CHECK, [f"model.path={LONG}"]),
    ],
    ids=lambda one: "" if isinstance(one, list) else one.name,
)
def test_a_path_that_the_system_refuses_is_a_refusal_that_names_its_key(entry, words):
    with pytest.raises(UserError) as refused:
        load_module.load(words, entry)
    key = words[-1 if "dry_run" not in words[-1] else 0].partition("=")[0]
    assert str(refused.value).startswith(f"{key}=") and "File name too long; give another path" in str(refused.value)


def test_every_slice_has_an_option():
    rows = "trainer.global_batch_sequences=512"  # rows must divide over the largest mesh
    names = {load_train([f"hardware={o}", "preview=true", rows]).root.hardware.name for o in GROUPS["hardware"]}
    assert names == {"local", *SLICES}


def test_the_promised_options_are_there():
    sizes = {
        "v5e": (1, 4, 8, 16, 32, 64, 128, 256), "v6e": (1, 4, 8, 16, 32, 64, 128, 256),
        "v5p": (8, 16, 32, 64, 128, 256, 512, 1024), "tpu7x_": (8, 16, 32, 64, 128),
    }  # fmt: skip
    tpus = {f"{generation}{size}" for generation, each in sizes.items() for size in each}
    assert set(GROUPS["hardware"]) == {"local", "h100x2", "h200", *tpus}
    assert set(GROUPS["mesh"]) == {"auto", "dp", "fsdp", "tp", "tp2"}
    assert set(GROUPS["model"]) == {*BIG, "tiny", "tiny_moe", "tiny_e2b"}
    assert set(GROUPS["lora"]) == {"default", "qlora_nf4", "qlora_int8", "none"}
    assert set(GROUPS["data"]) == {"verilog_smoke", "chat_jsonl", "codev_r1"}
    assert set(GROUPS["tracker"]) == {"none", "wandb", "mlflow", "trackio", "tensorboard", "jsonl"}


def test_sources_in_short(load, tmp_path):
    for name in ("a.jsonl", "b c.jsonl"):
        (tmp_path / name).touch()
    a, b = f"{tmp_path}/a.jsonl", f"{tmp_path}/b c.jsonl"

    def paths(*words):
        data = load(*words).root.data
        return [source.path for source in data.train], [source.path for source in data.heldout]

    assert paths(f"data.train={a}", "data.heldout=[]") == ([a], [])
    assert paths(f"data.train=[{a},'{b}']", f"data.heldout='{b}'") == ([a, b], [b])
    assert paths(f"data.train.0={a}", f"data.train.1.path='{b}'", "data.heldout=[]") == ([a, b], [])
    assert paths("data=chat_jsonl", f"data.train={a}", f"data.heldout.0.path='{b}'") == ([a], [b])
    root = load(
        f"data.train=[{a},{{path: '{b}', weight: 0.5}}]", "data.train.2.path=hf:x", "data.train.2.weight=2"
    ).root
    assert [(source.path, source.weight) for source in root.data.train] == [(a, 1.0), (b, 0.5), ("hf:x", 2.0)]


def test_overrides_reach_the_dataclasses(load):
    loaded = load("lora=qlora_nf4", "lora.rank=8", "optimizer.b1=3e-4", "data.packing=false", "tracker.tags=[a]")
    assert (loaded.root.lora.rank, loaded.root.lora.quantize) == (8, "nf4")
    assert loaded.root.optimizer.b1 == 3e-4
    assert loaded.root.data.packing == "false"
    assert loaded.root.tracker.tags == ["a"]
    assert loaded.checked.mesh is None  # JAX counts the devices of hardware=local


def test_experiment_is_a_delta_that_the_command_line_overrides():
    root = load_train(["experiment=v5p8", "model.path=random:0", "lora.rank=32"]).root
    assert (root.hardware.name, root.model.name, root.lora.alpha, root.lora.rank) == ("v5p-8", "gemma4_31b", 64.0, 32)


def test_plus_before_what_exists_already_is_taken_as_meant(load):
    loaded = load("+lora.rank=3", "+experiment=smoke")
    assert loaded.root.lora.rank == 3
    assert "lora.rank=3" in loaded.overrides


def test_sources_given_as_a_list(load, tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    first.touch(), second.touch()
    root = load(f"data.train=[{{path: {first}}}, {{path: {second}, weight: 0.5}}]").root
    assert [(source.path, source.weight) for source in root.data.train] == [(str(first), 1.0), (str(second), 0.5)]


def test_home_folder_is_expanded(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    root = load("data.train=[{path: '~/rows.jsonl'}]", "run_dir='~/run'").root
    assert root.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert root.run_dir == str(tmp_path / "run")


def test_yaml_of_a_configuration_loads_again(load):
    root = load("lora=qlora_int8", "trainer.max_updates=7").root
    assert from_yaml(to_yaml(root)) == root


def test_yaml_with_unknown_keys_names_all_of_them():
    with pytest.raises(UserError) as caught:
        from_yaml("lora: {rnk: 3, rank: x}\nmodl: {name: tiny}")
    assert all(text in str(caught.value) for text in ("lora.rnk", "lora.rank=x", "modl"))


def test_works_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_train(["model=tiny_e2b"]).root.model.name == "tiny_e2b"


def test_local_file_is_read_last_and_its_mistakes_are_named(tmp_path, monkeypatch):
    conf = tmp_path / "conf"
    shutil.copytree(config_dir(), conf, ignore=shutil.ignore_patterns("local"))
    (conf / "local").mkdir()
    for module in (conf_module, load_module):
        monkeypatch.setattr(module, "config_dir", lambda: conf)
    local = conf / "local" / "default.yaml"
    local.write_text("# @package _global_\nmodel:\n  path: random:5\n")
    assert load_train(["model=tiny_moe"]).root.model.path == "random:5"
    local.write_text("# @package _global_\nlora:\n  rnk: 3\n  alpha: x\ntrainr: 1\n")
    with pytest.raises(UserError) as caught:
        load_train(["model=tiny_moe", "lora.dropuot=0.1"])
    message = str(caught.value)
    assert message.startswith("4 problems")
    assert "lora.dropuot=0.1: no such key; did you mean lora.dropout?" in message
    assert "local/default.yaml: lora.rnk: no such key; did you mean lora.rank?" in message
    assert "local/default.yaml: lora.alpha=x: not a float" in message
    assert "local/default.yaml: trainr: no such key" in message
    local.write_text("lora: [1,\n")
    with pytest.raises(UserError, match=r"local/default\.yaml: while parsing"):
        load_train(["model=tiny_moe"])


def test_search_path_adds_experiments(tmp_path):
    (tmp_path / "experiment").mkdir()
    experiment = tmp_path / "experiment" / "mine.yaml"
    experiment.write_text("# @package _global_\nlora:\n  rank: 5\n")
    assert load_train(["--config-dir", str(tmp_path), "experiment=mine", "model=tiny_moe"]).root.lora.rank == 5
    words = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", "model=tiny_moe"]
    assert load_train(words).root.lora.rank == 5
    experiment.write_text("# @package _global_\nlora:\n  rnk: 5\n")
    with pytest.raises(UserError, match=r"experiment/mine\.yaml: lora\.rnk: no such key; did you mean lora\.rank\?"):
        load_train(words)
    experiment.write_text("# @package _global_\nlr: 3\nlora:\n  r: 5\n")
    with pytest.raises(
        UserError, match=r"(?s)lr: no such key; here it is optimizer.*lora\.r: .* here it is lora\.rank=5"
    ):
        load_train(words)
    with pytest.raises(UserError, match=r"experiment=minx: no such option; did you mean experiment=mine\?"):
        load_train([words[0], "experiment=minx", "model=tiny_moe"])


def test_both_ways_onto_the_search_path_together(tmp_path):
    for number, name in enumerate(("a", "it's b")):
        (tmp_path / name / "experiment").mkdir(parents=True)
        text = f"# @package _global_\nlora:\n  rank: {5 + number}\n"
        (tmp_path / name / "experiment" / f"e{number}.yaml").write_text(text)
    words = [f"hydra.searchpath=[file://{tmp_path}/a]", f"--config-dir={tmp_path}/it's b", "model=tiny_moe"]
    assert [load_train([*words, f"experiment=e{n}"]).root.lora.rank for n in (0, 1)] == [5, 6]
    with pytest.raises(UserError, match="--config-dir nowhere: no such folder"):
        load_train(["--config-dir", "nowhere", "model=tiny_moe"])


@pytest.mark.parametrize(
    ("words", "epochs", "updates"),
    [
        ([], None, 320),
        (["trainer.epochs=3"], 3, None),
        (["trainer.max_updates=7"], None, 7),
        (["trainer.epochs=3", "trainer.max_updates=7"], 3, 7),  # whichever comes first
        (["experiment=smoke", "trainer.epochs=3"], 3, None),  # which sets max_updates
        (["experiment=mine", "trainer.max_updates=7"], None, 7),
        (["experiment=mine"], 2, None),  # which sets epochs, and need not mention max_updates
    ],
)
def test_one_length_alone_is_meant_alone(words, epochs, updates, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  epochs: 2\n")
    trainer = load_train(["model=tiny_moe", f"hydra.searchpath=[file://{tmp_path}]", *words]).root.trainer
    assert (trainer.epochs, trainer.max_updates) == (epochs, updates)


@pytest.mark.parametrize(
    ("words", "warmup", "of_1000"),
    [
        ([], (5, None), 5),
        (["optimizer.warmup_fraction=0.03"], (None, 0.03), 30),
        (["optimizer.warmup_updates=7"], (7, None), 7),
        (["experiment=v5p8", "model=gemma4_31b", "optimizer.warmup_fraction=0.1"], (None, 0.1), 100),
    ],
)
def test_one_warm_up_alone_is_meant_alone(words, warmup, of_1000):
    optimizer = load_train(["model=tiny_moe", "model.path=random:0", *words]).root.optimizer
    assert (optimizer.warmup_updates, optimizer.warmup_fraction) == warmup
    assert warmup_updates(optimizer, 1000) == of_1000


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("2h30m", 9000), ("1d", 86_400), ("90s", 90), ("1.5h", 5400), ("90", 5400), ("1H 1m", 3660), ("0", 0), ("", None),
     ("m", None), ("2h30", None), ("-1", None), ("1m1h", None), ("1e3", None)],
)  # fmt: skip
def test_durations(written, seconds):
    assert seconds_of(written) == seconds


def test_hydras_word_for_the_run_folder(tmp_path):
    loaded = load_train(["model=tiny_moe", f"hydra.run.dir='{tmp_path}/a run'"])
    assert loaded.root.run_dir == f"{tmp_path}/a run"
    with pytest.raises(UserError, match=r"hydra\.run\.dir=a and run_dir=b: both set the run folder"):
        load_train(["hydra.run.dir=a", "run_dir=b"])


@pytest.mark.parametrize(
    ("word", "loggers"), [("hydra.verbose=true", ["gemma4_tpu"]), ("hydra.verbose=[lib_a,lib_b]", ["lib_a", "lib_b"])]
)
def test_hydras_word_for_debug_records(word, loggers):
    before = {name: logging.getLogger(name).level for name in loggers}
    try:
        load_train(["model=tiny_moe", word])
        assert {logging.getLogger(name).level for name in loggers} == {logging.DEBUG}
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def test_help_tells_groups_keys_meanings_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        load_train(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "v5p8, v5p16, v5p32" in shown
    assert "lora.rank=16  (int)\n      Inner dimension r of the adapters." in shown
    assert "optimizer.max_grad_norm=1.0  (float or null)" in shown
    assert max(map(len, shown.splitlines())) <= 120
    undocumented = [
        line
        for line, below in zip(shown.splitlines(), shown.splitlines()[1:], strict=False)
        if line.startswith("  ") and line.endswith(")") and "=" in line and not below.startswith("      ")
    ]
    assert undocumented == []


def test_version(capsys):
    with pytest.raises(SystemExit):
        load_train(["--version"])
    assert capsys.readouterr().out == f"gemma4-tpu {gemma4_tpu.__version__}\n"


def _python(code: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["--help"], 0), (["lora.rnk=3", "trainer.epochs=1", "model=tinny"], 2), (["model=gemma4_31b"], 2)],
)
def test_the_entry_point_answers_at_once_and_without_jax(argv, code, tmp_path):
    """CPU seconds rather than the clock's: the machine may be busy with other tests. Of this process alone: others that
    a test has left may be waited for meanwhile.
    """
    command = [sys.executable, "-X", "importtime", "-m", "gemma4_tpu.train", *argv]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=stderr)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = (tmp_path / "stderr").read_text()
    assert process.returncode == code
    assert "Traceback" not in said
    imported = {line.rsplit("|", 1)[1].strip() for line in said.splitlines() if line.startswith("import time:")}
    assert not imported & {"jax", "transformers", "numpy", "tunix", "flax"}
    assert used.ru_utime + used.ru_stime < 2.5


def test_hydra_prints_the_job(tmp_path):
    code = "import sys; from gemma4_tpu.train import load_train; load_train(sys.argv[1:])"
    done = _python(code, "model=tiny_moe", "--cfg", "job", "lora.rank=3", cwd=tmp_path)
    assert OmegaConf.create(done.stdout).lora.rank == 3
    assert not list(tmp_path.iterdir())  # Hydra leaves no folder behind
