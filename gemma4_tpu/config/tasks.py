"""Types of what runs before and after a training run: check, plan, merge, evaluate, report. Ground: `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma4_tpu.config.schema import HardwareConfig, MeshConfig, ModelConfig, TrainRoot


@dataclass(kw_only=True)
class ExportConfig:
    """How a trained run is exported (`export=`)."""

    format: str = "merged"
    """`merged`: a Hugging Face checkpoint with the adapters merged in; `peft`: a PEFT adapter; `both`; `int8` or `fp8`:
    the merged checkpoint, and another one with its products quantised, in the form of compressed-tensors, whose servers
    quantise activations too; `int8_weight_only` or `fp8_weight_only`: with weights quantised only."""
    checkpoint: str = "latest"
    """Which checkpoint: `latest`, `best` (lowest held-out loss) or an update number. Short form: `checkpoint=`."""
    peft_experts: str = "fused"
    """How a PEFT adapter stores adapters of experts: `fused` as PEFT itself does, or `per_expert`, which vLLM loads as
    it is (PEFT doesn't)."""
    base: str | None = None
    """Folder of the base checkpoint (local or gs://), if it is no longer the run's `model.path`; must hold the same
    weights."""
    target: str | None = None
    """Folder to write (local or gs://); where the format has two parts, its subfolders `merged` and `adapter`, or
    `merged` and one named after the format; for several runs, one subfolder named after each. null: those subfolders in
    the run folder. Short form: `target=`."""
    overwrite: bool = False
    """Replace an existing target. Short form: `overwrite=`."""
    verify: str = "true"
    """What is compared before the merged model is published: `true`: every adapted weight, and the logits of the merged
    and the LoRA model if the model fits into memory (float32, on the CPU); `stream`: the weights only; `false`:
    nothing. Short form: `verify=`."""
    prompts: str | None = None
    """Text file with a prompt on each line, on which the quantised model is compared with the merged one, up to 512
    tokens of each (`verify=true`); null: four short built-in ones."""
    push_to_hub: str | None = None
    """`owner/name` of a Hugging Face repository (private if new) to upload to; needs HF_TOKEN in the environment. Short
    form: `push_to_hub=`."""


@dataclass(kw_only=True)
class JudgeConfig:
    """Judging of samples by simulation (`eval.judge`). Samples are hostile code until proven otherwise."""

    iverilog: str | None = None
    """Folder with `iverilog` and `vvp`; null: the first on the PATH."""
    workers: int | None = None
    """Simulations at a time; null: one per CPU core that this process may use."""
    sandbox: str = "auto"
    """`bubblewrap`, `landlock`, or `auto`: the first of these that works on this machine."""
    unsafe: bool = False
    """If no sandbox works: judge with resource limits alone, so that samples can read and write files. Short form:
    `eval.unsafe=`."""
    cpu_seconds: int = 20
    """Maximum CPU time of one compilation or simulation; more is a timeout, and so is ten times what the reference took
    (if that is over a second)."""
    memory_mib: int = 2048
    """Address space of each process, in MiB."""
    file_mib: int = 32
    """Largest file that a process may write, in MiB."""
    output_kib: int = 1024
    """Text that a process may print, in KiB; more is a runtime error."""
    processes: int = 64
    """Maximum number of processes at a time in a sandbox."""
    cache_dir: str | None = None
    """Folder for the references' results on this simulator; null: `gemma4_tpu` in the user's cache folder."""


@dataclass(kw_only=True)
class MergeRoot:
    """Everything `python -m gemma4_tpu.merge` takes."""

    run: str = ""
    """A training run's folder, or a folder of run folders (a sweep): each is exported."""
    export: ExportConfig = field(default_factory=ExportConfig)
    name: str = "merges"
    """Name of the records' folder in the run folder."""
    run_dir: str | None = None
    """Folder for the record of this export (configuration, log, parity, delta norms); null:
    `<run>/<name>/<date>_<time>`. With several runs, one subfolder for each."""


@dataclass(kw_only=True)
class AnswersConfig:
    """How rows of your own are asked and their answers compared (`eval.answers`, with `eval=accuracy`)."""

    format: str = "auto"
    """Format of the rows, as `data.format`: what comes before the last answer is asked, the last answer is expected."""
    columns: dict[str, str] = field(default_factory=dict)
    """The rows' own names for the columns of the format, as `data.columns`: `{prompt: question, completion: gold}`."""
    category: str | None = None
    """Column that names each row's category; scores are then also given by category. null: no categories."""
    compare: str = "stripped"
    """Both answers are read this way, then have to be equal: `exact` (to the letter), `stripped` (white space around
    does not count), `casefold` (nor do case and runs of white space), `number` (the one number in the text), `json`
    (the JSON value, in a code fence or not)."""
    extract: str | None = None
    """Regular expression whose last match (its first group, if it has one) is the answer within the text; an answer
    without a match counts as unanswered, an expected answer without one is taken whole. null: the whole text."""
    choices: str | None = None
    """Column with the choices of each row: a list of texts (or its JSON), or `{text: […], label: […]}`; null: answers
    are free."""
    answer: str | None = None
    """With `choices`, what the expected answer says: the `text` of a choice, its `letter` (or own label), or its
    `index` from 0; null: whichever of these fits every row."""
    choose: str = "letter"
    """With `choices`: `letter` (the choices are listed under the question, and the letter is generated), `logprob` (the
    most likely choice counts; they are not listed), or `logprob_per_token` (the most likely per token, which does not
    favour short ones). With `eval.endpoint`, the latter two need `model.tokenizer`."""


@dataclass(kw_only=True)
class HarnessConfig:
    """What lm-evaluation-harness runs on a server (`eval.lm_eval`, with `eval=lm_eval`)."""

    tasks: list[str] = field(default_factory=list)
    """Its tasks and groups by name, such as `[arc_challenge, mmlu]`. Short form: `eval.tasks=`."""
    include: str | None = None
    """Folder with YAML files of tasks of your own; null: none."""
    shots: int | None = None
    """Examples before each question; null: the tasks' own number."""
    chat_template: bool = True
    """Put questions into the turns of the tokenizer's chat template, as tuned models expect; false: plain text, as for
    models that are pre-trained only."""


@dataclass(kw_only=True)
class EvalConfig:
    """What is generated, and how it is judged (`eval=`)."""

    benchmark: str = "verilog_eval"
    """`verilog_eval` (version 2, specification to RTL), `verilog_eval_completion` (its other task), `rtllm` (folders in
    RTLLM's style), `resbench` (`problems.json`), `cvdp` (JSONL), `verilog_smoke` (synthetic problems), `accuracy`
    (rows of your own, see `answers`), or `lm_eval` (lm-evaluation-harness, see `lm_eval`)."""
    problems_path: str | None = None
    """Local clone of the benchmark, or its folder of problems; for `verilog_smoke` and `cvdp` a JSONL file; for
    `accuracy` whatever `data.train.0.path` takes, of which the validation (else test) split is read."""
    max_problems: int | None = None
    """Use only the first N problems; null: all."""
    checkpoint: str = "latest"
    """Which checkpoint of `run`: `latest`, `best` (lowest held-out loss) or an update number."""
    adapter: str = "run"
    """With `run`: `run` (what was trained), `none` (its base alone), or `both`, compared problem by problem."""
    n: int = 20
    """Samples per problem; pass@k is estimated for k up to n."""
    temperature: float = 0.8
    """Sampling temperature; 0: greedy."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens with this share of the probability."""
    max_new_tokens: int = 2048
    """Samples are cut off at this many tokens; the number cut off is reported."""
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
    """Folder, local or gs://, for the features of pictures in questions, as `data.image_cache`; null: that of `run`, or
    for a checkpoint none, so that they are made anew each time."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1, to generate with. A key is taken from
    OPENAI_API_KEY."""
    endpoint_model: str | None = None
    """The model's name on that server; null: the only one that the server lists."""
    concurrency: int = 32
    """Requests in flight at a time."""
    retries: int = 5
    """Further attempts at a failed request, each after twice the wait; a sample that never arrives is a failure."""
    request_timeout_seconds: float = 600.0
    """Timeout for one answer."""
    samples: str | None = None
    """JSONL file of samples from elsewhere to judge: `{"problem": …, "completion": …}` per line."""
    second_opinion: bool = True
    """Also grade the benches with designs that do nothing, and, where there is a reference, compare samples with it
    under fresh random stimulus (and by proof, where the problem is combinational and yosys is installed). Reported next
    to the score, never part of it."""
    stimulus_seed: int | None = None
    """Seed of that stimulus; null: a new one for each evaluation, which is recorded."""
    columns: list[str] = field(default_factory=list)
    """What else to report about samples that pass: `lint` (warnings, by verilator), `size` (cells and transistors, by
    yosys). If the tool is not installed, the column stays empty."""
    resimulate: bool = False
    """Judge the stored samples of `run_dir` again."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    lm_eval: HarnessConfig = field(default_factory=HarnessConfig)


@dataclass(kw_only=True)
class EvaluateRoot:
    """Everything `python -m gemma4_tpu.evaluate` takes."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: str = ""
    """Run folder of the training run to evaluate."""
    compare: list[str] = field(default_factory=list)
    """Two evaluation folders to compare problem by problem."""
    selfcheck: bool = False
    """Show how sandbox and simulator behave on this machine, then stop."""
    name: str = "evaluations"
    """Name of the records' folder in the run folder, or in `outputs`."""
    run_dir: str | None = None
    """Folder of this evaluation; null: `<run>/<name>/<date>_<time>`. Giving the same folder again resumes it."""


@dataclass(kw_only=True)
class JudgeRoot:
    """Everything `python -m gemma4_tpu.judge` takes."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """Only `benchmark` (a simulated one), `problems_path`, `max_problems` and `judge` are used."""
    port: int = 8765
    """Port on 127.0.0.1; 0: any free one. The address is printed."""
    with_parent: bool = False
    """End when standard input is closed, as happens when the process at its other end is gone."""


@dataclass(kw_only=True)
class PlanConfig:
    """What a plan assumes and tries (`plan=`)."""

    rows: int = 9959
    """Training examples, if the data can't be read here. The defaults are those of the paper's 10,000 rows."""
    mean_tokens: float = 922.0
    """Their mean length."""
    p99_tokens: float = 2553.0
    """Length that 99% of them do not exceed."""
    answer_tokens: int | None = None
    """Of objectives that sample: mean length of an answer, in tokens; null: `rollouts.new_tokens`, the longest."""
    schedule: bool = True
    """After the first answer, compile to the end and take the time from the compiler's schedule: minutes for the large
    models, once (compiled programs are kept). This also finds kernels that ask for too much on-chip memory, and adds
    XLA's own counts (`cost_analysis`)."""
    utilization_low: float = 0.2
    """Without a schedule: share of the binding roofline that a slow run reaches, the pessimistic end of the
    estimates. The defaults are those of the plans that have a schedule (`experiments/plans`): 19% to 46%."""
    utilization_high: float = 0.45
    """Without a schedule: share that a fast run reaches, the optimistic end of the estimates."""
    hours_between_preemptions: float = 8.0
    """How long spot capacity lasts on average, for its costs; an assumption."""
    restart_minutes: float = 10.0
    """Minutes from a new slice to the first update after a preemption: start, restore, compile; an assumption."""
    calibration: str | None = None
    """Folder of your own runs (or one run folder): how much longer their updates took than planned replaces the
    published band. Short form: `calibration=`."""
    max_attempts: int = 4
    """If the run does not fit: how many changes to compile in search of some that do; 0: none."""
    search: bool = False
    """Compile every legal mesh with each remat policy and batch size of the slice, and show which are worthwhile."""
    search_schedules: int = 3
    """With `plan.schedule`: of those that fit, this many with the best rooflines are compiled to the end and ranked by
    the schedule."""
    search_flags: list[str] = field(default_factory=lambda: ["none", "tuned"])
    """Values of `hardware.flags` with which each of these is compiled to the end."""
    search_rows: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Rows of T that a search tries, per position on the fsdp axis and microbatch."""
    max_candidates: int = 24
    """A search compiles at most this many; the others are listed as left out."""
    parallel: int = 1
    """Compilations at a time in a search, as far as memory permits."""


@dataclass(kw_only=True)
class PlanRoot(TrainRoot):
    """Everything `python -m gemma4_tpu.plan` takes: what train takes, plus assumptions."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    name: str = "plan"
    """Name of the plan; part of the folder's name."""


ANY_SIZE = "auto"
"""`model.name` of a checkpoint whose size is to be recognised."""


@dataclass(kw_only=True)
class CheckRoot:
    """Everything `python -m gemma4_tpu.check` takes. Without `model=<size>` the size is recognised."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(name=ANY_SIZE))


@dataclass(kw_only=True)
class ReportRoot:
    """Everything `python -m gemma4_tpu.report` takes; exactly one subject is given."""

    run: list[str] = field(default_factory=list)
    """Run folder of a training run, or several: one page about everything recorded of it. `run=<folder>` works, too."""
    records: list[str] = field(default_factory=list)
    """With `run`: folders of plans, evaluations, benchmarks and the like (or folders of such), in addition to those
    that are in the run folder, or are under `outputs` and name it."""
    sweep: str = ""
    """Sweep folder, or any folder of run folders: its table, best run and plots are regenerated."""
    wandb: str = ""
    """Run folder tracked by W&B: shows how to sync its records."""
    check: str = ""
    """Folder of a committed experiment: it is run again and compared with its recorded result."""
    cost: list[str] = field(default_factory=list)
    """Runs, plans, evaluations, benchmarks and folders with a `figures.yaml`, or folders of such: what each costs, and
    training plus serving. Also written `report cost <folder> <folder>`."""
    plausibility: list[str] = field(default_factory=list)
    """The same kinds of folders: each throughput and latency compared with the slice's physical ceiling."""
    price_list: bool = False
    """Price of an hour on each chip by region and kind of capacity, with its source and age. Also written `report
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
    """With `cost`, `plausibility` or `run`: Markdown file to write; null: the first two are printed, the page of a run
    goes to its folder (`report.md`), that of several runs to `outputs/reports`. The HTML page is written next to it."""
    metric: str | None = None
    """With `sweep`: the key of `result.json` that decides which run is best; null: the sweep's own, else
    `heldout_loss_last`."""
