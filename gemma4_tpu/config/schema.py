"""Types of a training run's configuration: one dataclass per config group; values are in `conf/`.

This module is part of the base layer: it imports neither JAX nor Hydra, so every process can read a configuration
quickly. The string after a field documents it; `null` in YAML is `None` here. Rules across fields are in the checks of
each package (`training/checks.py`). Next to this module: what a run runs on (`machines.py`), what it writes
(`outputs.py`), what it samples (`rollouts.py`), and the other commands (`tasks.py`, `serving.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma4_tpu.config.machines import DistributedConfig, HardwareConfig, MeshConfig
from gemma4_tpu.config.outputs import CheckpointConfig, StorageConfig, TrackerConfig
from gemma4_tpu.config.rollouts import RolloutsConfig


@dataclass(kw_only=True)
class ModelConfig:
    """The base model (`model=`)."""

    name: str = "tiny"
    """Key of `gemma4_tpu/architectures.py`."""
    path: str | None = None
    """Folder of a Hugging Face checkpoint (local or gs://), `embedded:NAME` for one that ships with the package, or
    `random:SEED` for random weights of this architecture."""
    tokenizer: str | None = None
    """Folder of the tokenizer; null: the checkpoint folder (for random weights, the embedded tiny tokenizer)."""
    new_tokens: list[str] = field(default_factory=list)
    """Your own tokens, such as `['<result>','<note>']`: each takes one of the tokenizer's reserved rows (`<unused0>`,
    …), or keeps the row it already has. Their embedding rows are trained along with the adapters."""


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
    """Dropout rate on the adapter's input, during training only."""
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    """What gets adapters: `attention` (q, k, v, o), `mlp` (gate, up, down), any of these modules individually,
    `experts` (of a mixture: gate, up and down of each expert; the router has none)."""
    expert_rank: int | None = None
    """Inner dimension of each expert's adapter, which is scaled by alpha over this rank; null: `rank` divided by the
    number of experts that a token passes through, at least 1."""
    layers: list[str] | None = None
    """Only these layers, counted from 0, such as `[0-11,24,-6-]`: an inclusive range, a single layer, the last six;
    null: all."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from `rank`, by module: `{o: 32, layers.5.*: 8}`. Patterns are matched against names such as
    `layers.5.self_attn.o_proj` or their ends; the first match counts. `alpha` is the same for all."""
    modules_to_train: list[str] = field(default_factory=list)
    """Weights to train in full alongside the adapters (PEFT's `modules_to_save`): `norms`, `per_layer_projections`
    (E2B, E4B), `embeddings` (the output matrix too), `projector` (of pictures), or names and patterns of modules on
    disk, each in every layer that has it, such as `q_norm` or `mlp.*`. They get no adapter, stay unquantised, and take
    16 bytes of HBM per parameter."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha/√r."""
    dora: bool = False
    """Also train the magnitudes of the adapted weights' rows (DoRA)."""
    init: str = "default"
    """How fresh adapters are initialised: `default` (A random, B zero), or from a part of their weight that is removed
    from it: `pissa` (its largest singular values), `olora` (of its QR decomposition). Exports are for the original
    base."""
    start: str | None = None
    """Start from trained adapters instead of fresh ones: a run folder or a PEFT adapter's folder, local or gs://. A run
    that resumes from a checkpoint does not read them again."""
    start_checkpoint: str = "latest"
    """Which checkpoint of that run: `latest`, `best` (lowest held-out loss) or an update number."""
    quantize: str | None = None
    """QLoRA: store the frozen base weights of the adapted modules as `nf4` or `int8`; null: unquantised.
    `int8_compute`: like `int8`, with int8 × int8 products in the forward pass and activations quantised per token
    (except for experts)."""


