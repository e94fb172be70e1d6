"""Checks across fields: each impossible combination, and what its refusal says."""

import json

import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.commands import ENTRIES
from gemma4_tpu.config.keys import leaf_keys
from gemma4_tpu.config.limits import CHOICES, RANGES
from gemma4_tpu.config.machines import HardwareConfig, MeshConfig
from gemma4_tpu.config.schema import DataConfig, DataSource, ModelConfig, OptimizerConfig, TrainerConfig, TrainRoot
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.training.checks import examine_train, warmup_warning
from gemma4_tpu.training.hardware_checks import check_devices
from gemma4_tpu.training.meshes import resolve_mesh, row_splits
from gemma4_tpu.training.recipe import rows_per_microbatch, rows_per_update

REFUSALS = [
    # ranges and choices
    (["lora.rank=0"], "lora.rank=0: must be at least 1"),
    (["lora.alpha=nan"], "lora.alpha=nan: must be a number more than 0"),
    (["lora.dropout=1"], "lora.dropout=1.0: must be at least 0 and less than 1"),
    (["optimizer.max_grad_norm=0"], "must be more than 0 (null: off)"),
    (["trainer.loss_chunk_tokens=0"], "trainer.loss_chunk_tokens=0: must be at least 1"),
    (["checkpoint.every=0"], "checkpoint.every=0: must be at least 1"),
    (["trainer.remat=full"], "trainer.remat=full: not a choice (choices: none, products, attention, decoder, auto)"),
    (["trainer.attention=splash"], "head widths [16, 32] must be multiples of 128"),
    (
        ["model=gemma4_31b", "model.path=random:0", "trainer.attention=splash", "data.sequence_length=500"],
        "data.sequence_length or data.buckets [500] must be multiples of 128",
    ),
    # rows that are split
    (["hardware=v5p8", "mesh.cp=3"], "mesh.cp=3: not possible for model=tiny_moe on 4 devices (dp × fsdp × cp × tp ="),
    (["hardware=v5p8", "mesh.cp=2", "mesh.tp=2", "data.sequence_length=4098"], "mesh.cp=2: rows of 4098 tokens"),
    (
        [
            "model=gemma4_31b",
            "model.path=random:0",
            "hardware=v5p8",
            "mesh.cp=2",
            "mesh.tp=2",
            "trainer.attention=splash",
            "data.sequence_length=4352",
        ],
        "data.sequence_length or data.buckets [4352] must be multiples of 128, lengths of 512",
    ),
    (["mesh.cp=2", "trainer.sample_prompts=1"], "trainer.sample_prompts=1 decodes answers, which needs whole rows"),
    (["optimizer.schedule=cos"], "did you mean optimizer.schedule=cosine?"),
    # optimizers: keys of another kind, schedules, averages
    (["optimizer=lion", "optimizer.eps=1e-6"], "optimizer.eps=1e-06: not with optimizer=lion; give null, or"),
    (
        ["optimizer.kind=muon"],
        "optimizer.beta=null, optimizer.ns_steps=null: optimizer=muon needs a value; optimizer=muon on the",
    ),
    (["optimizer.ns_steps=3"], "optimizer.ns_steps=3: not with optimizer=adamw"),
    (["optimizer=adafactor", "optimizer.b1=0.9"], "optimizer.b1=0.9: not with optimizer=adafactor; give null"),
    (["optimizer.b2=null"], "optimizer.b2=null: optimizer=adamw needs a value"),
    (["optimizer=adam"], "did you mean optimizer=adamw?"),
    (["optimizer=schedule_free", "optimizer.schedule=cosine"], "give optimizer.schedule=constant (after the warm-up)"),
    (["optimizer=schedule_free", "optimizer.b1=0"], "optimizer.b1=0: optimizer=schedule_free needs more than 0"),
    (["optimizer=schedule_free", "trainer.ema_decay=0.99"], "keeps its own average; give trainer.ema_decay=null"),
    (["optimizer.decay_fraction=0.1"], "give optimizer.schedule=wsd, or optimizer.decay_fraction=null"),
    (["optimizer.schedule=wsd", "optimizer.decay_fraction=0"], "must be more than 0 and at most 1"),
    (["optimizer.warmup_fraction=0.1"], "add optimizer.warmup_fraction=null or optimizer.warmup_updates=null"),
    # what ends a run early
    (["trainer.patience=2", "trainer.eval_every=0"], "makes none before the last update; give trainer.eval_every="),
    (["trainer.min_delta=0.1"], "trainer.min_delta=0.1: only with trainer.patience=<evaluations>"),
    (["trainer.time_limit=soon"], "must be a time of more than 0: 2h30m, 1d, 90s, or a number of minutes"),
    (["trainer.time_limit=30m2h"], "trainer.time_limit=30m2h: must be a time"),
    (["trainer.ema_decay=1"], "trainer.ema_decay=1.0: must be more than 0 and less than 1 (null: off)"),
    (["tracker.mode=disabled"], "choices: auto, online, offline"),
    (["checkpoint.resume=always"], "choices: auto, never"),
    # length of the run, size of an update
    (["trainer.max_updates=null"], "trainer.max_updates, trainer.epochs: set one of them; both are null"),
    (["trainer.global_batch_tokens=4096"], "add trainer.global_batch_sequences=null"),
    (["trainer.global_batch_sequences=null"], "set exactly one; both are null"),
    (
        ["trainer.global_batch_tokens=4000", "trainer.global_batch_sequences=null"],
        "trainer.global_batch_tokens=4000: not a multiple of data.sequence_length=512; 4096 is (8 rows)",
    ),
    (["trainer.microbatches=3"], "does not divide the 8 rows of an update"),
    (["hardware=v5p16", "mesh=fsdp", "trainer.global_batch_sequences=12"], "mesh.dp × mesh.fsdp = 8, which must"),
    # LoRA
    (["lora=none", "lora.quantize=nf4"], "lora.quantize=nf4: quantised weights can't be trained"),
    (["lora.targets=[]"], "lora.targets=[]: nothing would be trained"),
    (
        ["lora.targets=[attn]"],
        "lora.targets: 'attn' is no target; did you mean attention? (targets: attention, mlp, experts, q",
    ),
    (["lora.targets=[attention,q]"], "lora.targets: 'q' is part of 'attention'; give one of them"),
    (["lora.layers=[3-9]"], "lora.layers: '3-9': not layers of this model, which are 0-5"),
    (["lora.layers=[first]"], "lora.layers: 'first': give layers (24; -1 is the last) and ranges"),
    (["lora.ranks={o:0}"], "lora.ranks.o=0: must be at least 1"),
    (["lora.ranks={k:4}"], "these share A; give both the same rank"),
    (["lora.dora=true", "lora.dropout=0.1"], "lora.dropout=0.1: lora.dora=true scales the base's product too"),
    (
        ["model=tiny_moe", "lora.dora=true", "lora.targets=[mlp,experts]"],
        "lora.dora=true: not for lora.targets=[…,experts]",
    ),
    (["lora.init=pissa", "lora.start=."], "lora.init=pissa: sets what fresh adapters begin as, but lora.start=."),
    (["lora.init=loftq"], "lora.init=loftq: not a choice"),
    (["lora.init=olora", "lora.ranks={o: 999}"], "lora.init=olora: rank 999, but layers.0.self_attn.o_proj.weight has"),
    (
        ["model=tiny_moe", "lora.init=pissa", "lora.targets=[mlp,experts]"],
        "lora.init=pissa: not for lora.targets=[…,experts]",
    ),
    (
        ["model=tiny", "lora.targets=[mlp,experts]"],
        "lora.targets: experts, but tiny has none (gemma4_26b_a4b, tiny_moe have); leave",
    ),
    (["model=tiny_moe", "lora.expert_rank=2"], "experts get no adapters; give lora.targets=[attention,mlp,experts] or"),
    (["model=tiny_moe", "lora.targets=[experts]", "lora.expert_rank=0"], "lora.expert_rank=0: must be at least 1"),
    (
        ["model=tiny_moe", "lora.targets=[experts]", "lora.dropout=0.1"],
        "lora.dropout=0.1: adapters of experts have none, nor do PEFT's; give lora.dropout=0, or adapt",
    ),
    (["lora.targets=[mlp,mlp]"], "lora.targets: 'mlp' is given twice"),
    (
        ["lora=none", "lora.modules_to_train=[norms]"],
        "lora.enabled=false trains every weight already; give lora.enabled=",
    ),
    (
        ["lora.modules_to_train=[norm_]"],
        "lora.modules_to_train: tiny_moe has no 'norm_'; use norms, embeddings (projector only with",
    ),
    (
        ["lora.modules_to_train=[k_proj]"],
        "self_attn.k_proj and self_attn.v_proj are one array here; name self_attn.v_proj",
    ),
    (["lora.modules_to_train=[per_layer_projections]"], "tiny_moe has no 'per_layer_projections'"),
    (
        ["lora.targets=[mlp]", "lora.modules_to_train=[mlp.*]"],
        "adapts no module that lora.modules_to_train=[mlp.*] leaves; use some of attention",
    ),
    (["model.new_tokens=['<|x|>']"], "has the form of Gemma's control tokens, which rows must not contain; write <x>"),
    (["lora=none", "lora.start=."], "lora.enabled=false trains every weight; merge them and give model.path="),
    (
        ["lora.start=/no/such/run"],
        "lora.start=/no/such/run: no such folder (nor is there a folder /no/such); give a run",
    ),
    (["lora.start=.", "lora.start_checkpoint=last"], "lora.start_checkpoint=last: give best, latest or the number"),
    (
        ["model=gemma4_31b", "model.path=random:0", "lora=none"],
        "full fine-tuning of model=gemma4_31b takes 496 GB of HBM;",
    ),
    (["model=gemma4_31b", "model.path=random:0", "lora=none", "hardware=v5p8"], "496 GB of HBM, v5p8 has 411 GB; give"),
    (["model=gemma4_26b_a4b", "model.path=random:0", "lora=none"], "takes 416 GB of HBM; give lora=default, another"),
    (["model=gemma4_12b", "model.path=random:0", "lora=none", "hardware=v6e4"], "192 GB of HBM, v6e4 has 134 GB; give"),
    (["hardware.name=2xv5p-8"], "several slices joined by the data-centre network (multi-slice) are not supported"),
    (
        ["hardware.spot=true", "hardware.flex_start=true"],
        "hardware.spot=true, hardware.flex_start=true: give one of them",
    ),
    (["trainer.profile=[7,900]"], "trainer.profile=[7, 900]: give [first,last], two updates from 1 to 100, or null"),
    (["trainer.profile=[3]"], "trainer.profile=[3]: give [first,last]"),
    (["hardware.region=us-centrl1"], "hardware.region=us-centrl1: no price is known there; did you mean"),
    # model
    (["model=gemma4_31b"], "set model.path=<folder with the Hugging Face checkpoint> (local or gs://), or"),
    (["model.name=tiny_mo"], "model.name=tiny_mo: no such architecture; did you mean model=tiny_moe"),
    (["model.path=random:x"], "model.path=random:x: write random:SEED, such as random:0"),
    (["model.path=/no/such/folder"], "model.path=/no/such/folder: no such folder (nor is there a folder /no/such)"),
    (["model.path=embedded:tinny"], "model.path=embedded:tinny: no such embedded asset; there are: "),
    (["model.tokenizer=/no/such"], "model.tokenizer=/no/such: no such folder"),
    # data
    (["data=chat_jsonl"], "data.train.0.path is empty; give data.train.0.path=<rows.jsonl"),
    (["data.train=[]", "data.heldout=[]"], "data.train=[]: no training rows"),
    (["data.train.0.path=/no/rows.jsonl"], "data.train.0.path=/no/rows.jsonl: no such file or folder"),
    (["data.train.0.weight=0"], "data.train.0.weight=0.0: must be more than 0"),
    (["data.train.0.path='hf:'"], "write hf:NAME, hf:NAME:SPLIT or hf:NAME:SUBSET:SPLIT"),
    (["data.train.0.path=someone/rows"], "a Hugging Face data set is written hf:someone/rows"),
    (["data.buckets=[128]"], "data.buckets=[128]: only with data.packing=buckets (it is true)"),
    (["data.packing=buckets", "data.buckets=[128,1024]"], "lengths between 2 and data.sequence_length=512"),
    (["data.check_syntax=true"], "only with data.format=codev_r1"),
    # hardware and run
    (["hardware.name=v5p9"], "hardware.name=v5p9: no such slice; did you mean hardware=v5p8"),
    (
        ["hardware=h200", "model=gemma4_31b", "model.path=random:0", "trainer.attention=splash"],
        "a TPU kernel, but h200 has GPUs",
    ),
    (["name=a/b"], "name=a/b: part of a folder's name"),
    (["run_dir=s3://bucket/run"], "run_dir=s3://bucket/run: give a local run folder, or one on gs://"),
]


