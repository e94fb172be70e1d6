"""`python -m gemma4_tpu.check model.path=<checkpoint>`: reports what a checkpoint is, and whether it can be trained.

Reads headers and small files, local or on gs://, in seconds, whatever the size. Imports no JAX.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.checkpoint_folder import RANDOM
from gemma4_tpu.config.entry import EntryPoint, Nothing
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.paths import at_home, local_folder
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.tasks import ANY_SIZE, CheckRoot
from gemma4_tpu.errors import REFUSED, exit_code, leave

_SECONDS = 300.0
"""For a remote checkpoint: enough for a tokenizer over a slow connection."""


def _normalise(root: CheckRoot) -> CheckRoot:
    """Expands `~`."""
    return replace(
        root, model=replace(root.model, path=at_home(root.model.path), tokenizer=at_home(root.model.tokenizer))
    )


def _examine(root: CheckRoot) -> tuple[Nothing | None, list[Refusal]]:
    """Checks that there is a folder to inspect."""
    name, path = root.model.name, root.model.path
    messages = []
    if name != ANY_SIZE and name not in ARCHITECTURES:
        hint = did_you_mean(name, ARCHITECTURES, lambda near: f"model={near}")
        messages.append(f"model.name={name}: no such architecture{hint} (there are: {', '.join(ARCHITECTURES)})")
    if not path:
        messages.append("model.path is not set; set model.path=<folder with the Hugging Face checkpoint>")
    elif not path.startswith(RANDOM):
        messages += local_folder(f"model.path={path}", path)[1]
    return (None if messages else Nothing()), [Refusal(message) for message in messages]


CHECK: EntryPoint[CheckRoot, Nothing] = EntryPoint(
    name="check",
    schema=CheckRoot,
    normalise=_normalise,
    examine=_examine,
    summary=(
        "Report what a checkpoint is and whether it can be trained. Takes seconds, from headers and small files only:"
        " tensors, parameters, output matrix, RoPE, chat template, vocabulary, stop ids. Training, plan and launch do"
        " the same."
    ),
    examples=(
        ("model.path=embedded:tiny", "the embedded base"),
        ("model.path=<checkpoint>", "a local folder; the size is recognised"),
        ("model=gemma4_31b model.path=gs://bucket/gemma-4-31b", "in a bucket; it must be 31B"),
        ("model.path=<checkpoint> model.tokenizer=<folder>", "with a tokenizer from another folder"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if it can be trained, 2 if refused or if training would refuse it, 130 or 143 interrupted."""
    return exit_code(lambda: _run(load(list(sys.argv[1:] if argv is None else argv), CHECK)))


def _run(loaded: Loaded[CheckRoot, Nothing]) -> int:
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
    leave(main())
