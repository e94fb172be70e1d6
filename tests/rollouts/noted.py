"""A reward for runs of the command line.

`NOTES` names a file that takes what it gave; with `KILLED_AT` n the process is killed when it is asked about its n-th
answer, or gets the signal whose number `SIGNAL` is. How many answers it is asked about at a time is a matter of chance.
"""

import json
import os
import signal
from pathlib import Path

answers = 0


def vowels(rows):
    """The share of vowels in an answer, up to a third."""
    global answers
    before, answers = answers, answers + len(rows)
    if before < int(os.environ.get("KILLED_AT", "0")) <= answers:
        os.kill(os.getpid(), int(os.environ.get("SIGNAL", signal.SIGKILL)))
    texts = [row["completion"].lower() for row in rows]
    shares = [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in texts]
    if notes := os.environ.get("NOTES"):
        with Path(notes).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps([row["prompt"], row["completion"]]) + "\n" for row in rows)
    return [(min(3 * share, 1.0), "some" if share else "none") for share in shares]
