"""User errors without a traceback, and bugs with a traceback."""

import multiprocessing
import os
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackjax.data import packing
from stackjax.growth import Stack
from stackjax.runtime.errors import UserError, memory_used_by, one_line_errors


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
def test_user_errors_are_one_line_and_exit_code_2(fail, line, capsys):
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        fail()
    assert exit_info.value.code == 2
    assert capsys.readouterr() == ("", line)


def out_of_memory(fail, capsys) -> str:
    with (
        pytest.raises(SystemExit) as exit_info,
        one_line_errors(),
        memory_used_by(lambda: "stage 1, step 3"),
    ):
        fail()
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda: jnp.zeros(2**47), "Out of memory allocating 562949953421312 bytes"),
        (lambda: jax.jit(lambda: jnp.ones((2**22, 2**24)) + 1)(), "Out of memory allocating"),
        (lambda: np.zeros(2**50), "Unable to allocate 8.00 PiB for an array"),
    ],
    ids=["array", "program", "host"],
)
def test_out_of_memory_is_one_line_with_place_and_remedy(fail, message, capsys):
    line = out_of_memory(fail, capsys)
    assert line.startswith(f"error: out of memory in stage 1, step 3 ({message}")
    for field in ("stages.N.accumulate", "mesh.fsdp", "stages.N.remat", "batch_size"):
        assert field in line


def test_other_jax_errors_keep_the_traceback():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), one_line_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


def fail_as_a_user():
    raise UserError("data.path is 'x'; it must exist.")


def exit_at_once():
    os._exit(1)


def in_a_worker(fail):
    # Spawn, because a fork would copy locked JAX threads.
    with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(fail).result()


@pytest.mark.parametrize(
    ("fail", "line"),
    [
        (fail_as_a_user, "error: data.path is 'x'; it must exist.\n"),
        (exit_at_once, "error: a worker process was killed"),
    ],
)
def test_worker_process_errors_are_one_line(fail, line, capsys):
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        in_a_worker(fail)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(line)


def test_other_errors_keep_the_traceback():
    with pytest.raises(ValueError, match="invalid literal"), one_line_errors():
        int("text")
    # An invalid call inside stackjax is a bug, too.
    with pytest.raises(ValueError, match="one unknown dimension"), one_line_errors():
        packing.cut_records(np.zeros(5), -1)
    with pytest.raises(TypeError), one_line_errors():
        Stack("2" / 2)


def test_interrupt_is_one_line_and_exit_code_130(capsys):
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        raise KeyboardInterrupt
    assert exit_info.value.code == 128 + 2
    assert capsys.readouterr().err == "error: interrupted.\n"


def test_success_prints_nothing(capsys):
    with one_line_errors():
        pass
    assert capsys.readouterr() == ("", "")
