"""CodeV-R1 rows with the malformations that sampled responses have."""

import shutil

import pytest

from gemma4_tpu.data import codev
from gemma4_tpu.data.chat import ChatFormat
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.errors import UserError

INV = "module inv(input a, output y);\n  assign y = ~a;\nendmodule"
TOP = "module top(input a, output y);\n  inv i(.a(a), .y(y));\nendmodule"
DRAFT = "module inv(input a);\nendmodule"
TORN = "module inv(input a, output y);\n  assign y ="


def fence(code, language="verilog"):
    return f"```{language}\n{code}\n```"


def code_of(response):
    messages = codev.to_messages({"system": "You write Verilog.", "prompt": "Invert a.", "response": response})
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    return codev.fenced_code(messages)


@pytest.mark.parametrize(
    "response",
    [
        f"<think>invert it</think> <answer>{fence(INV)}</answer>",
        f"<THINK>invert it</THINK>\n<Answer>\n{fence(INV)}\n</Answer>",
        f"invert it</think>{fence(INV)}",
        f"<think>first {fence(DRAFT)} then</think>\n{fence(INV)}",
        f"<think>a</think> b <think>c</think><answer>{fence(INV)}</answer>",
        f"<think>I put it into <answer> tags: <answer></answer></think><answer>{fence(INV)}</answer>",
        f"<think>x</think><answer>{fence(DRAFT)}</answer> or rather <answer>{fence(INV)}</answer>",
        f"<think>x</think><answer>{fence(INV)}",
        f"<think>x</think><answer>```verilog\n{INV}",
        f"<think>x</think><answer>```verilog\n{INV}\n</answer>",
        f"<answer>{INV}</answer>",
        f"Here it is:\n{INV}\nIt inverts.",
        *[
            fence(INV, language)
            for language in ("systemverilog", "sv", "v", "Verilog", "SystemVerilog", "", " verilog ")
        ],
        f"The module:```verilog\n{INV}\n```",
        f"```verilog {INV}```",
        f"```verilog\n{INV}```\nIt inverts.",
        fence(INV).replace("\n", "\r\n"),
        f"The fence is ```verilog``` here:\n{fence(INV)}",
        f"{INV}\n```",
        fence(INV, "python"),
        f"{fence(DRAFT)}\nBut the output is missing:\n{fence(INV)}",
        f"{fence(TORN)}\nAgain, whole:\n{fence(INV)}",
        f"{fence('a | y', 'text')}\n{fence(INV)}\n{fence('assign y = ~a;')}",
        f"{fence('$ iverilog inv.v', 'bash')}\n{fence(INV)}",
        f"````verilog\n{INV}\n````",
        f"~~~\nnot code\n~~~\n{fence(INV)}",
    ],
)
def test_the_one_module_is_found(response):
    assert code_of(response) == INV


def test_backticks_in_comments_and_macros_are_code():
    code = "`timescale 1ns/1ps\n// wrap it in ``` fences\nmodule inv(input a, output y); // ```verilog is the fence\n"
    code += '  assign y = `MACRO; /* endmodule ``` */ initial $display("module");\nendmodule'
    assert code_of(f"<answer>\n```verilog\n{code}\n```\n</answer>") == code


