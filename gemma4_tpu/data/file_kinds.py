"""Tells what a file holds by its first bytes, and refuses one whose extension says otherwise."""

from __future__ import annotations

import re

from gemma4_tpu.errors import UserError

UTF8_MARK = b"\xef\xbb\xbf"
MAGIC = {
    b"PAR1": ("Parquet", ".parquet"),
    b"ARROW1": ("an Arrow file", ".arrow"),
    b"\xff\xff\xff\xff": ("an Arrow stream", ".arrow"),
    b"\x1f\x8b": ("gzip-compressed", ".gz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard-compressed", ".zst"),
    b"PK\x03\x04": ("a ZIP archive (or an Excel sheet)", None),
    b"BZh": ("bzip2-compressed", None),
    b"\xfd7zXZ": ("xz-compressed", None),
    b"SQLite format 3": ("an SQLite database", None),
    b"version https://git-lfs": ("a Git LFS pointer: the file itself was not fetched (git lfs pull)", None),
}
"""First bytes → (file type, its usual extension)."""
LINES = (".jsonl", ".ndjson")
TABLES = {".parquet": "Parquet", ".arrow": "Arrow"}


def refuse_another_format(head: bytes, name: str, ending: str) -> None:
    """Refuses a file whose first bytes belong to another format, or to text that is not UTF-8."""
    found = next(((what, right) for magic, (what, right) in MAGIC.items() if head.startswith(magic)), None)
    if ending in TABLES:
        if head and (found is None or found[1] != ending):
            held = f"holds {found[0]}" if found else "is truncated at its start, or is of another format"
            raise UserError(f"{name}: {held}, not {TABLES[ending]}; copy it again or rename it")
        return
    if found is not None:
        advice = f"; rename it to end in {found[1]}" if found[1] else ""
        raise UserError(f"{name}: is {found[0]}, not text{advice}")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or max(head[::2].count(0), head[1::2].count(0)) > len(head) // 4:
        raise UserError(
            f"{name}: the text is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {name} > <new file>"
        )
    if ending != ".json" and b"\r" in head.partition(b"\n")[0].rstrip(b"\r"):
        raise UserError(
            f"{name}: its lines end in a carriage return alone; convert them: tr '\\r' '\\n' < {name} > <new file>"
        )
    if ending in LINES:
        first = head.removeprefix(UTF8_MARK).lstrip()
        if re.match(rb"\[\s*\{", first):
            raise UserError(f"{name}: holds a JSON array, not one object per line; rename it to end in .json")
        if re.match(rb"\{[ \t\r]*\n", first):
            raise UserError(
                f"{name}: holds JSON objects over several lines, not one per line; rename it to end in .json"
            )