@pytest.mark.parametrize(("words", "told"), REFUSALS, ids=[" ".join(words) for words, _ in REFUSALS])
def test_what_cannot_work_is_refused(refused, words, told):
    message = refused(*words)
    assert told in message
    assert "problems in the configuration" not in message


def test_full_fine_tuning_is_refused_where_a_reference_would_need_a_second_copy(refused):
    told = "full fine-tuning would need a second copy"
    assert told in refused("objective=dpo", "lora=none") and told in refused("objective=ipo", "lora=none")
    assert told not in refused("objective=orpo", "lora=none")  # nothing but its rows is complained about


def test_spikes_are_of_supervised_tuning(refused):
    told = "trainer.spike_factor=3.0: losses of objective=ipo have no baseline"
    assert told in refused("objective=ipo", "trainer.spike_factor=3")


def test_every_limit_names_a_key():
    known = {key for entry in ENTRIES.values() for key in leaf_keys(entry.schema)}
    assert not {*CHOICES, *RANGES} - known


def test_gs_needs_gcsfs(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused("model.path=gs://bucket/model", "data.train.0.path=gs://bucket/rows.jsonl", "tracker=wandb")
    assert "model.path=gs://bucket/model: gs:// needs gcsfs; run pip install 'gemma4-tpu[gcp]'" in message
    assert "data.train.0.path=gs://bucket/rows.jsonl: gs:// needs gcsfs" in message
    assert "tracker.kind=wandb: the package wandb is not installed" in message


def test_a_file_is_no_run_folder(refused, tmp_path):
    file = tmp_path / "run"
    file.touch()
    assert f"run_dir={file}: is a file" in refused(f"run_dir={file}")


def test_a_near_miss_of_a_file_is_suggested(refused, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    told = refused(f"data.train.0.path={tmp_path}/row.jsonl")
    assert f"no such file or folder; did you mean {tmp_path}/rows.jsonl?" in told


# --- checkpoints


def test_the_checkpoint_decides_the_architecture(load, checkpoint):
    folder = checkpoint("tiny_moe", final_logit_softcapping=30.0)
    assert load(f"model.path={folder}").checked.architecture == ARCHITECTURES["tiny_moe"]


def test_a_checkpoint_of_another_model_is_refused_and_the_right_name_given(refused, checkpoint):
    message = refused("model=tiny", f"model.path={checkpoint('tiny_e2b')}")
    assert "not a checkpoint of tiny; give model=tiny_e2b (num_layers: model=tiny has 6, the checkpoint 10" in message


def test_rows_are_no_longer_than_the_sequences_that_the_checkpoint_names(load, refused, checkpoint):
    words = ("model=tiny_moe", f"model.path={checkpoint('tiny_moe', max_position_embeddings=256)}")
    assert "data.sequence_length=512: the model's longest sequence is 256 tokens" in refused(*words)
    assert load(*words, "data.sequence_length=256").checked.architecture == ARCHITECTURES["tiny_moe"]


def test_a_contradiction_is_named(refused, checkpoint):
    message = refused(f"model.path={checkpoint('tiny_moe', sliding_window=32)}")
    assert "it matches no architecture of this project (sliding_window: model=tiny_moe has 64," in message


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), "not all of config.json and model.safetensors or its index"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: contains a JSON list"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "model_type is 'llama'"),
        (lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "gemma4"})), "is missing"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "has no model.safetensors or model.safetensors.index.json; found",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "there is no tokenizer.json; set model.tokenizer="),
    ],
    ids=["no config", "half a config", "a list", "another model", "no sizes", "no weights", "no tokenizer"],
)
def test_an_incomplete_checkpoint_is_refused(refused, checkpoint, damage, told):
    folder = checkpoint("tiny_moe")
    damage(folder)
    message = refused(f"model.path={folder}")
    assert f"model.path={folder}: " in message
    assert told in message
    assert "problems" not in message