def test_modules_in_several_fences_are_joined_in_order():
    assert code_of(f"{fence(INV)}\nand the top:\n{fence(TOP, 'sv')}") == f"{INV}\n\n{TOP}"
    defines = "`define WIDTH 8"
    assert code_of(f"{fence(defines)}\n{fence(TOP)}") == f"{defines}\n\n{TOP}"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (None, "no_response"),
        ("  ", "no_response"),
        (f"<think>never closed: {fence(INV)}", "unclosed_think"),
        (f"<think>a</think>b<think>c {fence(INV)}", "unclosed_think"),
        ("<think>x</think>", "no_module"),
        ("<think>x</think> I cannot do that.", "no_module"),
        (f"<think>{fence(INV)}</think><answer></answer>", "no_module"),
        (fence("assign y = ~a;"), "no_module"),
        (fence(TORN), "unbalanced_module"),
        (f"<answer>```verilog\n{TORN}", "unbalanced_module"),
        (f"{fence(INV)}\nlonger:\n```verilog\n{TORN}", "unbalanced_module"),
        (fence(INV + "\nendmodule"), "unbalanced_module"),
        (fence("module a; module b; endmodule endmodule"), "unbalanced_module"),
        (fence("// " + INV.replace("\n", " ")), "no_module"),
        (fence("module inv; /* begun\nendmodule"), "unterminated_comment"),
        (fence('module inv; initial $display("x);\nendmodule'), "unterminated_comment"),
        (fence(f"{INV}\n{INV}"), "conflicting_modules"),
        (f"{fence(INV + chr(10) + TOP)}\n{fence(DRAFT + ' module extra; endmodule')}", "conflicting_modules"),
    ],
)
def test_what_is_not_whole_is_dropped_with_its_reason(response, reason):
    with pytest.raises(RowDropped) as caught:
        code_of(response)
    assert caught.value.reason == reason


def test_shapes_of_columns():
    expected = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "Invert a."},
        {"role": "assistant", "content": fence(INV), "reasoning": "easy"},
    ]
    answer = f"<think>easy</think><answer>{fence(INV)}</answer>"
    chat = expected[:2]
    for row in [
        {"system": "Be exact.", "prompt": "Invert a.", "response": answer},
        {"system": "Be exact.", "prompt": "Invert a.", "answer": answer},
        {"system": "Be exact.", "question": "Invert a.", "response": answer},
        {"prompt": chat, "response": answer},
        {"system": "ignored: the prompt has its own", "prompt": chat, "answer": answer},
        {"prompt": chat, "response": [{"role": "assistant", "content": answer}]},
        {"prompt": [*chat, {"role": "assistant", "content": answer}]},
    ]:
        assert codev.to_messages(row) == expected
    assert codev.to_messages({"system": "", "prompt": "Invert a.", "answer": INV}) == [
        {"role": "user", "content": "Invert a."},
        {"role": "assistant", "content": fence(INV)},
    ]


@pytest.mark.parametrize("row", [{"response": INV}, {"prompt": " ", "response": INV}, {"prompt": [5], "response": INV}])
def test_rows_without_a_prompt_are_dropped(row):
    with pytest.raises(RowDropped, match="no_prompt"):
        codev.to_messages(row)


def test_what_was_thought_follows_the_policy(tiny_tokenizer):
    messages = codev.to_messages({"prompt": "Invert a.", "response": f"<think>easy</think>{fence(INV)}"})
    [dropped], [kept] = (
        ChatFormat(tiny_tokenizer, p).render(Conversation(messages)).answers for p in ("drop", "train")
    )
    assert "easy" not in dropped.prompt + dropped.text
    assert kept.text == f"<|channel>thought\neasy\n<channel|>{fence(INV)}<turn|>"


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="Icarus Verilog is not installed")
def test_syntax_check_rejects_what_iverilog_rejects():
    program = codev.find_iverilog()
    codev.check_syntax(INV, program)
    with pytest.raises(RowDropped, match="syntax_error"):
        codev.check_syntax(INV.replace("assign", "asign"), program)


def test_syntax_check_gives_up_on_endless_elaboration(monkeypatch, tmp_path):
    monkeypatch.setattr(codev, "SYNTAX_SECONDS", 0.2)
    stuck = tmp_path / "iverilog"
    stuck.write_text("#!/bin/sh\nsleep 60 &\nwait\n")
    stuck.chmod(0o755)
    with pytest.raises(RowDropped, match=r"no verdict in 0\.2 s"):
        codev.check_syntax(INV, str(stuck))


def test_syntax_check_without_the_simulator_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"data.check_syntax=true needs iverilog"):
        codev.find_iverilog()
