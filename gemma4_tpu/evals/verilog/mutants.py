"""Makes small mistakes in a correct module. A test bench that passes them is too weak."""

from __future__ import annotations

import re

# (pattern, replacement). Each match makes one mutant.
_RULES = (
    (r" & ", " | "),
    (r" \| ", " & "),
    (r" \^ ", " | "),
    (r"~", ""),
    (r"= (?=\w+ [&|^] )", "= ~"),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" < (?=\w+;)", " <= "),
    (r" > (?=\w+;)", " >= "),
    (r" < (?=\w+\))", " > "),
    (r" > (?=\w+\))", " < "),
    (r" << ", " >> "),
    (r" >> ", " << "),
    (r"(= \w+) <= (?=\w+;$)", r"\1 < "),
    (r" >= ", " > "),
    (r"(: \w+ = )0", r"\g<1>1"),
    (r"(: \w+ = )1", r"\g<1>0"),
    (r"= ([&|^])(?=\w)", r"= ~\1"),
    (r"if \(!(\w+)\)", r"if (\1)"),
    (r"if \((\w+)\)", r"if (!\1)"),
    (r" or (?:posedge|negedge) \w+", ""),
    (r"@\(posedge", "@(negedge"),
    (r"<= 0;", "<= 1;"),
    (r"\[0\]", "[1]"),
    (r"(\w+) \? (\w+) : (\w+)", r"\1 ? \3 : \2"),
    (r"\{(\w+), (\w+)\}", r"{\2, \1}"),
    (r"(?<=<= )(\w+)(?=;$)", r"~\1"),
)


def mutants(module: str) -> list[str]:
    """Every module that results from `module` by applying one rule at one place of its body, without duplicates."""
    head, separator, body = module.partition(");\n")
    found = []
    for pattern, replacement in _RULES:
        for match in re.finditer(pattern, body, re.MULTILINE):
            changed = body[: match.start()] + match.expand(replacement) + body[match.end() :]
            found.append(head + separator + changed)
    return [mutant for mutant in dict.fromkeys(found) if mutant != module]