@dataclass(kw_only=True)
class DataSource:
    """One source of rows. A bare path stands for a source with that `path`."""

    path: str = ""
    """JSON Lines, JSON, CSV, Parquet or Arrow (each optionally .gz or .zst), a folder of them,
    `hf:NAME[:SUBSET][:SPLIT]` for a Hugging Face data set, `embedded:FILE`; local or gs://."""
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
    """Format of the rows: `auto` recognises it by their keys; `chat` (`messages`), `sharegpt` (`conversations`),
    `alpaca` (`instruction`, `input`, `output`), `prompt_completion`, `text` (continued pre-training), `codev_r1` (the
    Verilog in `response`); for pairs `preference` (`chosen`, `rejected`, `prompt`)."""
    columns: dict[str, str] = field(default_factory=dict)
    """The rows' own names for the columns of these formats, if they differ: `{prompt: task, completion: reply}`; `role`
    and `content` are the names within turns."""
    train: list[DataSource] = field(default_factory=list)
    """Training sources."""
    heldout: list[DataSource] = field(default_factory=list)
    """Held-out sources; empty: the validation (or test) splits of the training sources, or else `heldout_fraction`."""
    heldout_fraction: float = 0.0
    """Share of the training rows to hold out, chosen by a hash of their first prompt, if nothing else is held out; at
    least one row; 0: none."""
    max_rows: int | None = None
    """Use only the first N training rows, a share from each source by its weight; null: all."""
    sequence_length: int = 512
    """Static length T of a packed (or padded) row, in tokens. Longer examples are dropped, never cut."""
    packing: str = "true"
    """`true`: best-fit packing with segment ids; `false`: pad each example to T; `buckets`: pad to a few lengths."""
    buckets: list[int] | None = None
    """Static lengths for `packing=buckets`; null: chosen from the length histogram (T is always the last)."""
    thoughts: str = "drop"
    """Thought channels in assistant turns: `drop` removes them; `train` keeps them in the input and trains on them.
    Generation prompts follow the same policy."""
    train_on: str = "all"
    """Which assistant turns of a conversation carry loss: `all`, or only the `last` one."""
    image_cache: str | None = None
    """Also train on pictures (E2B, E4B): a folder, local or gs://, for their features, which the frozen vision tower
    computes before training, once for each picture and tower. null: text only; rows with pictures are dropped."""
    max_drop_fraction: float = 0.05
    """Dropping more than this share of the rows is an error."""
    check_syntax: bool = False
    """`codev_r1` only: also drop targets that `iverilog -t null` rejects (needs iverilog)."""
    shuffle: bool = True
    """Shuffle the rows of each epoch, in an order drawn from `trainer.seed`."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimised, and thus which rows are used (`objective=`). Keys that a kind does not use are null."""

    kind: str = "sft"
    """`sft`: trains on the answers of conversations; `dpo`, `ipo`, `orpo`: on pairs of a chosen and a rejected answer;
    `grpo`: on the policy's own answers to the rows' prompts (or to problems), each weighted by its reward compared with
    other answers to the same prompt; `expert_iteration`: on its own rewarded answers; `distill`: moves its distribution
    towards a teacher's on its own answers, `distill_offline`: on the rows' answers. For `grpo`, `expert_iteration` and
    `distill` see `rollouts=`. `objective=<kind>` sets this and all keys of the kind."""
    beta: float | None = None
    """`dpo`, `ipo`: weight of a nat of log-likelihood gained over the reference; the smaller it is, the further a run
    can move from its start. `orpo`: weight of the preference term relative to the cross-entropy (its paper's λ)."""
    label_smoothing: float | None = None
    """`dpo`: share of the pairs assumed to be the wrong way round."""
    clip_low: float | None = None
    """`grpo`: a token of a below-average answer is pushed down until its probability has fallen by this share."""
    clip_high: float | None = None
    """`grpo`: a token of an above-average answer is pushed up until its probability has risen by this share."""
    max_drift: float | None = None
    """`grpo`: below-average answers are left out once the policy, since they were drawn, has moved away from them by
    more than this many nats per token."""
    teacher: str | None = None
    """`distill`, `distill_offline`: the teacher: a run folder or a Hugging Face checkpoint (local or gs://,
    `embedded:NAME`, `random:SEED`) with the same vocabulary. It is kept on the devices alongside the model.
    `distill_offline` also takes the address of an OpenAI-compatible server (`http://host:8000/v1`) that returns
    log-probabilities of its prompt (vLLM, `gemma4_tpu.serve`); it is queried for all rows before the run begins."""
    teacher_model: str | None = None
    """The teacher's architecture, as `model.name`: for `random:SEED`, and for plans if the teacher is not available;
    null: from its `config.json`. For a server: the model's name there; null: its only model."""
    teacher_checkpoint: str | None = None
    """Which checkpoint of a teacher run: `latest`, `best` (lowest held-out loss) or an update number."""
    teacher_top: int | None = None
    """For a server: number of most likely tokens to request at each target; all others are compared as one. Servers
    have their own limit, usually 20."""
    teacher_store: str | None = None
    """Folder that stores a server's responses for all runs, so that no row is requested twice. They are found by
    address and model name: if another model is served under both, give another folder."""
    divergence: str | None = None
    """Mean over tokens of `reverse` KL(model ‖ teacher), which makes the model do only what its teacher does, or of
    `forward` KL(teacher ‖ model), which makes it do everything that its teacher does."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer, from Optax, and its learning-rate schedule (`optimizer=`).

    Keys that a kind does not have are null there.
    """

    kind: str = "adamw"
    """`adamw`, `adafactor`, `lion`, `muon` or `schedule_free`; `optimizer=<kind>` sets this and all keys of the
    kind."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    b1: float | None = 0.9
    """Decay of the first moment; for `schedule_free`, the weight of the average in the values at which gradients are
    taken. `muon` uses it for Adam (with Nesterov's momentum), which handles everything that is not a
    matrix."""
    b2: float | None = 0.999
    """Decay of the second moment; for `lion`, that of its only moment, while `b1` is for the step. `muon`: as `b1`."""
    eps: float | None = 1e-8
    """Added to the root of the second moment; for `adafactor`, to squared gradients."""
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
    """`muon`: root mean square of a step at learning rate 1, whatever the shape of the matrix; at 0.2, AdamW's learning
    rates are suitable. null: a matrix's step grows with √(outputs / inputs) where that is more than 1."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""
    schedule: str = "cosine"
    """After the warm-up: `cosine`, `linear`, `constant`, or `wsd`: constant, then linear at the end
    (`decay_fraction`)."""
    warmup_updates: int | None = 0
    """Updates of linear warm-up from 0. A warm-up of more than a tenth of the run is reported, never changed."""
    warmup_fraction: float | None = None
    """The warm-up as a share of the run's updates, rounded. Replaces `warmup_updates`: giving one of the two on the
    command line unsets the other."""
    decay_fraction: float | None = None
    """`schedule=wsd`: share of the run's updates over which the learning rate decays; null: 0.1."""
    end_fraction: float = 0.0
    """Learning rate at the last update, as a fraction of the peak."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm; null: off."""


@dataclass(kw_only=True)
class TrainerConfig:
    """The training loop (`trainer=`)."""

    max_updates: int | None = None
    """Stop after this many updates; if `epochs` is set too, at whichever comes first. Giving one of the two on the
    command line unsets the other."""
    epochs: float | None = None
    """Stop after this many passes over the training rows."""
    global_batch_tokens: int | None = None
    """Token slots per update across all devices; a multiple of `data.sequence_length`."""
    global_batch_sequences: int | None = None
    """Rows of T tokens per update across all devices. Exactly one of the two batch sizes is set."""
    microbatches: int = 1
    """Split each update into this many sequential microbatches (gradient accumulation)."""
    seed: int = 0
    """Seed for LoRA's initial weights, dropout and the order of rows."""
    eval_every: int = 0
    """Updates between held-out evaluations (one also runs before the first and after the last update);
    0: only those two."""
    sample_prompts: int = 0
    """Held-out prompts to answer greedily at each held-out evaluation; the answers go to `heldout_samples.jsonl` and
    the tracker. 0: none."""
    sample_tokens: int = 256
    """Cut these answers off at this many tokens."""
    log_every: int = 1
    """Updates between logged metrics."""
    remat: str = "auto"
    """What the backward pass recomputes: `none`, `products` (elementwise work; matrix products are kept), `attention`
    (the MLP; attention's products are kept), `decoder` (everything; each layer's input is kept), `auto`: the first of
    these that fits into memory by the compiler's figures (`none` on CPUs)."""
    attention: str = "auto"
    """Attention implementation: `splash` (TPU kernel), `chunked` (any backend, memory linear in the length), `einsum`
    (any backend, a layer's scores in memory), or `auto`: `splash` on TPUs, elsewhere `einsum` up to rows of 2,048
    tokens and `chunked` beyond."""
    loss_chunk_tokens: int = 1024
    """Tokens of each row whose logits exist at one time while computing the loss."""
    compute_dtype: str = "auto"
    """dtype of activations and of the frozen base weights: `bfloat16`, `float32` or `auto` (bfloat16, but float32 on
    CPUs, which only emulate bfloat16). LoRA and optimizer are always float32."""
    spike_factor: float | None = None
    """Skip an update whose loss is more than this many times the median of the previous 64 (at least 16); null:
    never."""
    profile: list[int] | None = None
    """Updates to record for XProf and TensorBoard, [first,last] counted from 1, such as `[10,14]`; the trace goes to
    `profile` in the run folder. null: none."""
    plan: str | None = None
    """Folder of the plan (or its plan.json) whose step time is compared with the measured one in `result.json`; null:
    the run folder's own, else the newest under `outputs/plan` for this configuration."""
    ema_decay: float | None = None
    """Decay per update of an average of the trained values, without their initial ones. Held-out losses, samples and
    exports then use the average; checkpoints hold both. null: no average."""
    patience: int | None = None
    """End the run after this many consecutive held-out evaluations that did not lower the loss (exit code 0); null:
    never."""
    min_delta: float = 0.0
    """How far a held-out loss must be below the lowest to count for `patience`, in nats per target token."""
    time_limit: str | None = None
    """Save and end at the first update boundary this long after the start, including loading and compilation (exit code
    0; the same command resumes): `2h30m`, `1d`, `90s`, or a number of minutes. null: none."""
    stall_seconds: float | None = 1800
    """Without progress for this long (excluding compilation), dump all stacks and end the run with code 3; null:
    never."""
    compile_cache: str | None = "auto"
    """Local folder for compiled programs; `auto`: JAX_COMPILATION_CACHE_DIR, else `gemma4_tpu/xla` in the user's cache
    folder; null: none."""


@dataclass(kw_only=True)
class TrainRoot:
    """Everything that `python -m gemma4_tpu.train` takes. Functions receive the group they need, never the root."""

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
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    name: str = "train"
    """Name of the run; part of the folder's name and of the tracker's."""
    run_dir: str | None = None
    """Run folder (local or gs://); null: `outputs/<name>/<date>_<time>`. Giving the same folder again resumes the
    run."""
    preview: bool = False
    """Show rendered rows, the length histogram, fill and drops, then stop without training."""
    replay: str | None = None
    """Run folder (local or gs://) to repeat: other words override its recorded configuration, and losses are compared
    with the recorded ones. null: none."""
    replay_allow: list[str] = field(default_factory=list)
    """Differences from the recorded run to accept: `code`, `packages`, `data`, `tokenizer`, `base`, `hardware`."""
