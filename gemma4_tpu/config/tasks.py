"""Types of the commands before and after training: check, plan, merge, evaluate, report. Base layer, as `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma4_tpu.config.machines import HardwareConfig, MeshConfig
from gemma4_tpu.config.schema import ModelConfig, TrainRoot


@dataclass(kw_only=True)
class ExportConfig:
    """How a trained run is exported (`export=`)."""

    format: str = "merged"
    """`merged`: a Hugging Face checkpoint with the adapters merged in; `peft`: a PEFT adapter; `both`; `int8` or `fp8`:
    the merged checkpoint, and another one with its products quantised, in compressed-tensors' format, for which servers
    quantise activations too; `int8_weight_only` or `fp8_weight_only`: with only weights quantised."""
    checkpoint: str = "latest"
    """Which checkpoint: `latest`, `best` (lowest held-out loss) or an update number. Short form: `checkpoint=`."""
    peft_experts: str = "fused"
    """How a PEFT adapter stores adapters of experts: `fused`, as PEFT itself does, or `per_expert`, which vLLM loads
    unchanged (PEFT doesn't)."""
    base: str | None = None
    """Folder of the base checkpoint (local or gs://), if it is no longer the run's `model.path`; must contain the same
    weights."""
    target: str | None = None
    """Folder to write (local or gs://). A format with two parts writes to its subfolders `merged` and `adapter`, or
    `merged` and one named after the format; several runs write to one subfolder each, named after the run. null: these
    subfolders in the run folder. Short form: `target=`."""
    overwrite: bool = False
    """Replace an existing model or adapter at the target, but no other folder, nor one that holds the run or its base.
    Short form: `overwrite=`."""
    verify: str = "true"
    """What to compare before publishing the merged model: `true`: every adapted weight, and the logits of the merged
    and the LoRA model if the model fits into memory (float32, on the CPU); `stream`: the weights only; `false`:
    nothing. Short form: `verify=`."""
    prompts: str | None = None
    """Text file with one prompt per line, on which to compare the quantised model with the merged one, up to 512 tokens
    of each (`verify=true`); null: four short built-in prompts."""
    push_to_hub: str | None = None
    """`owner/name` of a Hugging Face repository (private if new) to upload to; needs HF_TOKEN in the environment. Short
    form: `push_to_hub=`."""


@dataclass(kw_only=True)
class JudgeConfig:
    """Judging of samples by simulation (`eval.judge`). Samples are hostile code until proven otherwise."""

    iverilog: str | None = None
    """Folder with `iverilog` and `vvp`; null: the first on the PATH."""
    workers: int | None = None
    """Concurrent simulations; null: one per CPU core that this process may use."""
    sandbox: str = "auto"
    """`bubblewrap`, `landlock`, or `auto`: the first of these that works on this machine."""
    unsafe: bool = False
    """If no sandbox works: judge with resource limits alone, which lets samples read and write files. Short form:
    `eval.unsafe=`."""
    cpu_seconds: int = 20
    """Maximum CPU time of one compilation or simulation; more is a timeout, and so is more than ten times that of the
    reference (if that is over a second)."""
    memory_mib: int = 2048
    """Address space of each process, in MiB."""
    file_mib: int = 32
    """Largest file that a process may write, in MiB."""
    output_kib: int = 1024
    """Maximum output of a process, in KiB; more is a runtime error."""
    processes: int = 64
    """Maximum number of processes at a time in a sandbox."""
    cache_dir: str | None = None
    """Folder for the references' results on this simulator; null: `gemma4_tpu` in the user's cache folder."""


@dataclass(kw_only=True)
class MergeRoot:
    """Everything that `python -m gemma4_tpu.merge` takes."""

    run: str = ""
    """A training run's folder, or a parent of run folders (a sweep), each of which is exported."""
    export: ExportConfig = field(default_factory=ExportConfig)
    name: str = "merges"
    """Name of the records' folder in the run folder."""
    run_dir: str | None = None
    """Folder for the record of this export (configuration, log, parity, delta norms); null:
    `<run>/<name>/<date>_<time>`. With several runs, one subfolder for each."""


@dataclass(kw_only=True)
class AnswersConfig:
    """How your own rows are asked and their answers compared (`eval.answers`, with `eval=accuracy`)."""

    format: str = "auto"
    """Format of the rows, as `data.format`: the question is everything before the last answer, which is the expected
    one."""
    columns: dict[str, str] = field(default_factory=dict)
    """The rows' own names for the columns of the format, as `data.columns`: `{prompt: question, completion: gold}`."""
    category: str | None = None
    """Column with each row's category; scores are then also reported by category. null: no categories."""
    compare: str = "stripped"
    """Both answers are read this way and must then be equal: `exact` (unchanged), `stripped` (ignores surrounding white
    space), `casefold` (also ignores case and runs of white space), `number` (the only number in the text), `json` (the
    JSON value, in a code fence or not)."""
    extract: str | None = None
    """Regular expression whose last match (its first group, if it has one) is the answer in the text; an answer without
    a match counts as unanswered, an expected answer without one is used whole. null: the whole text."""
    choices: str | None = None
    """Column with the choices of each row: a list of texts (or its JSON), or `{text: […], label: […]}`; null: answers
    are free."""
    answer: str | None = None
    """With `choices`, what the expected answer contains: the `text` of a choice, its `letter` (or own label), or its
    `index` from 0; null: whichever of these fits every row."""
    choose: str = "letter"
    """With `choices`: `letter` (lists the choices under the question, and generates the letter), `logprob` (picks the
    most likely choice, without listing them), or `logprob_per_token` (the most likely per token, which does not favour
    short ones). With `eval.endpoint`, the latter two need `model.tokenizer`."""


@dataclass(kw_only=True)
class HarnessConfig:
    """Tasks of lm-evaluation-harness on a server (`eval.lm_eval`, with `eval=lm_eval`)."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks and groups, such as `[arc_challenge, mmlu]`. Short form: `eval.tasks=`."""
    include: str | None = None
    """Folder with YAML files of your own tasks; null: none."""
    shots: int | None = None
    """Examples before each question; null: the tasks' own number."""
    chat_template: bool = True
    """Render questions as turns of the tokenizer's chat template, as tuned models expect; false: plain text, as for
    models that are only pre-trained."""


@dataclass(kw_only=True)
class EvalConfig:
    """What is generated and how it is judged (`eval=`)."""

    benchmark: str = "verilog_eval"
    """`verilog_eval` (version 2, specification to RTL), `verilog_eval_completion` (its other task), `rtllm` (folders in
    RTLLM's style), `resbench` (`problems.json`), `cvdp` (JSONL), `verilog_smoke` (synthetic problems), `accuracy`
    (your own rows, see `answers`), or `lm_eval` (lm-evaluation-harness, see `lm_eval`)."""
    problems_path: str | None = None
    """Local clone of the benchmark, or its folder of problems; for `verilog_smoke` and `cvdp` a JSONL file; for
    `accuracy` anything that `data.train.0.path` takes, of which the validation (else test) split is read."""
    max_problems: int | None = None
    """Use only the first N problems; null: all."""
    checkpoint: str = "latest"
    """Which checkpoint of `run`: `latest`, `best` (lowest held-out loss) or an update number."""
    adapter: str = "run"
    """With `run`: `run` (the trained model), `none` (its base alone), or `both`, compared problem by problem."""
    n: int = 20
    """Samples per problem; pass@k is estimated for k up to n."""
    temperature: float = 0.8
    """Sampling temperature; 0: greedy."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens with this share of the probability."""
    max_new_tokens: int = 2048
    """Samples are cut off at this many tokens; the number of cut-off samples is reported."""
    seed: int = 0
    """Each sample's own seed is derived from this one, its problem and its number."""
    system: str | None = None
    """System message before each problem; null: none."""
    thoughts: str | None = None
    """Policy for the prompt's thought channel, `drop` or `train`; null: that of `run`, else `drop`."""
    batch_size: int = 64
    """Sequences in one decoding step."""
    compute_dtype: str = "auto"
    """As `trainer.compute_dtype`."""
    image_cache: str | None = None
    """Folder, local or gs://, for the features of pictures in questions, as `data.image_cache`; null: that of `run`;
    for a checkpoint none, so features are recomputed each time."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server for generation, such as http://localhost:8000/v1. A key is taken from
    OPENAI_API_KEY."""
    endpoint_model: str | None = None
    """The model's name on that server; null: the only one that the server lists."""
    concurrency: int = 32
    """Concurrent requests."""
    retries: int = 5
    """Further attempts at a failed request, each after twice the wait; a sample that never arrives counts as a
    failure."""
    request_timeout_seconds: float = 600.0
    """Timeout for one answer."""
    samples: str | None = None
    """JSONL file of existing samples to judge: `{"problem": …, "completion": …}` per line."""
    second_opinion: bool = True
    """Also grade the benches with designs that do nothing, and, if there is a reference, compare samples with it under
    fresh random stimulus (and by proof, if the problem is combinational and yosys is installed). Reported next to the
    score, never part of it."""
    stimulus_seed: int | None = None
    """Seed of this stimulus; null: a new one for each evaluation, which is recorded."""
    columns: list[str] = field(default_factory=list)
    """Further columns for samples that pass: `lint` (warnings, by verilator), `size` (cells and transistors, by yosys).
    If the tool is not installed, the column stays empty."""
    resimulate: bool = False
    """Judge the stored samples of `run_dir` again."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    lm_eval: HarnessConfig = field(default_factory=HarnessConfig)


@dataclass(kw_only=True)
class EvaluateRoot:
    """Everything that `python -m gemma4_tpu.evaluate` takes."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: str = ""
    """Run folder of the training run to evaluate."""
    compare: list[str] = field(default_factory=list)
    """Two evaluation folders to compare problem by problem."""
    selfcheck: bool = False
    """Check sandbox and simulator on this machine, show the results, then stop."""
    name: str = "evaluations"
    """Name of the records' folder in the run folder, or in `outputs`."""
    run_dir: str | None = None
    """Folder of this evaluation; null: `<run>/<name>/<date>_<time>`. Giving the same folder again resumes it."""


@dataclass(kw_only=True)
class JudgeRoot:
    """Everything that `python -m gemma4_tpu.judge` takes."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """Only `benchmark` (a simulated one), `problems_path`, `max_problems` and `judge` are used."""
    port: int = 8765
    """Port on 127.0.0.1; 0: any free one. The address is printed."""
    with_parent: bool = False
    """End when standard input is closed, which happens when the process at its other end is gone."""


@dataclass(kw_only=True)
class PlanConfig:
    """What a plan assumes and tries (`plan=`)."""

    rows: int = 9959
    """Number of training examples, if the data can't be read here. The defaults are those of the paper's 10,000
    rows."""
    mean_tokens: float = 922.0
    """Mean length of the examples, in tokens."""
    p99_tokens: float = 2553.0
    """Length that 99% of the examples do not exceed, in tokens."""
    answer_tokens: int | None = None
    """For objectives that sample: mean length of an answer, in tokens; null: the longest, `rollouts.new_tokens`."""
    schedule: bool = True
    """After the first answer, compile to the end and take the time from the compiler's schedule: minutes for large
    models, once (compiled programs are kept). This also finds kernels that need too much on-chip memory, and adds XLA's
    own counts (`cost_analysis`)."""
    utilization_low: float = 0.2
    """Without a schedule: share of the binding roofline that a slow run reaches, the pessimistic end of the
    estimates. The defaults are those of the plans that have a schedule (`experiments/plans`): 15% to 52%."""
    utilization_high: float = 0.45
    """Without a schedule: share that a fast run reaches, the optimistic end of the estimates."""
    hours_between_preemptions: float = 8.0
    """Mean time until spot capacity is preempted, for its costs; an assumption."""
    restart_minutes: float = 10.0
    """Minutes from a new slice to the first update after a preemption: start, restore, compile; an assumption."""
    calibration: str | None = None
    """Folder of your own runs (or one run folder), whose ratios of measured to planned update time replace the
    published band. Short form: `calibration=`."""
    max_attempts: int = 4
    """If the run does not fit: number of changes to compile in search of some that fit; 0: none."""
    search: bool = False
    """Compile every legal mesh with each remat policy and batch size of the slice, and show which are worthwhile."""
    search_schedules: int = 3
    """With `plan.schedule`: number of fitting candidates, best rooflines first, to compile to the end and rank by the
    schedule."""
    search_flags: list[str] = field(default_factory=lambda: ["none", "tuned"])
    """Values of `hardware.flags` with which to compile each of these."""
    search_rows: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Numbers of rows of T that a search tries, per position on the fsdp axis and microbatch."""
    max_candidates: int = 24
    """A search compiles at most this many; the others are listed as left out."""
    parallel: int = 1
    """Concurrent compilations in a search, as far as memory permits."""


@dataclass(kw_only=True)
class PlanRoot(TrainRoot):
    """Everything that `python -m gemma4_tpu.plan` takes: what train takes, plus assumptions."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    name: str = "plan"
    """Name of the plan; part of the folder's name."""


ANY_SIZE = "auto"
"""`model.name` of a checkpoint whose size is to be detected."""


@dataclass(kw_only=True)
class CheckRoot:
    """Everything that `python -m gemma4_tpu.check` takes. Without `model=<size>`, the size is detected."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(name=ANY_SIZE))


@dataclass(kw_only=True)
class ReportRoot:
    """Everything that `python -m gemma4_tpu.report` takes; give exactly one subject."""

    run: list[str] = field(default_factory=list)
    """Run folder of a training run, or several: one page about everything recorded about them. `run=<folder>` also
    works."""
    records: list[str] = field(default_factory=list)
    """With `run`: folders of plans, evaluations, benchmarks and the like (or their parents), in addition to those in
    the run folder, and those under `outputs` that name it."""
    sweep: str = ""
    """Sweep folder, or any parent of run folders, whose table, best run and plots are regenerated."""
    wandb: str = ""
    """Run folder tracked by W&B, to show how to sync its records."""
    check: str = ""
    """Folder of a committed experiment, to run again and compare with its recorded result."""
    cost: list[str] = field(default_factory=list)
    """Runs, plans, evaluations, benchmarks and folders with a `figures.yaml`, or their parents: what each costs, and
    training plus serving. Short form: `report cost <folder> <folder>`."""
    plausibility: list[str] = field(default_factory=list)
    """The same kinds of folders: each throughput and latency compared with the slice's physical ceiling."""
    price_list: bool = False
    """Price of an hour on each chip by region and kind of capacity, with its source and age. Short form: `report
    prices`."""
    serving_hours: list[float] = field(default_factory=lambda: [1.0, 8.0, 24.0])
    """With `cost` or `run`: hours of serving for which totals are calculated."""
    serving_slices: list[str] = field(default_factory=list)
    """With `cost` or `run`: slices to serve on, in addition to those of the benchmarks; keys of `hardware.SLICES`."""
    prices: dict[str, float] = field(default_factory=dict)
    """With `cost` or `run`: on-demand USD per hour by slice, such as `{v6e-8: 21.5, local: 0.1}`; they override those
    of `prices.yaml`."""
    spot_prices: dict[str, float] = field(default_factory=dict)
    """With `cost` or `run`: spot USD per hour by slice."""
    out: str | None = None
    """With `cost`, `plausibility` or `run`: Markdown file to write; null: prints the first two, writes the page of a
    run to its folder (`report.md`), and that of several runs to `outputs/reports`. The HTML page is written next to
    it."""
    metric: str | None = None
    """With `sweep`: the key of `result.json` that decides which run is best; null: the sweep's own, else
    `heldout_loss_last`."""
