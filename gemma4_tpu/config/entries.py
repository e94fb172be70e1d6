"""The entry points: `python -m gemma4_tpu.<name>`, what each one takes, and how that is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gemma4_tpu.config.bench_checks import BenchChecked, examine_bench, normalise_bench
from gemma4_tpu.config.check_checks import CheckChecked, examine_check, normalise_check
from gemma4_tpu.config.checks import Checked, examine_train, normalise
from gemma4_tpu.config.evaluate_checks import EvaluateChecked, examine_evaluate, normalise_evaluate
from gemma4_tpu.config.judge_checks import JudgeChecked, examine_judge, normalise_judge
from gemma4_tpu.config.merge_checks import MergeChecked, examine_merge, normalise_merge
from gemma4_tpu.config.plan_checks import PlanChecked, examine_plan, normalise_plan
from gemma4_tpu.config.problems import Problem
from gemma4_tpu.config.report_checks import ReportChecked, examine_report, normalise_report
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.config.serve_checks import ServeChecked, examine_serve, normalise_serve
from gemma4_tpu.config.serving import BenchRoot, ServeRoot
from gemma4_tpu.config.tasks import CheckRoot, EvaluateRoot, JudgeRoot, MergeRoot, PlanRoot, ReportRoot

Root = TypeVar("Root")
Checks = TypeVar("Checks")


@dataclass(frozen=True)
class EntryPoint(Generic[Root, Checks]):
    """One `python -m gemma4_tpu.<name>`: its root schema, registered for `conf/<name>.yaml`, and its checks."""

    name: str
    schema: type[Root]
    normalise: Callable[[Root], Root]
    """One spelling for what can be written in several."""
    examine: Callable[[Root], tuple[Checks | None, list[Problem]]]
    """Everything that can be checked without JAX: what was found out, or the problems."""
    summary: str
    examples: tuple[tuple[str, str], ...]
    """(arguments, what they do)"""
    shorthands: Mapping[str, str] = field(default_factory=dict)
    """Short name → key that it stands for on the command line."""

    @property
    def command(self) -> str:
        return f"python -m gemma4_tpu.{self.name}"

    def in_full(self, word: str) -> str:
        """A word of the command line with a shorthand written out."""
        key, equals, value = word.partition("=")
        return f"{self.shorthands.get(key, key)}{equals}{value}"


TRAIN: EntryPoint[TrainRoot, Checked] = EntryPoint(
    name="train",
    schema=TrainRoot,
    normalise=normalise,
    examine=examine_train,
    summary="Fine-tune Gemma 4 with LoRA, QLoRA or in full. Without arguments: a small run, minutes on a laptop.",
    examples=(
        ("", "the tiny model on the data that travels with the package"),
        ("preview=true", "look at the rows: what is trained on, lengths, fill, drops"),
        ("data=chat_jsonl data.train.0.path=rows.jsonl", "your own conversations"),
        ("lora.rank=8 trainer.max_updates=100", "other values"),
        ("experiment=v5p8 model.path=gs://bucket/gemma-4-31b", "31B on a v5p-8 slice"),
        ("run_dir=outputs/train/<run>", "go on with a run that was stopped"),
    ),
)

CHECK: EntryPoint[CheckRoot, CheckChecked] = EntryPoint(
    name="check",
    schema=CheckRoot,
    normalise=normalise_check,
    examine=examine_check,
    summary=(
        "Say what a checkpoint is and whether it can be trained, in seconds: tensors, parameters, output matrix, RoPE,"
        " chat template, vocabulary and stop ids, from headers and small files. Training, plan and launch do the same."
    ),
    examples=(
        ("model.path=embedded:tiny", "the base that travels with the package"),
        ("model.path=<checkpoint>", "a local folder; the size is recognised"),
        ("model=gemma4_31b model.path=gs://bucket/gemma-4-31b", "in a bucket; it must be 31B"),
        ("model.path=<checkpoint> model.tokenizer=<folder>", "with the tokenizer of another folder"),
    ),
)

MERGE: EntryPoint[MergeRoot, MergeChecked] = EntryPoint(
    name="merge",
    schema=MergeRoot,
    normalise=normalise_merge,
    examine=examine_merge,
    summary=(
        "Turn a trained run into a model that others can load: a merged Hugging Face checkpoint, a PEFT adapter, or"
        " both. Written beside the target, compared with the LoRA model, then renamed."
    ),
    examples=(
        ("run=outputs/train/<run>", "the run's last checkpoint, to outputs/train/<run>/merged"),
        ("run=outputs/train/<run> export=both checkpoint=best", "merged and PEFT, at the lowest held-out loss"),
        ("run=outputs/train/<run> target=gs://bucket/model", "to a bucket"),
        ("run=multirun/<name>/<sweep>", "every finished run of a sweep"),
        ("run=outputs/train/<run> push_to_hub=owner/name", "upload it too (needs HF_TOKEN)"),
    ),
    shorthands={key: f"export.{key}" for key in ("checkpoint", "target", "overwrite", "verify", "push_to_hub")},
)

EVALUATE: EntryPoint[EvaluateRoot, EvaluateChecked] = EntryPoint(
    name="evaluate",
    schema=EvaluateRoot,
    normalise=normalise_evaluate,
    examine=examine_evaluate,
    summary=(
        "Generate solutions to Verilog problems, judge them by simulation in a sandbox, and report pass@k with its"
        " uncertainty. Needs Icarus Verilog."
    ),
    examples=(
        ("run=outputs/train/<run>", "a run beside its base, on the synthetic problems of the package"),
        ("run=outputs/train/<run> eval=verilog_eval eval.problems_path=<clone>", "on verilog-eval, 20 samples each"),
        ("model=gemma4_31b model.path=<checkpoint> eval=paper eval.problems_path=<clone>", "a checkpoint, 5 samples"),
        ("eval.endpoint=http://localhost:8000/v1 eval=verilog_eval eval.problems_path=<clone>", "a model on a server"),
        ("eval.samples=samples.jsonl eval=verilog_eval eval.problems_path=<clone>", "judge what is generated already"),
        ("run_dir=<evaluation> eval.resimulate=true", "judge stored samples again"),
        ("selfcheck=true", "show what sandbox and simulator do here"),
        ("compare=[<evaluation>,<evaluation>]", "two evaluations, problem by problem"),
    ),
    shorthands={"eval.unsafe": "eval.judge.unsafe"},
)

JUDGE: EntryPoint[JudgeRoot, JudgeChecked] = EntryPoint(
    name="judge",
    schema=JudgeRoot,
    normalise=normalise_judge,
    examine=examine_judge,
    summary=(
        "Judge Verilog completions as a service on loopback, for rewards: batches of problem and completion in,"
        " verdicts and graded scores out. Tries itself with cheats first. Needs Icarus Verilog."
    ),
    examples=(
        ("", "the synthetic problems of the package, on port 8765"),
        ("eval=verilog_eval eval.problems_path=<clone> port=9000", "verilog-eval, on another port"),
    ),
    shorthands={"eval.unsafe": "eval.judge.unsafe"},
)

PLAN: EntryPoint[PlanRoot, PlanChecked] = EntryPoint(
    name="plan",
    schema=PlanRoot,
    normalise=normalise_plan,
    examine=examine_plan,
    summary=(
        "Compile the training step for a TPU slice that is not here, and say whether it fits, how fast it can be and"
        " what the run will cost. Needs no weights. Without arguments: 31B with LoRA on a v5p-8, some minutes."
    ),
    examples=(
        ("hardware=v5p8 model=gemma4_31b lora.rank=64", "31B with LoRA of rank 64 on a v5p-8"),
        ("experiment=v5p8", "the run that train experiment=v5p8 would be"),
        ("hardware=v6e4 lora=qlora_nf4 trainer.global_batch_sequences=2", "QLoRA on a v6e-4, two rows per update"),
        ("hardware=v6e8 search=true", "meshes × remat × batch: dollars against headroom"),
        ("experiment=v5p8 calibration=outputs/train", "time in the band of your own runs on such chips"),
        ("model=gemma4_e4b model.path=<checkpoint> data.train.0.path=rows.jsonl", "lengths of your own rows"),
    ),
    shorthands={"search": "plan.search", "calibration": "plan.calibration"},
)

REPORT: EntryPoint[ReportRoot, ReportChecked] = EntryPoint(
    name="report",
    schema=ReportRoot,
    normalise=normalise_report,
    examine=examine_report,
    summary=(
        "Look back at what was recorded: one page about a run from plan to cost, a sweep's table and plots, W&B records"
        " to sync, an experiment's result."
    ),
    examples=(
        ("run=outputs/train/<run>", "one page: plan, training, merge, evaluation, serving, cost (Markdown and HTML)"),
        ("run=outputs/train/<run> records=[outputs/plan/<plan>]", "with a record that does not name the run"),
        ("run=[outputs/train/<run>,experiments/smoke] out=both.md", "two runs side by side"),
        ("sweep=multirun/<name>/<sweep>", "table, best run and plots of a sweep, also while it runs"),
        ("sweep=multirun/<name>/<sweep> metric=real_tokens_per_second", "the best by another key of result.json"),
        ("wandb=outputs/train/<run>", "how to sync a run that W&B recorded offline"),
        ("check=experiments/<name>", "run a committed experiment again and compare"),
        ("cost outputs/train/<run> outputs/plan/<plan> serving_slices=[v6e-8]", "dollars of training, serving, both"),
        ("plausibility=[<benchmark>] out=plausibility.md", "throughputs beside the slice's physical ceiling"),
    ),
)

SERVE: EntryPoint[ServeRoot, ServeChecked] = EntryPoint(
    name="serve",
    schema=ServeRoot,
    normalise=normalise_serve,
    examine=examine_serve,
    summary=(
        "Serve a merged checkpoint by vLLM in its container: checked first, followed while it compiles, asked if it"
        " is the trained model, stopped and removed on Ctrl-C. Needs Docker or Podman."
    ),
    examples=(
        ("serving=v6e8 run=outputs/train/<run>", "31B on v6e-8 as in the paper"),
        ("serving=v6e8 run=<merged folder> dry_run=true", "check, and show the container command"),
        ("serving=v6e8_tuned run=<merged folder> serving.max_model_len=8192", "two copies in fp8, shorter sequences"),
        ("serving=v6e4_moe run=<merged folder> 'serving.flags={seed: 0}'", "26B-A4B, with a flag of vllm serve"),
        ("serving=local run=outputs/train/<run>", "a small checkpoint on this CPU, without a container"),
    ),
)

BENCH: EntryPoint[BenchRoot, BenchChecked] = EntryPoint(
    name="bench",
    schema=BenchRoot,
    normalise=normalise_bench,
    examine=examine_bench,
    summary=(
        "Put load on a server and measure latency and throughput as `vllm bench serve` defines them: request rates ×"
        " lengths, or users × context. Raw results for each cell, tables, plots, one HTML page."
    ),
    examples=(
        ("endpoint=http://127.0.0.1:8000 slice=v6e-8 architecture=gemma4_31b", "rates 1 to 64 and unbounded"),
        ("served=outputs/servings/<server> bench=matrix", "1 to 2048 users, 16 to 16,256 tokens"),
        ("endpoint=http://127.0.0.1:8000 'bench.lengths=[[1024,128]]' 'bench.rates=[2,inf]'", "your own cells"),
        ("served=outputs/servings/<server> bench=vllm", "beside `vllm bench serve` in the server's container"),
        ("endpoint=http://127.0.0.1:8000 run_dir=outputs/benchmarks/<run>", "go on; cells that are done are kept"),
    ),
)

ENTRIES: dict[str, EntryPoint] = {
    entry.name: entry for entry in (TRAIN, CHECK, MERGE, EVALUATE, JUDGE, PLAN, REPORT, SERVE, BENCH)
}
"""By name."""
