"""Types of a training's configuration: one dataclass per config group, values live in `conf/`.

This module is ground: it imports neither JAX nor Hydra, so that every process can read a configuration at once.
A string that follows a field documents it; `null` in YAML is `None` here. Cross-field rules live in
the checks of each room (`training/checks.py`); what other commands take in `tasks.py` and `serving.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemma4_tpu.config.rollouts import RolloutsConfig


@dataclass(kw_only=True)
class HardwareConfig:
    """The slice that the run is for (`hardware=`). Facts about chips live in `gemma4_tpu/hardware.py`."""

    name: str = "local"
    """Key of `hardware.SLICES`, such as `v5p-8`; `local` takes whatever JAX finds."""
    usd_per_hour: float | None = None
    """Price of the whole slice in USD per hour; null: the dated one of `prices.yaml`, for `region` and kind of
    capacity."""
    region: str | None = None
    """Google Cloud region whose prices count, such as `europe-west4`; null: the first that has one (us-central1)."""
    spot: bool = False
    """Spot capacity: cheaper, can be preempted; launchers ask for it, costs are counted at its price."""
    flex_start: bool = False
    """Flex-start capacity (Dynamic Workload Scheduler), which waits for room and stays for 7 days at most; for costs
    only."""
    flags: str = "tuned"
    """Compiler flags: `tuned`, the chip's preset (`compiler_flags.py`; GPUs and CPUs have none), or `none`. Planning
    and training compile with the same."""
    compiler_options: dict[str, Any] = field(default_factory=dict)
    """Options for XLA by name, such as `{xla_tpu_enable_latency_hiding_scheduler: true}`, over those of `flags`."""


@dataclass(kw_only=True)
class DistributedConfig:
    """Several processes of one run, one on each host (`distributed=`); every one of them is given the same command."""

    coordinator_address: str | None = None
    """`host:port` of process 0; `auto`: JAX finds it (TPU slices, SLURM, Open MPI); null: `auto` where `hardware` has
    several hosts or TPU_WORKER_HOSTNAMES names several, else one process."""
    num_processes: int | None = None
    """Processes of the run, with an explicit address."""
    process_id: int | None = None
    """Which of them this is, from 0; with an explicit address."""


@dataclass(kw_only=True)
class MeshConfig:
    """Device mesh with the axes `dp` (rows only: every weight is there as often), `fsdp` (rows and weight shards) and
    `tp` (heads and hidden units) (`mesh=`).
    """

    dp: int | None = 1
    """Devices on the `dp` axis; null: what the others leave."""
    fsdp: int | None = None
    """Devices on the `fsdp` axis; null: what the others leave."""
    tp: int | None = None
    """Devices on the `tp` axis; null: what the others leave. Several null: the largest legal tp, the rest fsdp."""


@dataclass(kw_only=True)
class ModelConfig:
    """The base model (`model=`)."""

    name: str = "tiny"
    """Key of `gemma4_tpu/architectures.py`."""
    path: str | None = None
    """Folder with a Hugging Face checkpoint (local or gs://), `embedded:NAME` for one that travels with the package,
    or `random:SEED` for random weights of this architecture."""
    tokenizer: str | None = None
    """Folder with the tokenizer; null: the checkpoint folder (the embedded tiny one for random weights)."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens of your own, such as `['<result>','<note>']`: each takes a row that the tokenizer holds in reserve
    (`<unused0>`, …), or keeps the one that it has. Their rows of the embedding are trained beside the adapters."""


@dataclass(kw_only=True)
class LoraConfig:
    """What is trained (`lora=`)."""

    enabled: bool = True
    """False trains every weight (full fine-tuning, which takes 16 bytes of HBM per parameter)."""
    rank: int = 16
    """Inner dimension r of the adapters."""
    alpha: float = 16.0
    """The delta is scaled by alpha/r (alpha/√r with `rslora`)."""
    dropout: float = 0.0
    """Dropout rate on the adapter's input, in training only."""
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    """What gets adapters: `attention` (q, k, v, o), `mlp` (gate, up, down), some of these modules by themselves,
    `experts` (of a mixture: gate, up and down of each one; the router has none)."""
    expert_rank: int | None = None
    """Inner dimension of each expert's adapter, which is scaled by alpha over this rank; null: `rank` over the experts
    that a token passes through, at least 1."""
    layers: list[str] | None = None
    """Only these layers, counted from 0, such as `[0-11,24,-6-]`: ranges with both their ends, a layer, the last six;
    null: all."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks that are not `rank`, by module: `{o: 32, layers.5.*: 8}`. Patterns are compared with names such as
    `layers.5.self_attn.o_proj` or the end of them; the first that fits counts. `alpha` is the same for all."""
    modules_to_train: list[str] = field(default_factory=list)
    """Weights to train in full beside the adapters (PEFT's `modules_to_save`): `norms`, `per_layer_projections` (E2B,
    E4B), `embeddings` (the output matrix too), or names and patterns of modules on disk, each in every layer that has
    it, such as `q_norm` or `mlp.*`. They get no adapter, stay unquantised, and take 16 bytes of HBM per parameter."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha/√r."""
    dora: bool = False
    """Also train the lengths of the adapted weights' rows (DoRA)."""
    init: str = "default"
    """What fresh adapters begin as: `default` (A random, B zero), or a part of their weight that is taken out of it:
    `pissa` (its largest singular values), `olora` (of its QR decomposition). Exports are for the whole base."""
    start: str | None = None
    """Begin from trained adapters instead of fresh ones: a run folder, or that of a PEFT adapter, local or gs://. A run
    that goes on from a checkpoint does not read them again."""
    start_checkpoint: str = "latest"
    """Which checkpoint of such a run: `latest`, `best` (lowest held-out loss) or the number of an update."""
    quantize: str | None = None
    """QLoRA: hold the frozen base weights of the adapted modules as `nf4` or `int8`; null: unquantised."""


@dataclass(kw_only=True)
class DataSource:
    """One place that rows come from. A bare path stands for a source with that `path`."""

    path: str = ""
    """JSON Lines, JSON, CSV, Parquet or Arrow (each also .gz, .zst), a folder of them, `hf:NAME[:SUBSET][:SPLIT]` for a
    Hugging Face data set, `embedded:FILE`; local or gs://."""
    weight: float = 1.0
    """How often an epoch visits the rows of this source; 0.5 takes half of them, 2 takes each twice."""
    split: str | None = None
    """The split of a folder or data set to read; null: training rows for `train`, validation (else test) rows for
    `heldout`."""
    subset: str | None = None
    """The subset of a Hugging Face data set, or the folder within a folder; null: the only one, or all."""


@dataclass(kw_only=True)
class DataConfig:
    """Rows, their rendering and their packing (`data=`)."""

    format: str = "auto"
    """The form of rows: `auto` recognises it by their keys; `chat` (`messages`), `sharegpt` (`conversations`), `alpaca`
    (`instruction`, `input`, `output`), `prompt_completion`, `text` (continued pre-training), `codev_r1` (the Verilog in
    `response`); of pairs `preference` (`chosen`, `rejected`, `prompt`)."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the rows call the columns of these forms, where they have names of their own: `{prompt: task, completion:
    reply}`; `role` and `content` are the names within turns."""
    train: list[DataSource] = field(default_factory=list)
    """Training sources."""
    heldout: list[DataSource] = field(default_factory=list)
    """Held-out sources; empty: the validation (or test) splits of the training sources, or else `heldout_fraction`."""
    heldout_fraction: float = 0.0
    """Share of the training rows set aside by a hash of their first prompt, where nothing else is held out; at least
    one row; 0: none."""
    max_rows: int | None = None
    """Take only the first N training rows, from each source a share by its weight; null: all."""
    sequence_length: int = 512
    """Static length T of a packed (or padded) row, in tokens. Longer examples are dropped, never cut."""
    packing: str = "true"
    """`true`: best-fit packing with segment ids; `false`: pad each example to T; `buckets`: pad to a few lengths."""
    buckets: list[int] | None = None
    """Static lengths for `packing=buckets`; null: chosen from the length histogram (T is always the last)."""
    thoughts: str = "drop"
    """Thought channels in assistant turns: `drop` them; `train` keeps them in the input and trains on them.
    Generation prompts follow the same policy."""
    train_on: str = "all"
    """`all` assistant turns of a conversation carry loss, or only the `last` one."""
    max_drop_fraction: float = 0.05
    """More dropped rows than this share is an error."""
    check_syntax: bool = False
    """`codev_r1` only: also drop targets that `iverilog -t null` rejects (needs iverilog)."""
    shuffle: bool = True
    """Visit the rows of each epoch in an order drawn from `trainer.seed`."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimised, and with it which rows are taken (`objective=`). Keys that a kind does not have are null."""

    kind: str = "sft"
    """`sft`: conversations, whose answers are learnt; `dpo`, `ipo`, `orpo`: pairs of a chosen and a rejected answer;
    `grpo`: the policy's own answers to the rows' prompts (or to problems), each by how much better than others to its
    prompt it was rewarded; `expert_iteration`: those of them that were rewarded are learnt. See `rollouts=` for these.
    `objective=<kind>` sets it and all of its keys."""
    beta: float | None = None
    """`dpo`, `ipo`: how much a nat of log-likelihood gained over the reference counts; the smaller, the further a run
    may go from where it began. `orpo`: weight of the preference beside the cross-entropy (its paper's λ)."""
    label_smoothing: float | None = None
    """`dpo`: share of the pairs that are taken to be the wrong way round."""
    clip_low: float | None = None
    """`grpo`: a token of a worse answer is pushed down until its probability has fallen by this share."""
    clip_high: float | None = None
    """`grpo`: a token of a better answer is pushed up until its probability has risen by this share."""
    max_drift: float | None = None
    """`grpo`: worse answers that the policy has moved away from by more than so many nats per token, since they were
    drawn, are left alone."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer, one of Optax's, and its learning-rate schedule (`optimizer=`).

    Keys that a kind does not have are null there.
    """

    kind: str = "adamw"
    """`adamw`, `adafactor`, `lion`, `muon` or `schedule_free`; `optimizer=<kind>` sets it and all of its keys."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    b1: float | None = 0.9
    """Decay of the first moment; of `schedule_free` the weight of the average in the values that gradients are taken
    at. `muon` has it for Adam, which takes what is no matrix."""
    b2: float | None = 0.999
    """Decay of the second moment; of `lion` that of its one moment, while `b1` is for the step. `muon`: as `b1`."""
    eps: float | None = 1e-8
    """Added to the root of the second moment; of `adafactor` to squared gradients."""
    decay_rate: float | None = None
    """`adafactor`: the second moment of update u decays by 1 - u^-decay_rate."""
    clipping_threshold: float | None = None
    """`adafactor`: an array's step is scaled down to this root mean square; null: never."""
    multiply_by_parameter_scale: bool | None = None
    """`adafactor`: steps are relative to the root mean square of an array's values."""
    beta: float | None = None
    """`muon`: decay of the momentum that is orthogonalised."""
    ns_steps: int | None = None
    """`muon`: Newton-Schulz iterations."""
    consistent_rms: float | None = None
    """`muon`: root mean square of a step of learning rate 1, whatever the shape of the matrix; at 0.2 learning rates
    of AdamW suit. null: a matrix's step grows with √(outputs / inputs) where that is more than 1."""
    weight_decay: float = 0.0
    """Decoupled weight decay, times the learning rate."""
    schedule: str = "cosine"
    """After the warm-up: `cosine`, `linear`, `constant`, or `wsd`: constant, and linear at the end
    (`decay_fraction`)."""
    warmup_updates: int | None = 0
    """Updates of linear warm-up from 0. More than a tenth of the run is reported, never changed."""
    warmup_fraction: float | None = None
    """The warm-up as a share of the run's updates, rounded. Instead of `warmup_updates`: one of the two given on the
    command line sets the other one aside."""
    decay_fraction: float | None = None
    """`schedule=wsd`: share of the run's updates over which the learning rate decays; null: 0.1."""
    end_fraction: float = 0.0
    """Learning rate at the last update, as a fraction of the peak."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm; null: off."""


@dataclass(kw_only=True)
class TrainerConfig:
    """The loop (`trainer=`)."""

    max_updates: int | None = None
    """Stop after this many updates; with `epochs` too, whichever comes first. One of the two given on the command line
    sets the other one aside."""
    epochs: float | None = None
    """Stop after this many passes over the training rows."""
    global_batch_tokens: int | None = None
    """Token slots per update over all devices; a multiple of `data.sequence_length`."""
    global_batch_sequences: int | None = None
    """Rows of T tokens per update over all devices. Exactly one of the two batch sizes is set."""
    microbatches: int = 1
    """Split each update into this many sequential microbatches (gradient accumulation)."""
    seed: int = 0
    """Seed of LoRA's initial weights, dropout and the order of rows."""
    eval_every: int = 0
    """Updates between held-out evaluations (one also runs before the first and after the last update);
    0: only those two."""
    sample_prompts: int = 0
    """Held-out prompts to answer at each held-out evaluation, the likeliest token each time; the answers go to
    `heldout_samples.jsonl` and the tracker. 0: none."""
    sample_tokens: int = 256
    """Such an answer is cut off here, in tokens."""
    log_every: int = 1
    """Updates between logged metrics."""
    remat: str = "auto"
    """What the backward pass computes again: `none`, `products` (elementwise work; matrix products are kept),
    `attention` (the MLP; attention's products are kept), `decoder` (everything; each layer's input is kept), `auto`:
    the first of these that fits into memory by the compiler's figures (`none` on CPUs)."""
    attention: str = "auto"
    """Attention implementation: `auto`, `splash` (TPU kernel) or `einsum`."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time while the loss is computed."""
    compute_dtype: str = "auto"
    """dtype of activations and of the frozen base weights: `bfloat16`, `float32` or `auto` (bfloat16, but float32 on
    CPUs, which only emulate the other). LoRA and optimizer are float32 in any case."""
    spike_factor: float | None = None
    """Skip an update whose loss is more than this times the median of the 64 before (at least 16); null: never."""
    profile: list[int] | None = None
    """Updates to record for XProf and TensorBoard, [first,last] counted from 1, such as `[10,14]`; the trace goes to
    `profile` in the run folder. null: none."""
    plan: str | None = None
    """Folder of the plan (or its plan.json) whose step time the measured one is compared with, in `result.json`; null:
    the run folder's own, else the newest under `outputs/plan` for this configuration."""
    ema_decay: float | None = None
    """Decay per update of an average of the trained values, without their initial ones. Held-out losses, samples and
    exports are then of the average; checkpoints hold both. null: there is none."""
    patience: int | None = None
    """End the run after so many held-out evaluations in a row that did not lower the loss (exit code 0); null:
    never."""
    min_delta: float = 0.0
    """By how much a held-out loss must be below the lowest to count for `patience`, in nats per target token."""
    time_limit: str | None = None
    """Save and end at the first update boundary this long after the start, loading and compilation included (exit
    code 0; the same command goes on): `2h30m`, `1d`, `90s`, or a number of minutes. null: none."""
    stall_seconds: float | None = 1800
    """No progress for this long (compilation apart) dumps all stacks and ends the run with code 3; null: never."""
    compile_cache: str | None = "auto"
    """Local folder for compiled programs; `auto`: JAX_COMPILATION_CACHE_DIR, else `gemma4_tpu/xla` in the user's cache
    folder; null: none."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming (`checkpoint=`)."""

    every: int = 100
    """Updates between checkpoints; the last update is always saved."""
    keep: int = 3
    """How many of the latest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out loss."""
    resume: str = "auto"
    """`auto`: continue from the newest checkpoint in the run folder that verifies; `never`: refuse a used folder."""
    resume_allow: list[str] = field(default_factory=list)
    """Differences from the recorded run to accept on a resume, by the names that the refusal shows: keys or groups of
    the configuration, fingerprints of data, tokenizer and base, `learning_rate` for a jump upward."""


@dataclass(kw_only=True)
class TrackerConfig:
    """Where metrics go besides `metrics.jsonl`, which is always written (`tracker=`)."""

    kind: str = "none"
    """`none`, `wandb`, `tensorboard`, or `jsonl`: one file of JSON lines with all that a tracker is told."""
    project: str = "gemma4-tpu"
    """W&B project."""
    entity: str | None = None
    """W&B entity; null: the account's default."""
    group: str | None = None
    """W&B group."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    mode: str = "auto"
    """W&B mode: `auto` (online when a key is there, else offline), `online`, `offline`."""


@dataclass(kw_only=True)
class TrainRoot:
    """Everything `python -m gemma4_tpu.train` takes. Functions receive the group they need, never the root."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    name: str = "train"
    """Name of the run; part of the folder's name and of the tracker's."""
    run_dir: str | None = None
    """Run folder (local or gs://); null: `outputs/<name>/<date>_<time>`. Giving the same folder again resumes the
    run."""
    preview: bool = False
    """Show rendered rows, the length histogram, fill and drops, then stop."""
    replay: str | None = None
    """Run folder (local or gs://) to repeat: its recorded configuration is the one that the other words change, and its
    losses are compared with. null: none."""
    replay_allow: list[str] = field(default_factory=list)
    """What may be otherwise than when that run was recorded: `code`, `packages`, `data`, `tokenizer`, `base`,
    `hardware`."""