# --- mesh


def mesh(name: str, devices: int, **sizes: int | None) -> tuple[int, int, int]:
    """(dp, fsdp, tp)"""
    return resolve_mesh(MeshConfig(**sizes), ARCHITECTURES[name], devices)[:3]


def test_auto_takes_the_largest_legal_tp():
    assert mesh("gemma4_31b", 4) == (1, 1, 4)
    assert mesh("gemma4_31b", 8) == (1, 2, 4)  # four global key/value heads
    assert mesh("gemma4_31b", 32) == (1, 8, 4)
    assert mesh("gemma4_26b_a4b", 8) == (1, 4, 2)  # two global key/value heads
    assert mesh("gemma4_12b", 8) == (1, 1, 8)  # one global key/value head is held by all, and so are E2B's
    assert mesh("gemma4_e2b", 8) == (1, 1, 8)
    assert mesh("tiny", 1) == (1, 1, 1)


def test_parts_of_rows_worth_splitting_have_at_least_8192_tokens():
    assert row_splits(131_072, 32) == [1, 2, 4, 8, 16]
    assert (row_splits(16_384, 8), row_splits(16_383, 8), row_splits(1024, 8)) == ([1, 2], [1], [1])


def test_an_axis_that_is_not_given_takes_what_the_others_leave():
    assert mesh("gemma4_31b", 16, fsdp=8) == (1, 8, 2)
    assert mesh("gemma4_31b", 16, tp=1) == (1, 16, 1)
    assert mesh("gemma4_31b", 4, fsdp=2, tp=2) == (1, 2, 2)
    assert mesh("gemma4_31b", 16, dp=2) == (2, 2, 4)
    assert mesh("gemma4_31b", 16, dp=None) == (1, 4, 4)  # weights are split as long as nothing else is said
    assert mesh("gemma4_31b", 16, dp=None, fsdp=2) == (2, 2, 4)
    assert mesh("gemma4_e2b", 8, dp=None, fsdp=1, tp=1) == (8, 1, 1)


