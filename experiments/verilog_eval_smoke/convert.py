"""verilog-eval's specification-to-RTL problems as chat rows, split into training and held-out ones.

    python experiments/verilog_eval_smoke/convert.py <clone>/dataset_spec-to-rtl --out outputs/verilog_eval_smoke

Reads `ProbNNN_*_prompt.txt` and `ProbNNN_*_ref.sv`. The prompt becomes the user's turn and the reference, its module
renamed from `RefModule` to `TopModule`, the answer. Which side a problem is on depends on a hash of its name alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from gemma4_tpu.errors import UserError

HELDOUT_ONE_IN = 5
_REFERENCE_NAME = re.compile(r"\bRefModule\b")


def read_problems(folder: Path) -> list[dict]:
    """Chat rows of every problem in `folder`, sorted by name.

    Raises:
      UserError: no problems there, or one whose reference is missing or does not define `RefModule`.
    """
    prompts = sorted(folder.glob("Prob*_prompt.txt"))
    if not prompts:
        raise UserError(f"{folder}: no Prob*_prompt.txt; give the folder dataset_spec-to-rtl of a verilog-eval clone")
    rows = []
    for path in prompts:
        name = path.name.removesuffix("_prompt.txt")
        reference = folder / f"{name}_ref.sv"
        if not reference.is_file():
            raise UserError(f"{reference}: missing beside {path.name}")
        code = reference.read_text()
        if not _REFERENCE_NAME.search(code):
            raise UserError(f"{reference}: does not define RefModule")
        answer = f"```verilog\n{_REFERENCE_NAME.sub('TopModule', code).strip()}\n```"
        rows.append(
            {
                "id": name,
                "messages": [
                    {"role": "user", "content": path.read_text().strip()},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    return rows


def is_heldout(name: str) -> bool:
    """One problem in `HELDOUT_ONE_IN`, the same ones everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELDOUT_ONE_IN == 0


def convert(folder: Path, out: Path) -> dict[str, int]:
    """Writes `train.jsonl` and `heldout.jsonl` to `out`; returns their numbers of rows."""
    rows = read_problems(folder)
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for side in ("train", "heldout"):
        kept = [row for row in rows if is_heldout(row["id"]) == (side == "heldout")]
        (out / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        counts[side] = len(kept)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=Path, help="the folder dataset_spec-to-rtl of a verilog-eval clone")
    parser.add_argument("--out", type=Path, default=Path("outputs/verilog_eval_smoke"), help="folder to write to")
    args = parser.parse_args()
    try:
        counts = convert(args.problems, args.out)
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    print(f"{args.out}: {counts['train']} training rows, {counts['heldout']} held-out rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
