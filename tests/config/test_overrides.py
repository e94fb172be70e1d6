"""Each mistake on the command line, and what its refusal says."""

import pytest

from gemma4_tpu.config.keys import leaf_keys, unknown_key
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.config.serving import ServeRoot
from gemma4_tpu.config.synonyms import MEANINGS, synonym
from gemma4_tpu.config.tasks import EvaluateRoot
from gemma4_tpu.train import load_train

MISTAKES = [
    # key
    ("lora.rnk=8", "lora.rnk=8: no such key; did you mean lora.rank?"),
    ("+lora.rnk=8", "+lora.rnk=8: no such key; did you mean lora.rank?"),
    ("++lora.rnk=8", "did you mean lora.rank?"),
    ("Lora.Rank=8", "here it is lora.rank=8"),
    ("lorra.rank=8", "did you mean lora.rank?"),
    ("rank=8", "did you mean lora.rank?"),
    ("lora.max_updates=3", "did you mean trainer.max_updates?"),
    ("lora.rank.x=3", "lora.rank is int and has no keys"),
    ("zzz=3", "zzz=3: no such key; the configuration has hardware, distributed, mesh, model"),
    ("data.train.0.pth=x", "did you mean data.train.0.path?"),
    ("data.train=[{pth: x}]", "data.train.0.pth: no such key; did you mean path?"),
    ("data.train.7.path=x", "data.train.7.path=x: data.train has no item 7"),
    # group and option
    ("modl=tiny", "modl=tiny: no such key or group; did you mean model?"),
    ("+modl=tiny", "did you mean model?"),
    ("MODEL=tiny", "did you mean model?"),
    ("model=tinny", "model=tinny: no such option; did you mean model=tiny"),
    ("+experiment=smok", "+experiment=smok: no such option; did you mean experiment=smoke?"),
    ("hardware=v5p-8", "did you mean hardware=v5p8? (options:"),
    ("model=gemma4-31b", "did you mean model=gemma4_31b?"),
    ("model=null", "a group takes one of its options"),
    ("lora={rank: 4}", "keys: lora.key=value"),
    # type
    ("lora.rank=abc", "lora.rank=abc: not an int"),
    ("lora.rank=1.5", "lora.rank=1.5: not an int"),
    ("lora.rank=null", "lora.rank=null: not an int"),
    ("lora.rslora=maybe", "lora.rslora=maybe: not a bool"),
    ("trainer.epochs=many", "trainer.epochs=many: not a float or null"),
    ("lora.targets=attention", "not a list of str; write 'lora.targets=[attention]'"),
    ("lora.targets=null", "not a list of str; write 'lora.targets=[]'"),
    ("lora.ranks=8", "not a dict; write 'lora.ranks={name: value}'"),
    ("data.train=a.jsonl", "data.train.0.path=a.jsonl: no such file"),
    ("data.train=a.jsonl,b.jsonl", "write 'data.train=[a,b]', or add --multirun"),
    ("data.train=[{pth: x}, a.jsonl]", "data.train.0.pth: no such key; did you mean path?"),
    ("run_dir=", "run_dir=: empty; give a value, or run_dir=null"),
    ("trainer.compile_cache=${oc.env:NO_SUCH_VARIABLE,''}", "trainer.compile_cache=: empty"),
    ("data.train=[{path: 'embedded:verilog_smoke/train.jsonl.gz', split: ''}]", "data.train.0.split=: empty"),
    ("name=${nope}", "name: Interpolation key 'nope' not found"),
    # form
    ("run_dir='r\udcffn'", "run_dir='r\\udcffn': not UTF-8; give another name, or"),
    ("lora.rank", "lora.rank: settings are written key=value"),
    ("--lora.rank=8", "--lora.rank=8: no such flag; settings are written lora.rank=value"),
    ("name=a{b", "the value can't be read; quote it: \"name='a{b'\""),
    ("adapters=[/my runs (1),b]", "quote what it lists: \"adapters=['/my runs (1)','b']\""),
    ("lora.rank=4,8", "several values are a sweep; give one value, or add --multirun"),
    ("lora.targets=attention,mlp", "write 'lora.targets=[a,b]', or add --multirun"),
    ("~lora", "~lora: groups can't be removed; give lora=<one of default, none"),
    ("~lora.rank", "keys can't be removed"),
    ("hydra.sweep.dir=x", "takes effect with --multirun only"),
    ("hydra.output_subdir=x", "the run folder is set by run_dir=<folder>"),
    ("hydra.verbose=3", "give true, false, the name of a logger or a list of names"),
    ("model=e4b/checkpoint", "a path is given as model.path=e4b/checkpoint"),
    ("data=rows.jsonl", "a path is given as data=chat_jsonl data.train=rows.jsonl"),
    # words of other trainers
    ("lr=1e-4", "lr=1e-4: no such key; here it is optimizer.learning_rate=1e-4"),
    ("trainer.lr=1e-4", "here it is optimizer.learning_rate=1e-4"),
    ("save_steps=50", "here it is checkpoint.every=50 (counted in updates)"),
    ("logging_steps=5", "here it is trainer.log_every=5"),
    ("max_steps=60", "here it is trainer.max_updates=60"),
    ("num_epochs=3", "here it is trainer.epochs=3"),
    ("num_train_epochs=3", "here it is trainer.epochs=3"),
    ("gradient_accumulation_steps=8", "here it is trainer.microbatches=8 (splits an update's rows"),
    ("batch_size=4", "here it is trainer.global_batch_sequences=4 (rows of data.sequence_length tokens per update"),
    (
        "per_device_train_batch_size=4",
        "here it is trainer.global_batch_sequences=… (4 times devices times accumulation",
    ),
    ("warmup_ratio=0.03", "here it is optimizer.warmup_fraction=0.03 (of the run's updates)"),
    ("early_stopping_patience=3", "here it is trainer.patience=3 (held-out evaluations"),
    ("r=8", "here it is lora.rank=8"),
    ("lora.r=8", "lora.r=8: no such key; here it is lora.rank=8"),
    ("lora_alpha=16", "here it is lora.alpha=16"),
    ("max_seq_length=2048", "here it is data.sequence_length=2048"),
    ("output_dir=out", "here it is run_dir=out"),
    ("bf16=true", "here it is trainer.compute_dtype=bfloat16"),
    ("target_modules=[q_proj,v_proj]", "here it is lora.targets=[attention,mlp] (attention is q, k, v, o; mlp"),
    ("eval_dataset=a.jsonl", "here it is data.heldout=a.jsonl"),
    ("dataset.path=a.jsonl", "here it is data.train=a.jsonl"),
    ("data.path=a.jsonl", "here it is data.train=a.jsonl"),
    ("datasets=[a.jsonl,b.jsonl]", "here it is data.train=[a.jsonl,b.jsonl]"),
    # what our key could not hold is no hint
    ("save_strategy=epoch", "here it is checkpoint.every=… (counted in updates)"),
    ("report_to=[wandb]", "here it is tracker=… (none, wandb, mlflow, trackio, tensorboard or jsonl)"),
    ("--config=mine.yaml", "--config-dir <folder> experiment=mine reads <folder>/experiment/mine.yaml"),
    ("conf/mine.yml", "--config-dir <folder> experiment=mine reads"),
    ("--multi", "--multi: no such flag"),
    (
        "--lr=1e-4",
        "--lr=1e-4: no such flag; settings are written without dashes, and here it is optimizer.learning_rate",
    ),
    ("--learning_rate=1e-4", "settings are written optimizer.learning_rate=value"),
    ("--preview", "settings are written preview=true"),
    # values
    ("run_dir=gs:/bucket/run", "an address is written gs://; give run_dir=gs://bucket/run"),
    ("run_dir=gs//bucket/run", "an address is written gs://; give run_dir=gs://bucket/run"),
    ("data.train.0.path='${oc.env:NO_SUCH}/a.jsonl'", "data.train.0.path: \"Environment variable 'NO_SUCH' not found"),
    ("lora.targets=[q_proj]", "lora.targets: 'q_proj' is no target; here it is q"),
    ("lora.targets=[all-linear]", "here it is attention and mlp"),
]


