"""Calls as Gemma writes them: what templates render is read back, and what is no call is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma4_tpu.data.calls import read_call
from gemma4_tpu.data.markup import QUOTE, TOOL_CALL, TOOL_CALL_END
from tests.data.conftest import TEMPLATE
from tests.data.conversations import released

_NAMES = st.from_regex(r"[A-Za-z_][\w.-]{0,12}", fullmatch=True)
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: QUOTE not in text)
_LEAVES = _TEXTS | st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(-1e300, 1e300)
_VALUES = st.recursive(
    _LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(_NAMES, v, max_size=3), max_leaves=8
)


@pytest.mark.parametrize("template", [pytest.param(None, id="tiny"), *released()])
def test_what_a_template_writes_is_read_back(template):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension])
    rendered = environment.from_string(template.read_text() if template else TEMPLATE)

    @settings(max_examples=150 if template is None else 25, deadline=None, derandomize=True, database=None)
    @given(_NAMES, st.dictionaries(_NAMES, _VALUES, max_size=4))
    def check(name, arguments):
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        text = rendered.render(messages=messages, bos_token="")
        assert read_call(text.partition(TOOL_CALL)[2].partition(TOOL_CALL_END)[0]) == (name, arguments)

    check()


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("call:f{}", {}),
        (" call: f { a : 1 , b:[ ] } ", {"a": 1, "b": []}),
        ("call:f{a:Berlin, north,b:2024-01-02}", None),  # a text without its marks ends at the comma
        ("call:f{a:Berlin north,b:2024-01-02}", {"a": "Berlin north", "b": "2024-01-02"}),
        ("call:f{a:NaN,b:-Infinity,c:1e999}", {"a": "NaN", "b": "-Infinity", "c": "1e999"}),  # no numbers of JSON
        (f"call:f{{a:{'9' * 5000}}}", {"a": "9" * 5000}),
        ("call:f{a:{b:" + "[" * 70 + "]" * 70 + "}}", None),
        (f"call:f{{a:{QUOTE}never closed}}", None),
        ("call:f{a:1", None),
        ("call:f{a:1} and more", None),
        ("call:f{a:}", None),
        ("call:{}", None),
        ("f{a:1}", None),
        ("", None),
    ],
)  # fmt: skip
def test_calls_by_hand(written, arguments):
    if arguments is None:
        with pytest.raises(ValueError, match=r"call|string|key|comma|value"):
            read_call(written)
    else:
        assert read_call(written) == ("f", arguments)
