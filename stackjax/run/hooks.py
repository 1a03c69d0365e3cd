"""Hooks: functions called at chosen training steps. Each result becomes a metrics row.

A hook for the weights' norm, measured every 10 million tokens:

    def weight_norm(step):
        return {"weight_norm": optax.tree.norm(step.params)}

    train(config, hooks=[Hook(kind="weights", when=every(10_000_000), on_step=weight_norm)])

Every process calls every hook at the same steps; process 0 alone writes the rows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from jax.sharding import Mesh

from stackjax.data.batch import Batch
from stackjax.model import Params
from stackjax.run.run import Run
from stackjax.run.sinks import plain_values
from stackjax.run.validation import model_params, validation_batches, with_length
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Counts, Phase
from stackjax.training.train_state import TrainState

BUILT_IN_KINDS = (
    *("train", "evaluation", "layers", "growth", "probe", "tasks", "trigger", "change"),
    *("goodput", "spike", "late"),
)


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """A finished training step, as hooks see it."""

    run: Run
    phase_index: int
    mesh: Mesh
    step: int
    """Steps in the phase so far, including this step."""
    counts: Counts
    """The run's tokens, examples and FLOPs after the step."""
    state: TrainState
    """The state after the step; valid until the next step."""

    @property
    def phase(self) -> Phase:
        """The phase, as long as currently known: early stopping shortens a phase."""
        return self.run.phases[self.phase_index]

    @property
    def before(self) -> Counts:
        """The run's tokens, examples and FLOPs before the step."""
        return self.counts.since(self.phase.per_step)

    @property
    def params(self) -> Params:
        """The model's parameters after the step, with masks and learned maps applied."""
        return model_params(self.phase, self.state)

    def validation_batches(self) -> Iterator[Batch]:
        """Returns the validation batches `[1, B, T]`, on the devices."""
        sources = with_length(self.run.validation, self.phase.seq_len)
        return itertools.chain.from_iterable(
            validation_batches(self.run.config, source, self.mesh) for source in sources
        )

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping has shortened this stage, now or before a restart."""
        return self.phase.stage in self.run.history.ended

    @property
    def ends_phase(self) -> bool:
        """Whether this is the phase's last step."""
        return self.step == self.phase.num_steps

    @property
    def ends_run(self) -> bool:
        """Whether this is the run's last step."""
        return self.ends_phase and self.phase_index == len(self.run.phases) - 1

    def reaches_multiple(self, tokens: int) -> bool:
        """Returns whether the run's tokens reached a multiple of `tokens` in this step."""
        return self.counts.passes(tokens, self.before)

    def write(self, kind: str, values: Mapping[str, Any], note: str = "") -> None:
        """Writes a metrics row, and shows a note on the terminal."""
        self.run.write(kind, self.phase, self.step, self.counts, **values)
        if note:
            self.run.progress.note(f"{self.counts.tokens:,} tokens: {note}")

    def end_stage(self, reason: str) -> None:
        """Ends the stage after this step.

        The decision is on disk before the step is saved, so a killed run ends the stage at the
        same step. No effect while growth is fitted or masks open, or in a stage whose end is
        already decided.
        """
        phase = self.phase
        if self.stopped_early or self.ends_phase or not phase.trains_model(self.step):
            return
        self.run.commit(self.run.ended_at(phase, self.step, reason))


def every(tokens: int) -> Callable[[StepInfo], bool]:
    """Returns a condition that holds every `tokens` tokens, and when the run ends."""
    return lambda step: step.reaches_multiple(tokens) or step.ends_run


def describe_numbers(values: Mapping[str, Any]) -> str:
    """Returns a row's numbers as text, without standard errors."""
    numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
    return ", ".join(f"{name} {v:.4g}" for name, v in numbers.items() if "_stderr" not in name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hook:
    """A function that measures something after some training steps."""

    kind: str
    """The `kind` in the hook's rows."""
    when: Callable[[StepInfo], bool]
    """Whether to call the hook after a step, such as `every(10_000_000)`."""
    on_step: Callable[[StepInfo], Mapping[str, Any]]
    """Returns a row's values: numbers, arrays, lists or None. An empty result writes no row."""
    describe: Callable[[Mapping[str, Any]], str] = describe_numbers
    """Returns the row's values as text for the terminal."""


def check_hooks(hooks: Sequence[Hook]) -> None:
    """Raises UserError if a hook's kind is already in use."""
    kinds = [*BUILT_IN_KINDS, *(hook.kind for hook in hooks)]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UserError(f"kind of a hook is {kind!r}, as in other rows; rename the hook.")


def run_hooks(
    hooks: Sequence[Hook], step: StepInfo, paused: Callable[[], AbstractContextManager[None]]
) -> None:
    """Calls every hook that is due after a step, and writes the hooks' rows.

    Args:
      paused: Stops the tokens/s clock.
    """
    for hook in hooks:
        if hook.when(step):
            with paused():
                values = plain_values(hook.on_step(step))
            if values:
                step.write(hook.kind, values, hook.describe(values))
