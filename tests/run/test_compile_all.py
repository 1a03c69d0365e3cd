"""All phases are compiled before the first token; a step that does not fit is refused."""

import dataclasses
import types

import pytest
from conftest import phase_of, tiny_model, tiny_run

from stackjax.run import compile_all as module
from stackjax.run import train as run_module
from stackjax.run.compile_all import compile_all
from stackjax.run.progress import Progress
from stackjax.run.train import train
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand
from stackjax.training.program_memory import program_memory

GIB = 2**30


class Steps:
    """Compiled steps of 1 + stage GiB; the order of their compilation; and all notes."""

    def __init__(self):
        self.compiled, self.notes = [], []
        self.note = self.notes.append

    def __call__(self, phase, following):
        self.compiled.append(phase.index)
        return types.SimpleNamespace(memory_analysis=lambda: memory((1 + phase.stage) * GIB))


def memory(temporaries, arguments=0, outputs=0, aliases=0, peak=0):
    """A compiler's statement about memory."""
    return types.SimpleNamespace(
        argument_size_in_bytes=arguments,
        temp_size_in_bytes=temporaries,
        output_size_in_bytes=outputs,
        alias_size_in_bytes=aliases,
        peak_memory_in_bytes=peak,
    )


def at(index, step=None):
    """A position in the tiny run, whose two phases have one model each."""
    phases = expand(tiny_run())
    return types.SimpleNamespace(phases=phases, phase=phases[index], step=step)


@pytest.mark.parametrize(
    ("position", "compiled"),
    [(at(0), [1, 0]), (at(0, 3), [1, 0]), (at(0, 10), [1]), (at(1, 3), [1])],
    ids=["new", "resumed", "at the seam", "in the last phase"],
)
def test_remaining_phases_are_compiled_and_the_present_phase_last(position, compiled):
    steps = Steps()
    compile_all(position, steps, steps, None)
    assert steps.compiled == compiled
    assert [note.split(",")[0] for note in steps.notes] == [f"stage {i}" for i in compiled]


def test_equal_programs_are_compiled_once():
    phase, steps = phase_of(tiny_model()), Steps()
    twice = (phase, dataclasses.replace(phase, index=1, num_steps=7))
    compile_all(types.SimpleNamespace(phases=twice, phase=phase, step=None), steps, steps, None)
    assert len(steps.compiled) == 1


def test_step_larger_than_a_device_is_refused():
    compile_all(at(0), Steps(), Progress(), 2 * GIB)
    with pytest.raises(
        UserError, match=r"stages\.1: .*2\.00 GiB.*2\.00 GiB.*accumulate than 2"
    ):
        compile_all(at(0), Steps(), Progress(), 2 * GIB - 1)


def test_stop_signal_ends_the_compilations():
    with pytest.raises(SystemExit) as exit_info:
        compile_all(at(0), lambda *_: None, Progress(), None)
    assert exit_info.value.code == 143


@pytest.mark.parametrize(("platform", "peak"), [("tpu", 20), ("gpu", 25), ("cpu", 25)])
def test_peak_is_stated_by_tpu_compilers_and_a_sum_elsewhere(platform, peak):
    said = memory(10, arguments=12, outputs=8, aliases=5, peak=20)
    step = types.SimpleNamespace(memory_analysis=lambda: said)
    found = program_memory(step, platform)
    assert (found.arguments, found.temporaries, found.peak) == (12, 10, peak)


def test_dry_run_shows_each_phase_and_leaves_no_run(world, tmp_path, capsys):
    config = world.config(workdir=tmp_path)
    train(config, dry_run=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "GiB" in line]
    assert [line.split(",")[0] for line in lines] == ["stage 1", "stage 0"]
    assert {path.name for path in tmp_path.iterdir()} <= {"run.lock", "compilation_cache"}


def test_accelerator_refuses_a_step_that_does_not_fit_before_training(
    world, tmp_path, monkeypatch
):
    config = world.config(workdir=tmp_path)
    monkeypatch.setattr(run_module, "platform_of", lambda _: "gpu")
    monkeypatch.setattr(run_module, "device_memory", lambda: 10 * GIB)
    monkeypatch.setattr(
        module,
        "program_memory",
        lambda *_: program_memory(
            Steps()(types.SimpleNamespace(index=0, stage=10), None), "gpu"
        ),
    )
    with pytest.raises(UserError, match=r"stages\.1: .*11\.00 GiB.*10\.00 GiB"):
        train(config)
    assert not (tmp_path / "config.json").exists()