@pytest.mark.parametrize(
    ("name", "devices", "sizes"),
    [
        ("gemma4_31b", 8, {"tp": 8}), ("gemma4_26b_a4b", 4, {"tp": 4}), ("gemma4_31b", 4, {"fsdp": 2, "tp": 4}),
        ("gemma4_31b", 4, {"fsdp": 3}), ("gemma4_31b", 4, {"fsdp": 1, "tp": 1}),
        ("gemma4_31b", 4, {"dp": 3}), ("gemma4_31b", 8, {"dp": 2, "tp": 8}),
    ],
)  # fmt: skip
def test_an_impossible_mesh_lists_the_legal_ones(name, devices, sizes):
    with pytest.raises(UserError) as caught:
        mesh(name, devices, **sizes)
    message = str(caught.value)
    assert all(f"mesh.{axis}={size}" in message.split(":")[0] for axis, size in sizes.items())
    legal = message.split("legal meshes: ")[1].split("; ")
    dp = sizes.get("dp", 1) if devices % sizes.get("dp", 1) == 0 else 1
    assert legal[0].endswith(f"mesh.fsdp={devices // dp} mesh.tp=1")
    for entry in legal:  # what is listed works
        listed = {axis: int(size) for axis, size in (part[len("mesh.") :].split("=") for part in entry.split())}
        assert mesh(name, devices, **listed) == (dp, listed["fsdp"], listed["tp"])


