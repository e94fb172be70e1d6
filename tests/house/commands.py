"""The commands that the documentation shows, with what stands for the reader's own names filled in."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma4_tpu.commands import ENTRIES
from gemma4_tpu.launch.gke import GKE
from gemma4_tpu.launch.tpu_vm import TPU_VM
from tests.house.scripts import ROOT

PAGES = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "docs/concepts/*.md",
        "docs/site/*.md",
        "experiments/**/README.md",
        "examples/*.md",
        "benchmarks/*.md",
    )
    for path in ROOT.glob(pattern)
)
OF_ITS_OWN_TEST = {"docs/first_tpu_run.md", "docs/extending.md"}
"""Pages whose blocks another test runs: tests/launch/test_first_tpu_run.py, tests/house/test_extending.py."""
PROGRAMS = ("python ", "make ", "gemma4-tpu ", "pip ", "git ")
"""What a block of commands begins with, if it doesn't say `bash`; other blocks show output or a formula."""
PLACEHOLDERS = {
    "run": "run", "run folder": "outputs/train/run", "run folder, or a sweep's": "outputs/train/run",
    "merged folder": "outputs/train/run/merged", "name": "smoke", "sweep": "sweep",
    "sweep folder": "multirun/smoke/sweep", "folder": "multirun/smoke/sweep", "evaluation": "evaluation",
    "benchmark": "benchmark", "server": "server", "plan": "plan", "clone": "clone", "clone of verilog-eval": "clone",
    "checkpoint": "random:0", "folder with the Hugging Face checkpoint": "random:0", "31B checkpoint": "random:0",
    "CodeV-R1 rows": "rows.jsonl", "team": "team", "id": "train_2026-11-21", "file or folder": "rows.jsonl",
    "command": "train", "other run": "other", "environment": ".venv-vllm",
    "drafter": "drafter", "rows": "rows.jsonl",
    "base": "base", "merged": "outputs/train/run/merged",
}  # fmt: skip
"""`<…>` → what is there in the folder that the test runs in."""
ELIDED = {"run=": "outputs/train/run", "data=": "verilog_smoke", "=gs://": "bucket/folder"}
"""What comes before `…` → what it may stand for."""
_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)
_INLINE = re.compile(r"`((?:python|make|gemma4-tpu|pip)\s[^`]*)`")


@dataclass(frozen=True)
class Command:
    """One line of a page, as a shell would read it."""

    page: str
    text: str
    inline: bool = False
    """In running text, which may leave out what the command is about."""

    @property
    def words(self) -> list[str]:
        """Without comments, options of the page's own (`[further overrides]`) and a final `…`."""
        text = re.sub(r"(?<![=,'])\[[a-z ]+\]", "", self.text)
        text = re.sub(r"<([^<>]*)>", lambda found: PLACEHOLDERS.get(found[1], found[0]), text)
        for before, meant in ELIDED.items():
            text = text.replace(f"{before}…", f"{before}{meant}")
        text = text.replace("model.path=…", "model.path=random:0")
        return [word for word in shlex.split(text, comments=True) if word != "…"]

    @property
    def goes_on(self) -> bool:
        """Whether further words are left to the reader."""
        return re.search(r" …( *#.*)?$", self.text) is not None


def shown_commands() -> list[Command]:
    """Every command in blocks and in running text, and the examples of `--help`; the same words only once."""
    found = [command for page in PAGES for command in _on_page(page)]
    for entry in (*ENTRIES.values(), TPU_VM, GKE):
        found += [Command(f"{entry.name} --help", f"{entry.command} {words}") for words, _ in entry.examples]
    return list({" ".join([*command.words, "…" * command.goes_on]): command for command in found}.values())


def _on_page(path: Path) -> Iterator[Command]:
    name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for indent, language, block in _FENCED.findall(text):
        if name in OF_ITS_OWN_TEST or not (language == "bash" or (not language and block.startswith(PROGRAMS))):
            continue
        lines = re.sub(rf"^{indent}", "", block, flags=re.M).replace("\\\n", " ").splitlines()
        yield from (Command(name, line) for line in lines if line.strip() and not line.startswith("#"))
    for inline in _INLINE.findall(_FENCED.sub("", text)):
        yield Command(name, " ".join(inline.split()), inline=True)
