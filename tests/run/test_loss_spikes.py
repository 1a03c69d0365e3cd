"""Runs skip loss spikes or stop at them, and resume to the same bits."""

import jax
import numpy as np
import pytest
from runs import last_state, rows

from stackjax.run.hooks import Hook
from stackjax.run.train import train

# Nearly half of all steps are spikes.
SKIP = ("--spikes.action", "skip", "--spikes.deviations", "0.01", "--spikes.window-steps", "2")


class Killed(Exception):
    """The process dies."""


def die(step):
    raise Killed


@pytest.mark.slow
def test_run_with_skipped_steps_resumes_bit_for_bit(world, tmp_path):
    whole, cut = (world.config(*SKIP, workdir=tmp_path / name) for name in "ab")
    train(whole)
    killer = Hook(kind="killer", when=lambda step: step.counts.tokens == 7 * 128, on_step=die)
    with pytest.raises(Killed):
        train(cut, hooks=[killer])
    train(cut)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    states = [last_state(tmp_path / name, 1) for name in "ab"]
    jax.tree.map(np.testing.assert_array_equal, *states)
    found = [row for row in rows(tmp_path / "a") if row["kind"] == "spike"]
    assert found
    # The statistics start anew in each stage.
    assert all(row["step"] > 2 for row in found)
    for row in found:
        assert row["loss"] > row["loss_limit"] or row["grad_norm"] > row["grad_norm_limit"]


def test_run_stops_at_a_spike(world, tmp_path):
    config = world.config(*SKIP, "--spikes.action", "stop", workdir=tmp_path)
    with pytest.raises(FloatingPointError, match=r"spikes.action is 'stop'.*was not taken"):
        train(config)
    assert rows(tmp_path)[-1]["kind"] == "spike"
