"""Probes measure the losses of real growth and do not change the run."""

import dataclasses

import jax
import numpy as np
import pytest
from runs import last_state, rarely_saved, rows

from stackjax.config import ProbeConfig, Schedule
from stackjax.growth import Learn
from stackjax.run import compile_ahead
from stackjax.run.growth_probe import check_probes
from stackjax.run.train import train
from stackjax.sharding.config import MeshConfig

STEP = 128


def run(world, workdir, *, first=8, axis="stage", mesh=None, moments="reset", **probes):
    """A run evaluated every two steps; rates do not depend on the first stage's length."""
    config = world.config("--evaluation.every-tokens", str(2 * STEP), workdir=workdir)
    small, large = config.stages
    of_small = Schedule(horizon_tokens=16 * STEP, axis=axis)
    small = dataclasses.replace(small, tokens=first * STEP, schedule=of_small)
    large = dataclasses.replace(large, mesh=mesh, schedule=of_small, optimizer_state=moments)
    probes = ProbeConfig(**probes)
    return rarely_saved(dataclasses.replace(config, stages=(small, large), probes=probes))


def of_kind(workdir, kind):
    return [row for row in rows(workdir) if row["kind"] == kind]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("axis", "mesh", "moments"),
    # The bias correction of kept moments starts at growth.
    [("run", None, "keep"), ("stage", MeshConfig(tensor=2), "reset")],
)
def test_probe_losses_equal_losses_of_real_growth(world, tmp_path, axis, mesh, moments):
    probing, growing = tmp_path / "probing", tmp_path / "growing"
    at = {"at_tokens": (4 * STEP,), "lag_tokens": 2 * STEP}
    alike = {"axis": axis, "mesh": mesh, "moments": moments}
    train(run(world, probing, **alike, **at))
    train(run(world, growing, **alike, first=4))
    [probe], [seam] = of_kind(probing, "probe"), of_kind(growing, "growth")
    [lagged] = [row for row in of_kind(growing, "evaluation") if row["tokens"] == 6 * STEP]
    assert (probe["tokens"], probe["lag_tokens"]) == (4 * STEP, 2 * STEP)
    assert probe["loss_before"] == seam["held_out_loss_before"]
    assert probe["loss_grown"] == seam["held_out_loss"]
    assert probe["loss_lagged"] == lagged["held_out_loss"]
    assert probe["lag_flops_6nd"] == lagged["flops_6nd"] - seam["flops_6nd"]


def test_probes_compile_no_step_of_their_own_and_do_not_change_the_run(
    world, tmp_path, monkeypatch
):
    plain, probing = tmp_path / "plain", tmp_path / "probing"
    train(run(world, plain))
    compiled, compile_step = [], compile_ahead.compile_step

    def counted(config, phase):
        compiled.append(phase.index)
        return compile_step(config, phase)

    monkeypatch.setattr(compile_ahead, "compile_step", counted)
    train(run(world, probing, at_tokens=(3 * STEP, 5 * STEP + 1), lag_tokens=STEP))
    assert compiled == [0, 1]
    found = rows(probing)
    # A probe inside a step is due after the step.
    tokens = [row["tokens"] for row in found if row["kind"] == "probe"]
    assert tokens == [3 * STEP, 6 * STEP]
    assert [row for row in found if row["kind"] != "probe"] == rows(plain)
    for stage in (0, 1):
        states = [last_state(path, stage) for path in (plain, probing)]
        jax.tree.map(np.testing.assert_array_equal, *states)


REFUSED = {
    "no lag": (ProbeConfig(at_tokens=(STEP,)), "probes.lag_tokens is None"),
    "after the growth": (
        ProbeConfig(at_tokens=(9 * STEP,), lag_tokens=STEP),
        "probes.at_tokens has 1,152",
    ),
    "at the growth": (
        ProbeConfig(at_tokens=(8 * STEP,), lag_tokens=STEP),
        "at_tokens has 1,024",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_probes_without_growth_are_refused(world, name):
    probes, message = REFUSED[name]
    config = dataclasses.replace(world.config(), probes=probes)
    with pytest.raises(ValueError, match=message):
        check_probes(config)


def test_learned_growth_is_not_probed(world):
    config = world.config()
    small, large = config.stages
    stages = (small, dataclasses.replace(large, growth=Learn(2, fit_steps=2)))
    probes = ProbeConfig(at_tokens=(STEP,), lag_tokens=STEP)
    config = dataclasses.replace(config, stages=stages, probes=probes)
    with pytest.raises(ValueError, match=r"stages.1 grows by learn\("):
        check_probes(config)


def test_probes_on_the_command_line(world):
    args = ["--probes.at-tokens", "2.56e2", "512", "--probes.lag-tokens", "1e3"]
    assert world.config(*args).probes == ProbeConfig(at_tokens=(256, 512), lag_tokens=1000)