def test_the_mesh_of_a_known_slice_is_checked_without_jax(load, refused):
    assert load("hardware=v5p8", "model=gemma4_31b", "model.path=random:0").checked.mesh == MeshSizes(1, 1, 4)
    assert load("hardware=v5p8", "mesh.fsdp=2", "mesh.tp=2").checked.mesh == MeshSizes(1, 2, 2)
    assert "legal meshes" in refused("hardware=v5p16", "model=gemma4_31b", "model.path=random:0", "mesh=tp")


def test_rows_divide_among_their_places():
    data = DataConfig(sequence_length=512)
    assert rows_per_update(TrainerConfig(global_batch_tokens=4096), data) == 8
    assert rows_per_microbatch(TrainerConfig(global_batch_sequences=8, microbatches=2), data, places=4) == 4
    trainer = TrainerConfig(global_batch_sequences=12, microbatches=2)
    with pytest.raises(
        UserError, match=r"6 rows per microbatch for mesh\.dp × mesh\.fsdp = 4.*\(a multiple of 8\)"
    ) as caught:
        rows_per_microbatch(trainer, data, places=4)
    advised = int(str(caught.value).split("give trainer.global_batch_sequences=")[1].split()[0])
    assert rows_per_microbatch(TrainerConfig(global_batch_sequences=advised, microbatches=2), data, places=4) > 0


