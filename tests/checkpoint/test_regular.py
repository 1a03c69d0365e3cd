"""Regular checkpoints: counted in advance, and found among all saved steps."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
from conftest import phase_of, tiny_model
from etils import epath
from test_save import saved_steps

from stackjax.checkpoint.regular import num_regular, regular_steps
from stackjax.config import CheckpointConfig
from stackjax.training.phase import Counts, Waypoint

NOWHERE = epath.Path("nowhere")


def phase_from(tokens, num_steps=10, per_step=64):
    start = Counts(tokens=tokens)
    return phase_of(
        tiny_model(),
        start=start,
        waypoint=Waypoint(step=0, counts=start),
        num_steps=num_steps,
        per_step=Counts(tokens=per_step),
    )


@hypothesis.given(
    st.integers(0, 500), st.integers(0, 30), st.integers(1, 99), st.integers(1, 300)
)
def test_regular_steps_are_first_past_multiples_and_the_end(tokens, num_steps, per_step, every):
    phase, steps = phase_from(tokens, num_steps, per_step), range(num_steps + 1)
    found = regular_steps(NOWHERE, phase, every, steps)
    due = [phase.counts(n).passes(every, phase.counts(n - 1)) for n in steps[1:]]
    assert found == [n for n in steps[1:] if due[n - 1] or n == num_steps]
    assert num_regular(phase, every) == len(found)


# A step has 64 tokens, and a checkpoint is due every 128 tokens: after every second step.
SAVED = {
    "uninterrupted": ([2, 4, 6], [2, 4, 6]),
    "first state": ([0, 2, 4], [2, 4]),
    "first state alone": ([0], []),
    "stopped": ([2, 3, 4, 5, 6], [2, 4, 6]),
    "stopped at once": ([1, 2], [2]),
    "at the end": ([2, 4, 5], [2, 4, 5]),
    "none": ([], []),
}


@pytest.mark.parametrize("name", SAVED)
def test_checkpoints_saved_at_a_stop_are_not_regular(name):
    steps, regular = SAVED[name]
    assert regular_steps(NOWHERE, phase_from(0), 128, steps) == regular


def test_tokens_before_a_change_are_read_from_the_checkpoints(tmp_path):
    directory, phase = epath.Path(tmp_path), phase_from(0)
    config = CheckpointConfig(every_tokens=128, keep_last=9)
    saved_steps(directory, config, [2, 3, 4], phase, phase.counts)
    # Twice the batch from step 4 on; extrapolated back, step 2 would have 0 tokens.
    waypoint = Waypoint(step=4, counts=phase.counts(4))
    wider = dataclasses.replace(phase, waypoint=waypoint, per_step=Counts(tokens=128))
    found = regular_steps(directory / phase.directory, wider, 128, [2, 3, 4, 5])
    assert found == [2, 4, 5]


def test_stop_does_not_replace_a_regular_checkpoint(tmp_path):
    config = CheckpointConfig(every_tokens=128, keep_last=2)
    left = saved_steps(epath.Path(tmp_path), config, [2, 4, 5, 6], phase_from(0))
    assert left == [4, 5, 6]
    left = saved_steps(epath.Path(tmp_path), config, [7, 8], phase_from(0))
    assert left == [6, 7, 8]
