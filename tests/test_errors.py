"""How every entry point ends."""

import pytest

from gemma4_tpu.errors import INTERRUPTED, REFUSED, UserError, exit_code, first_line


def raising(error: BaseException):
    def run() -> int:
        raise error

    return run


def test_refusals_and_interruptions_are_one_message_and_other_errors_stay(capsys):
    assert exit_code(lambda: 7) == 7
    assert exit_code(raising(UserError("lora.rank=0: at least 1"))) == REFUSED
    assert capsys.readouterr() == ("", "error: lora.rank=0: at least 1\n")
    assert exit_code(raising(KeyboardInterrupt()), interrupted="interrupted; the same command goes on") == INTERRUPTED
    assert capsys.readouterr() == ("", "\ninterrupted; the same command goes on\n")
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        exit_code(lambda: 1 // 0)


def test_a_record_has_one_line_of_an_error():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError()"
