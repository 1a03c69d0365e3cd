"""Regular checkpoints: at intervals and at the end of a phase, as an uninterrupted run has.

A signal to stop saves a checkpoint at any other step.
"""

from collections.abc import Collection

from etils import epath

from stackjax.checkpoint.restore import read_contents
from stackjax.training.phase import Phase


def num_regular(phase: Phase, every_tokens: int) -> int:
    """Returns how many regular checkpoints a whole phase has, without the first state."""
    if phase.num_steps == 0:
        return 0
    before_end = phase.num_steps - 1
    last, first = phase.counts(before_end).tokens, phase.start.tokens
    return 1 + min(before_end, last // every_tokens - first // every_tokens)


def regular_steps(
    directory: epath.Path, phase: Phase, every_tokens: int, steps: Collection[int]
) -> list[int]:
    """Returns the steps with a regular checkpoint, in order, without step 0.

    Args:
      directory: The phase's checkpoints.
      every_tokens: The interval; the first checkpoint past each multiple is regular.
      steps: All saved steps. The newest counts as the end of the phase.
    """
    first = {phase.start.tokens // every_tokens: 0}
    for step in sorted(steps):
        first.setdefault(_tokens(directory, phase, step) // every_tokens, step)
    return sorted({*first.values(), max(steps, default=0)} - {0})


def _tokens(directory: epath.Path, phase: Phase, step: int) -> int:
    """Returns the run's tokens after a saved step."""
    if step >= phase.waypoint.step:
        return phase.counts(step).tokens
    return read_contents(directory / str(step)).counts.tokens
