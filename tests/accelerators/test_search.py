"""The search for the fastest choice that fits, against all choices of a made-up machine."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import tiny_run

from stackjax.accelerators import fit as fit_module
from stackjax.accelerators import search as search_module
from stackjax.accelerators.bounds import Bounds
from stackjax.accelerators.choice_file import choice_file
from stackjax.accelerators.devices import parse_devices
from stackjax.accelerators.measure import Machine, Measured
from stackjax.accelerators.search import Choice, search, with_choices
from stackjax.config import BatchStep, Stage
from stackjax.config_file import read_config
from stackjax.options import FitConfig
from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MeshConfig

SAVED = {"none": 16, "dots": 8, "lean": 5, "full": 1}
"""Activations of a policy."""
COMPUTED = {"none": 1.0, "dots": 1.1, "lean": 1.2, "full": 1.4}
"""Time of a policy's products."""


def costs(choice):
    """Memory and seconds of a choice: fewer shards gather less and need more memory."""
    mesh = choice.mesh
    shards = mesh.fsdp * mesh.context
    rows = 64 / (mesh.replica * mesh.fsdp * mesh.context * choice.accumulate)
    state = {"device": 800, "host": 270}[choice.moment_memory]
    memory = (state / shards + rows * SAVED[choice.remat]) / mesh.tensor
    gathers = 0.02 * choice.accumulate * (shards - 1) / mesh.tensor
    exchanges = 0.1 * (mesh.tensor - 1) + 0.2 * (mesh.context - 1)
    return memory, COMPUTED[choice.remat] + gathers + exchanges


def measured(choice, memory):
    peak, seconds = costs(choice)
    return Measured(
        name="step",
        compute_dtype="bfloat16",
        attention="xla",
        attention_reason="",
        compile_seconds=1.0,
        usable_bytes=memory,
        argument_bytes=0,
        peak_bytes=round(peak),
        bounds=Bounds(flops=0, memory=0, wire=0, estimate=seconds),
        mfu=0.5,
    )


FITS = measured(Choice(MeshConfig(replica=1, fsdp=8), 1, "none", 512), 10**6)


@pytest.fixture
def made_up(monkeypatch):
    """A machine with costs as above, on which every choice divides the batch."""

    def make(memory):
        monkeypatch.setattr(
            search_module,
            "_measure_stage",
            lambda config, stage, choice, machine: measured(choice, memory),
        )
        monkeypatch.setattr(
            search_module,
            "_is_possible",
            lambda config, stage, choice, machine: choice.accumulate * choice.mesh.fsdp <= 64,
        )
        return Machine(group=parse_devices("h100:8"), devices=jax.devices(), memory=memory)

    return make


MESHES = [
    MeshConfig(
        replica=8 // (fsdp * context * tensor), fsdp=fsdp, context=context, tensor=tensor
    )
    for context, tensor, fsdp in itertools.product((1, 2, 4, 8), repeat=3)
    if fsdp * context * tensor <= 8
]


@pytest.mark.parametrize("memory", [110, 120, 150, 200, 300, 500, 900, 2000])
def test_search_finds_the_fastest_choice_that_fits(made_up, memory):
    lines = []
    found = search(tiny_run(), made_up(memory), lines.append)
    assert len(found) == 2 and found[0] == found[1]
    everything = [
        Choice(mesh=mesh, accumulate=accumulate, remat=remat, loss_chunk=512)
        for mesh, accumulate, remat in itertools.product(
            MESHES, (1, 2, 4, 8, 16, 32, 64), SAVED
        )
        if accumulate * mesh.fsdp <= 64
    ]
    fastest = min(costs(choice)[1] for choice in everything if costs(choice)[0] <= memory)
    assert costs(found[0])[1] == pytest.approx(fastest)
    assert len(lines) < len(everything), "both stages take less than all choices of one"


def test_moments_move_to_the_host_only_if_nothing_else_fits(made_up):
    for memory, place in ((110, "device"), (90, "host")):
        found = search(tiny_run(), made_up(memory), lambda line: None)
        assert {choice.moment_memory for choice in found} == {place}
    assert str(found[0]).endswith(", moments on the host")