@pytest.mark.parametrize(("word", "told"), MISTAKES, ids=[word for word, _ in MISTAKES])
def test_a_mistake_is_named_with_its_remedy(refused, word, told):
    message = refused(word)
    assert told in message
    assert "problems in the configuration" not in message  # nothing but this mistake is complained about


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--learning_rate", "2e-4"],
            "--learning_rate=2e-4: no such flag; settings are written optimizer.learning_rate",
        ),
        (["--max_steps", "-1"], "here it is trainer.max_updates=-1 (counted in updates; null: the length of"),
        (["--config", "mine.yaml"], "a file of settings is an experiment"),
    ],
)
def test_a_flag_and_its_value_are_one_mistake(refused, words, told):
    message = refused(*words)
    assert told in message and "problems" not in message


@pytest.mark.parametrize(
    "word", ["lr=1e-4", "datasets=[a.jsonl]", "dataset_name=a.jsonl", "eval_data=a.jsonl", "use_rslora=true"]
)
def test_a_hint_is_a_word_that_composes(refused, tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    hint = refused(word).partition("here it is ")[2].partition(" (")[0].splitlines()[0]
    assert load_train([hint]).overrides


def test_every_word_of_other_trainers_has_one_meaning_that_is_a_key():
    words = [word for words, _, _ in MEANINGS for word in words.split()]
    assert len(words) == len(set(words))
    ours = {key.rsplit(".", 1)[-1] for key in leaf_keys(TrainRoot)}
    assert not ours & set(words)
    assert all(unknown_key(TrainRoot, setting.partition("=")[0]) is None for _, setting, _ in MEANINGS)


def test_a_word_that_another_command_knows_is_no_synonym_there():
    assert synonym(EvaluateRoot, "trainer.batch_size", "4") is None  # eval.batch_size
    assert synonym(ServeRoot, "lr", "1") is None  # nothing is trained there


def test_all_problems_come_in_one_message(refused):
    message = refused(
        "lora.rnk=8",
        "model=tinny",
        "trainer.log_every=x",
        "foo",
        "optimizer.b1=2",
        "data.packing=perhaps",
        "trainer.microbatches=3",
    )
    assert message.startswith("7 problems in the configuration:\n  - ")
    for told in (
        "did you mean lora.rank?",
        "did you mean model=tiny",
        "trainer.log_every=x: not an int",
        "foo: settings",
        "optimizer.b1=2.0: must be at least 0 and less than 1",
        "data.packing=perhaps: not a choice",
        "trainer.microbatches=3: does not divide the 8 rows",
    ):
        assert told in message
    assert message.endswith("(python -m gemma4_tpu.train --help lists every key)")


def test_no_complaint_about_what_a_misspelt_word_was_to_settle(refused):
    """`trainr.global_batch_sequences=null` would have made the two batch sizes consistent."""
    message = refused("trainer.global_batch_tokens=512", "trainr.global_batch_sequences=null")
    assert "did you mean trainer.global_batch_sequences?" in message
    assert "problems" not in message


def test_nothing_else_is_judged_without_the_experiment(refused):
    assert "problems" not in refused("experiment=v5p9", "lora.rank=0")


def test_a_sweep_is_checked_before_it_starts(refused):
    message = refused("--multirun", "lora.rank=4,x", "model=tiny_moe,tinz", "lora.rnk=1,2")
    assert message.startswith("3 problems")
    assert "lora.rank=x: not an int" in message
    assert "lora.rnk=1,2: no such key" in message


def test_flags_that_mean_nothing_here_are_refused(refused):
    assert "--config-name x: not supported; extend conf/ with --config-dir" in refused("--config-name", "x")
    assert "argument --cfg/-c: invalid choice: 'foo'" in refused("--cfg=foo")
