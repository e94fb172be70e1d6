"""`gemma4-tpu completion`: Tab completion of commands, groups, options and keys in Bash, zsh and fish.

    gemma4-tpu completion --install        for the shell in $SHELL; `--install zsh` for another one
    gemma4-tpu completion zsh              prints the script

The scripts call `gemma4-tpu completion query`, which knows the commands and leaves the rest to Hydra.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma4_tpu.commands import COMMANDS, TOOLS
from gemma4_tpu.config.load import load
from gemma4_tpu.errors import UserError, exit_code

# A candidate that ends in one of `=./` is continued; all others are followed by a space. Bash ends words at `=` and
# `:`, so the part that it takes for an earlier word is cut off.
_BASH = r"""_gemma4_tpu() {
  local line=${COMP_LINE:0:COMP_POINT} word=${COMP_WORDS[COMP_CWORD]} one
  local typed=${line##* }
  [[ $word != [=:] ]] || word=
  COMPREPLY=()
  while IFS= read -r one; do
    [[ $one == *[=./] ]] || one+=' '
    COMPREPLY+=("${one#"${typed%"$word"}"}")
  done < <(COMP_LINE=$line "$1" completion query 2> /dev/null)
}
complete -o nospace -o default -F _gemma4_tpu gemma4-tpu
"""
_ZSH = r"""_gemma4_tpu() {
  local -a found
  found=(${(f)"$(COMP_LINE="${(j: :)words[1,CURRENT-1]} $PREFIX" ${~words[1]} completion query 2> /dev/null)"})
  (( $#found )) || { _files; return }
  compadd -S '' -- ${(M)found:#*[=./]}
  compadd -- ${found:#*[=./]}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _gemma4_tpu gemma4-tpu
"""
_FISH = r"""function __gemma4_tpu
    set -lx COMP_LINE (commandline -cp)
    set -l words (commandline -opc)
    $words[1] completion query 2> /dev/null
end
complete -c gemma4-tpu -f -a '(__gemma4_tpu)'
"""


@dataclass(frozen=True)
class Shell:
    """One shell: the script, its location, and the start-up file that loads it."""

    script: str
    home: tuple[str, str]
    """Environment variable and default (below the home folder) of the script's folder."""
    file: str
    """Of the script, in that folder."""
    startup: tuple[str, str, str] | None
    """Variable, default and name of the start-up file that gets a line; None: the shell finds the script by itself."""


_DATA = ("XDG_DATA_HOME", ".local/share")
SHELLS = {
    "bash": Shell(_BASH, _DATA, "gemma4-tpu/completion.bash", ("", "", ".bashrc")),
    "zsh": Shell(_ZSH, _DATA, "gemma4-tpu/completion.zsh", ("ZDOTDIR", "", ".zshrc")),
    "fish": Shell(_FISH, ("XDG_CONFIG_HOME", ".config"), "fish/completions/gemma4-tpu.fish", None),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 installed or printed, 2 refused (one message on stderr)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["query"]:
        return query(os.environ.get("COMP_LINE", ""))
    parser = argparse.ArgumentParser(prog="gemma4-tpu completion", description="Complete words with Tab.")
    parser.add_argument("shell", nargs="?", choices=list(SHELLS), help="default: the shell in $SHELL")
    parser.add_argument("--install", action="store_true", help="write the script and make the shell load it")
    given = parser.parse_args(words)
    return exit_code(lambda: _tell(given.shell, install=given.install))


def _tell(name: str | None, *, install: bool) -> int:
    name = name or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise UserError(f"SHELL={os.environ.get('SHELL', '')}: no completion for this shell; name {', '.join(SHELLS)}")
    if not install:
        print(SHELLS[name].script, end="")
        return 0
    for line in installed(SHELLS[name]):
        print(line)
    return 0


def installed(shell: Shell) -> list[str]:
    """Writes the script, and once a line that loads it; returns what was done.

    Raises:
      UserError: a file cannot be written.
    """
    script = _folder(*shell.home) / shell.file
    reads = f"source {shlex.quote(str(script))}  # completion of gemma4-tpu"
    startup = _folder(*shell.startup[:2]) / shell.startup[2] if shell.startup else None
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(shell.script, encoding="utf-8")
        done = [f"wrote {script}"]
        if startup is not None:
            known = startup.read_text(encoding="utf-8") if startup.is_file() else ""
            if reads not in known.splitlines():
                with startup.open("a", encoding="utf-8") as file:
                    file.write(f"{'' if known.endswith(chr(10)) or not known else chr(10)}{reads}\n")
                done.append(f"added a line to {startup}: {reads}")
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be written ({error.strerror}); save what `gemma4-tpu completion <shell>` prints"
            " where your shell reads it"
        ) from None
    return [*done, "Open a new shell to use it."]


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default)


def query(line: str) -> int:
    """Prints the possible next words, one per line: commands, or Hydra's completions of a command's words."""
    program, *given = [*line.split(), *[""] * line.endswith(" ")] or [""]
    *before, typed = given or [""]
    names = [name.split() for name in (*COMMANDS, *TOOLS)]
    following = {name[len(before)] for name in names if name[: len(before)] == before and len(name) > len(before)}
    if following:
        print("\n".join(sorted(word for word in following if word.startswith(typed))))
        return 0
    command = next((name for name in COMMANDS if given[: len(name.split())] == name.split()), None)
    if command is not None:
        os.environ["COMP_LINE"] = " ".join([program, *given[len(command.split()) :]])
        load(["--shell-completion", "query=fish"], COMMANDS[command])  # fish's answers come one per line
    return 0


if __name__ == "__main__":
    sys.exit(main())