# --- devices


def test_the_slice_that_was_asked_for_is_there():
    check_devices(HardwareConfig(name="v5p-8"), "tpu", "TPU v5p", 4)
    check_devices(HardwareConfig(name="v5p-8"), "tpu", "TPU v5", 4)  # how libtpu names v5p
    check_devices(HardwareConfig(name="v5e-8"), "tpu", "TPU v5 lite", 8)
    check_devices(HardwareConfig(name="v6e-4"), "tpu", "TPU v6 lite", 4)
    check_devices(HardwareConfig(name="h100x2"), "gpu", "NVIDIA H100 80GB HBM3", 2)
    check_devices(HardwareConfig(name="tpu7x-8"), "tpu", "TPU7x", 8)  # four chips of two devices each
    check_devices(HardwareConfig(name="local"), "cpu", "cpu", 1)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (("cpu", "cpu", 1), "hardware=v5p8 is 4 × v5p, but JAX found 1 × cpu; give hardware=local (whatever is there)"),
        (("tpu", "TPU v5p", 8), "JAX found 8 × TPU v5p (tpu); give hardware=v5p16 or hardware=local"),
        (("tpu", "TPU v6 lite", 4), "give hardware=v6e4 or hardware=local"),
        (("gpu", "NVIDIA H200", 1), "give hardware=h200 or hardware=local"),
    ],
)
def test_another_machine_is_refused_with_what_was_found(found, told):
    with pytest.raises(UserError) as caught:
        check_devices(HardwareConfig(name="v5p-8"), *found)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["v5p-8", "local"])
def test_several_slices_are_refused(name):
    with pytest.raises(UserError, match=r"JAX found 2 TPU slices .*multi-slice training is not supported"):
        check_devices(HardwareConfig(name=name), "tpu", "TPU v5p", 8, slices=2)


# --- reported, not refused


def test_a_long_warm_up_is_reported():
    assert warmup_warning(OptimizerConfig(warmup_updates=10), updates=100) is None
    assert "warmup_updates=11 is more than a tenth" in warmup_warning(OptimizerConfig(warmup_updates=11), updates=100)
    assert "never reached" in warmup_warning(OptimizerConfig(warmup_updates=100), updates=100)


def test_a_learning_rate_of_the_tiny_models_is_reported_for_a_released_size(load):
    words = ["model=gemma4_e2b", "model.path=random:0", "optimizer.learning_rate=3e-3"]
    assert any("usually takes 1e-4 to 5e-4" in line for line in load(*words).checked.warnings)
    assert not load(*words[:2], "optimizer.learning_rate=2e-4").checked.warnings


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lora=none", "lora.rank=64", "lora.dropout=0.1"], "no effect of lora.rank=64, lora.dropout=0.1"),
        (["lora.start_checkpoint=best"], "lora.start_checkpoint=best has no effect"),
        (["optimizer.schedule=constant", "optimizer.end_fraction=0.1"], "no effect of optimizer.end_fraction=0.1: "),
        (["rollouts.samples=16"], "no effect of rollouts.samples=16: objective=sft draws no answers (grpo,"),
    ],
)
def test_values_that_nothing_uses_are_reported(load, words, told):
    assert told in "\n".join(load(*words).checked.warnings)
    assert "no effect" not in "\n".join(load(words[0]).checked.warnings if len(words) > 1 else [])


def test_warnings_are_handed_back(load):
    assert load().checked.warnings == ()
    loaded = load("optimizer.warmup_updates=50", "data.heldout=[]", "hardware=v5e8", "hardware.region=us-east4")
    for told in ("tenth", "held-out", "price"):
        assert any(told in line for line in loaded.checked.warnings)
    assert loaded.root.optimizer.warmup_updates == 50  # not changed


def test_checks_work_on_dataclasses_alone():
    root = TrainRoot(
        model=ModelConfig(name="tiny_e2b", path="random:1"),
        data=DataConfig(train=[DataSource(path="hf:someone/something")]),
        trainer=TrainerConfig(max_updates=3, global_batch_sequences=4),
    )
    checked, problems = examine_train(root)
    assert problems == [] and checked.architecture.name == "tiny_e2b"
    root.trainer.microbatches, root.lora.rank = 3, 0
    checked, problems = examine_train(root)
    assert checked is None and len(problems) == 2
