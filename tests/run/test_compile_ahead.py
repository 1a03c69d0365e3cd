"""Background compilation: neither a signal nor an exit waits for the compiler."""

import os
import threading
import time

import pytest
from conftest import phase_of, tiny_model, tiny_run

from stackjax.run import compile_ahead as module
from stackjax.run.compile_ahead import compile_ahead, ends_while_compiling
from stackjax.runtime.errors import UserError, one_line_errors


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that runs until the event is set."""
    finish = threading.Event()
    monkeypatch.setattr(module, "compile_step", lambda config, phase: finish.wait() and phase)
    yield finish
    finish.set()
    for thread in threading.enumerate():
        if thread.name == "compiling":
            thread.join()


class Ended(BaseException):
    """The process has exited with a code."""


@pytest.fixture
def ended(monkeypatch):
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)


def test_stop_signal_does_not_wait_for_compiler(compiler):
    stop, phase = threading.Event(), phase_of(tiny_model())
    step_of = compile_ahead(tiny_run(), stop)
    threading.Timer(0.1, stop.set).start()
    start = time.monotonic()
    assert step_of(phase, None) is None
    assert time.monotonic() - start < 5
    compiler.set()
    assert step_of(phase, None) == phase


def fail():
    raise UserError("the disk is full.")


def is_a_bug():
    raise TypeError("a bug")


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (fail, 2, "error: the disk is full.\n"),
        (is_a_bug, 1, "TypeError: a bug\n"),
        (lambda: None, 0, ""),
    ],
)
def test_process_exits_while_compiling(compiler, ended, capsys, body, code, said):
    stop = threading.Event()
    stop.set()
    compile_ahead(tiny_run(), stop)(phase_of(tiny_model()), None)
    with pytest.raises(Ended) as exit_info, ends_while_compiling(), one_line_errors():
        body()
    assert exit_info.value.args == (code,)
    assert capsys.readouterr().err.endswith(said)


def test_process_exits_normally_without_compilation(ended, capsys):
    with pytest.raises(SystemExit, match="2"), ends_while_compiling(), one_line_errors():
        fail()
    with pytest.raises(TypeError), ends_while_compiling(), one_line_errors():
        is_a_bug()
    with ends_while_compiling():
        pass
    assert capsys.readouterr().err == "error: the disk is full.\n"


def test_compiler_errors_are_raised_to_the_caller(monkeypatch):
    monkeypatch.setattr(module, "compile_step", lambda config, phase: fail())
    with pytest.raises(UserError, match="the disk is full"):
        compile_ahead(tiny_run(), threading.Event())(phase_of(tiny_model()), None)
