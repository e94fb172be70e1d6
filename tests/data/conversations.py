"""Every kind of conversation, in normal form, and Google's released chat templates where they are at hand."""

from pathlib import Path

import pytest

TEMPLATES = Path(__file__).parents[3] / "shared" / "data" / "templates"
ABSENT = "../shared is absent: no chat templates of Google's"


def released():
    """Parameters for tests: the released templates' files; one that skips where they are absent."""
    files = sorted(TEMPLATES.glob("*.jinja"))
    return [pytest.param(file, id=file.stem) for file in files] or [pytest.param(None, marks=pytest.mark.skip(ABSENT))]


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def calls(*made, text="", **more):
    return answer(text, tool_calls=list(made), **more)


def result(text, identity=None, **more):
    return {"role": "tool", "content": text, **({"tool_call_id": identity} if identity else {}), **more}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


OSLO, ROME = call("weather", {"city": "Oslo"}, id="1"), call("weather", {"city": "Rome"}, id="2")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where.", "enum": ["Oslo", "Rome"]},
                    "days": {"type": "array", "description": "When.", "items": {"type": "integer"}},
                    "units": {
                        "type": "object",
                        "properties": {"degrees": {"type": "string", "nullable": True}},
                        "required": ["degrees"],
                    },
                    "places": {
                        "type": "array",
                        "items": {"type": "object", "properties": {"at": {"type": "number"}}, "required": ["at"]},
                    },
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]

PLAIN = {
    "single": [user("hi"), answer("hello")],
    "system": [{"role": "system", "content": "be brief"}, user("hi"), answer("hello")],
    "several": [user("hi"), answer("hello"), user("and 2 + 2?"), answer("4"), user("sure?"), answer("yes, 4")],
    "white space": [user("\n hi \n"), answer(" \n  hello\n\nthere \n")],
    "user parts": [user(parts("a ", " b")), answer("c")],
    "ends with a question": [user("hi"), answer("hello"), user("well?")],
    "two questions": [user("hi"), user("are you there?"), answer("yes")],
    "starts with an answer": [answer("welcome"), user("hi"), answer("hello")],
    "same words": [user("4"), answer("4"), user("4"), answer("4")],
    "words of the markup": [user("model\nthought\n"), answer("thought\nmodel\nuser\nturn|>"), user("x"), answer("y")],
    "private characters": [user("\ue0000.0\ue001"), answer("\ue0000.0\ue001 \u2028 \x85")],
    "thought": [user("hi"), answer("hello", reasoning="be polite")],
    "thoughts": [user("hi"), answer("hello", reasoning="be polite"), user("2 + 2?"), answer("4", reasoning="count")],
    "some thoughts": [user("hi"), answer("hello"), user("2 + 2?"), answer("4", reasoning="count\n\nslowly")],
    "some loss": [user("a"), answer("bad", train=False), user("b"), answer("good", train=True)],
}
WITH_TOOLS = {
    "unused tools": [user("hi"), answer("hello")],
    "one call": [user("w?"), calls(OSLO), result("4", "1"), answer("It is 4.")],
    "a call by name": [user("w?"), calls(call("now", {})), result("9:00", name="now"), answer("9")],
    "call and system": [{"role": "system", "content": "s"}, user("w?"), calls(OSLO), result("4", "1"), answer("4")],
    "two calls at once": [user("w?"), calls(OSLO, ROME), result("4", "1"), result("14", "2"), answer("4 and 14")],
    "call after call": [user("w?"), calls(OSLO), result("4", "1"), calls(ROME), result("14", "2"), answer("4 and 14")],
    "calls in two questions": [
        user("w?"), calls(OSLO), result("4", "1"), answer("4"), user("Rome?"), calls(ROME), result("14", "2"),
        answer("14"),
    ],
    "ends with a call": [user("w?"), calls(OSLO)],
    "ends with words and a call": [user("w?"), calls(OSLO, text="Let me look.")],
    "thought before a call": [user("w?"), calls(OSLO, reasoning="look up"), result("4", "1"), answer("It is 4.")],
    "thoughts all along": [
        user("w?"), calls(OSLO, reasoning="look up"), result("4", "1"), answer("It is 4.", reasoning="as it says"),
        user("thanks"), answer("welcome", reasoning="be polite"),
    ],
    "arguments": [
        user("w?"),
        calls(call("weather", {"city": "Oslo", "B": 1.5, "a": {"z": True, "x": {"k": -3}}, "empty": "", "none": {}})),
    ],
    "results in parts": [user("w?"), calls(OSLO), result(parts("4", " degrees"), "1"), answer("4")],
    "an empty result": [user("w?"), calls(OSLO), result("", "1"), answer("nothing")],
}  # fmt: skip
SOME_TEMPLATES_FAIL = {
    "system parts": [{"role": "system", "content": parts("be", "brief")}, user("hi"), answer("hello")],
    "list arguments": [user("w?"), calls(call("weather", {"days": [1, 2], "names": ["x", {"y": "z"}]}))],
    "null arguments": [user("w?"), calls(call("weather", {"city": None}))],
}
"""Older revisions show these as text that nobody wrote."""
NO_TEMPLATE_SHOWS = {
    "words before a call": [user("w?"), calls(OSLO, text="Let me look."), result("4", "1"), answer("It is 4.")],
    "a result without a call": [user("w?"), answer("looking"), result("SECRET", "1"), answer("It is 4.")],
    "a call without a result": [user("w?"), calls(OSLO), answer("It is 4.")],
    "a call that nobody answers": [user("w?"), calls(OSLO), user("well?"), answer("It is 4.")],
    "a late system turn": [user("w?"), answer("4"), {"role": "system", "content": "s"}, user("x"), answer("y")],
}
"""Google's templates move, lose or fuse something in these, or show a turn that no server would send."""
ALL = {**PLAIN, **WITH_TOOLS, **SOME_TEMPLATES_FAIL, **NO_TEMPLATE_SHOWS}


def tools_of(name):
    return None if name in PLAIN or name == "system parts" else TOOLS
