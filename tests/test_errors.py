"""A user's mistake ends in one line; a fault of the code keeps its traceback."""

import numpy as np
import pytest

from stackjax.data import packing
from stackjax.errors import one_line_errors
from stackjax.growth import Stack


def fail_in_the_package():
    Stack(factor=0)


def fail_on_disk():
    raise PermissionError(13, "Permission denied", "/runs")


def fail_in_a_bucket():
    raise OSError("Forbidden: b/bucket\nno access")


def diverge():
    raise FloatingPointError("loss nan")


@pytest.mark.parametrize(
    ("fail", "line"),
    [
        (
            fail_in_the_package,
            "error: stack.factor is 0; it must be at least 1 and at most 1000.\n",
        ),
        (fail_on_disk, "error: [Errno 13] Permission denied: '/runs'\n"),
        (fail_in_a_bucket, "error: Forbidden: b/bucket no access\n"),
        (diverge, "error: loss nan\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(fail, line, capsys):
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        fail()
    assert exit_info.value.code == 2
    assert capsys.readouterr() == ("", line)


def test_errors_of_other_code_keep_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"), one_line_errors():
        int("nothing of ours")
    # Also where our own code caused them: that is a bug.
    with pytest.raises(ValueError, match="one unknown dimension"), one_line_errors():
        packing.cut_records(np.zeros(5), -1)
    with pytest.raises(TypeError), one_line_errors():
        Stack("2" / 2)


def test_an_interrupt_is_one_line_and_the_exit_code_of_the_signal(capsys):
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        raise KeyboardInterrupt
    assert exit_info.value.code == 128 + 2
    assert capsys.readouterr().err == "error: interrupted.\n"


def test_without_an_error_nothing_happens(capsys):
    with one_line_errors():
        pass
    assert capsys.readouterr() == ("", "")
