"""`python -m gemma4_tpu.check model.path=<checkpoint>`: what a checkpoint is, and whether it can be trained.

Reads headers and small files, local or on gs://: seconds, whatever the size. No JAX here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gemma4_tpu.config.check_checks import CheckChecked
from gemma4_tpu.config.entries import CHECK
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.tasks import CheckRoot
from gemma4_tpu.errors import REFUSED, exit_code

_SECONDS = 300.0
"""For a remote checkpoint: a tokenizer over a slow line, not the weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 it can be trained, 2 refused, or training would refuse it, 130 interrupted."""
    return exit_code(lambda: _run(load(list(sys.argv[1:] if argv is None else argv), CHECK)))


def _run(loaded: Loaded[CheckRoot, CheckChecked]) -> int:
    from gemma4_tpu.models.audit import look_within

    found = look_within(loaded.root.model, _SECONDS)
    print(loaded.root.model.path)
    for heading, fact in found.facts.items():
        print(f"  {heading:<14} {fact}")
    for heading, lines in (("worth knowing", found.notes), ("training would be refused", found.problems)):
        if lines:
            print("\n".join([f"{heading}:", *(f"  - {line}" for line in lines)]))
    return REFUSED if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