def test_stage_that_fits_with_no_choice_is_refused(made_up):
    with pytest.raises(UserError, match=r"stages\.0 does not fit h100:8 .* more devices"):
        search(tiny_run(), made_up(30), lambda line: None)


def test_stage_with_several_batches_is_refused():
    machine = Machine(group=parse_devices("h100:8"), devices=jax.devices(), memory=10**12)
    stage = Stage(
        tokens=640, batch_size=8, batch_steps=(BatchStep(from_tokens=64, batch_size=16),)
    )
    with pytest.raises(UserError, match=r"stages\.0 has batch_steps, and the search"):
        search(tiny_run(stages=(stage,)), machine, print)


def test_other_stages_need_not_fit_before_their_own_search(monkeypatch):
    config = tiny_run()
    wrong = dataclasses.replace(config.stages[1], accumulate=7)
    config = dataclasses.replace(config, stages=(config.stages[0], wrong))
    monkeypatch.setattr(search_module, "measure", lambda config, program, machine: FITS)
    machine = Machine(group=parse_devices("h100:8"), devices=jax.devices(), memory=10**12)
    assert [choice.accumulate for choice in search(config, machine, lambda line: None)] == [
        1,
        1,
    ]


def test_batch_that_divides_on_no_mesh_is_named(monkeypatch):
    config = tiny_run()
    odd = dataclasses.replace(config.stages[0], batch_size=7)
    data = dataclasses.replace(config.data, seq_len=7)
    config = dataclasses.replace(config, data=data, stages=(odd, config.stages[1]))
    machine = Machine(group=parse_devices("h100:8"), devices=jax.devices(), memory=10**12)
    with pytest.raises(UserError, match=r"stages\.0\.batch_size is 7"):
        search(config, machine, lambda line: None)


CHOICES = [
    Choice(mesh=MESHES[0], accumulate=2, remat="lean", loss_chunk=2048),
    Choice(mesh=MESHES[1], accumulate=1, remat="none", loss_chunk=512),
]


@pytest.fixture
def source(tmp_path):
    """A config file."""
    path = tmp_path / "run.py"
    path.write_text(Path("configs/tiny.py").read_text())
    return path


def test_written_config_has_the_choices(source, tmp_path):
    target = tmp_path / "found.py"
    target.write_text(choice_file(source, target, "h100:8", CHOICES))
    assert read_config(target) == with_choices(read_config(source), CHOICES)
    assert read_config(target).stages[0].remat == "lean"
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "96", target]
    assert subprocess.run(ruff, capture_output=True, check=False).returncode == 0


def test_fit_reports_the_run_as_found_and_writes_it(monkeypatch, source, made_up, tmp_path):
    reported = []
    monkeypatch.setattr(fit_module, "describe_machine", lambda *_: made_up(150))
    monkeypatch.setattr(fit_module, "check_backend", lambda config, device: None)
    monkeypatch.setattr(fit_module, "search", lambda config, machine, show: CHOICES)
    monkeypatch.setattr(
        fit_module,
        "programs",
        lambda config, phases: reported.extend(phase.model.remat for phase in phases) or [],
    )
    options = FitConfig(devices="h100:8", search=True, write=tmp_path / "found.py")
    fit_module.fit(read_config(source), options, source)
    assert reported == ["lean", "none"]
    assert read_config(tmp_path / "found.py") == with_choices(read_config(source), CHOICES)
    with pytest.raises(UserError, match="which exists already"):
        fit_module.fit(read_config(source), options, source)


@pytest.mark.parametrize(
    ("write", "seed", "message"),
    [("new/found.py", None, "does not exist"), ("found.py", 5, "cannot be overridden")],
)
def test_config_that_cannot_be_written_is_refused_before_the_search(
    source, tmp_path, write, seed, message
):
    config = read_config(source)
    if seed is not None:
        config = dataclasses.replace(config, seed=seed)
    options = FitConfig(devices="h100:8", search=True, write=tmp_path / write)
    with pytest.raises(UserError, match=message):
        fit_module.fit(config, options, source)
