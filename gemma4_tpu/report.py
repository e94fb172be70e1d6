"""`python -m gemma4_tpu.report sweep=<folder>` and its like: looks back at what was recorded. No JAX here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gemma4_tpu.config.entries import REPORT
from gemma4_tpu.config.load import load
from gemma4_tpu.config.schema import ReportRoot
from gemma4_tpu.errors import INTERRUPTED, REFUSED, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all is well, 1 the report says otherwise, 2 refused (one message on stderr), 130 interrupted."""
    try:
        loaded = load(list(sys.argv[1:] if argv is None else argv), REPORT)
        return SUBJECTS[loaded.checked.subject](loaded.root)
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _sweep(root: ReportRoot) -> int:
    from gemma4_tpu.sweeping.report import show

    return show(root.sweep, root.metric)


def _wandb(root: ReportRoot) -> int:
    from gemma4_tpu.tracking.wandb_sync import show

    return show(root.wandb)


def _check(root: ReportRoot) -> int:
    from gemma4_tpu.training.experiments import check_experiment

    return check_experiment(root.check)


SUBJECTS = {"sweep": _sweep, "wandb": _wandb, "check": _check}
"""What each key of the configuration is answered by."""

if __name__ == "__main__":
    sys.exit(main())
