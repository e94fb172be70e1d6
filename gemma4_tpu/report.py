"""`python -m gemma4_tpu.report run=<run folder>` and its like: looks back at what was recorded. No JAX here."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.tasks import ReportRoot
from gemma4_tpu.errors import exit_code, leave
from gemma4_tpu.reporting.checks import LISTED, ReportChecked, examine_report, normalise_report

_PLAIN = r"[\w./-]+"
"""Words that need no quotes on the command line."""
_COST_KEYS = ("serving_hours", "serving_slices", "prices", "spot_prices", "out")


REPORT: EntryPoint[ReportRoot, ReportChecked] = EntryPoint(
    name="report",
    schema=ReportRoot,
    normalise=normalise_report,
    examine=examine_report,
    summary=(
        "Report on a run from plan to cost, on a sweep, or on costs. From what was recorded: one page about a run, a"
        " sweep's table and plots, W&B records to sync, an experiment run again and compared."
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
        ("plausibility=[<benchmark>] out=plausibility.md", "throughputs compared with what the slice can do"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all is well, 1 the report says otherwise, 2 refused (one message), 130 or 143 interrupted."""
    return exit_code(lambda: _answer(load(spelt_out(sys.argv[1:] if argv is None else argv), REPORT)))


def _answer(loaded: Loaded[ReportRoot, ReportChecked]) -> int:
    """By the key that was given."""
    from gemma4_tpu.costing.cost import Prices
    from gemma4_tpu.reporting.ceilings import show_plausibility
    from gemma4_tpu.reporting.costs import CostTerms, command_line, show_costs
    from gemma4_tpu.reporting.experiments import check_experiment
    from gemma4_tpu.reporting.page import show_runs
    from gemma4_tpu.reporting.price_list import show_price_list
    from gemma4_tpu.reporting.sweep import show_sweep
    from gemma4_tpu.tracking import wandb_sync

    root = loaded.root
    terms = CostTerms(
        prices=Prices(on_demand=root.prices, spot=root.spot_prices), serving_hours=root.serving_hours,
        serving_slices=root.serving_slices,
    )  # fmt: skip
    changed = {key: getattr(root, key) for key in _COST_KEYS if getattr(root, key) != getattr(ReportRoot(), key)}
    answers: dict[str, Callable[[], int]] = {
        "run": lambda: show_runs(root.run, root.records, terms, root.out),
        "sweep": lambda: show_sweep(root.sweep, root.metric),
        "wandb": lambda: wandb_sync.show(root.wandb),
        "check": lambda: check_experiment(root.check),
        "cost": lambda: show_costs(root.cost, terms, root.out, command_line("cost", root.cost, changed)),
        "plausibility": lambda: show_plausibility(root.plausibility, root.out),
        "price_list": show_price_list,
    }
    return answers[loaded.checked.subject]()


def spelt_out(words: Sequence[str]) -> list[str]:
    """`cost a b out=c` as `cost=['a','b'] out=c`, `run=a` as `run=['a']`: one folder, or several, without brackets.

    `prices` alone is `price_list=true`.
    """
    if words and words[0] == "prices":
        words = ["price_list=true", *words[1:]]
    if words and words[0] in LISTED:
        places = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        words = [f"{words[0]}={_listed(places)}", *(word for word in words[1:] if word not in places)]
    return [_in_brackets(word) for word in words]


def _in_brackets(word: str) -> str:
    key, equals, value = word.partition("=")
    if key not in (*LISTED, "records") or not equals or value.startswith(("[", "$")):
        return word
    return f"{key}={_listed([value])}"


def _listed(places: Sequence[str]) -> str:
    return f"[{','.join(place if re.fullmatch(_PLAIN, place) else _quoted(place) for place in places)}]"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


if __name__ == "__main__":
    leave(main())
