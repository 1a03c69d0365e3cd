"""A phase: model, trained layers, step count and learning rates."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.data.mixture import Mixture
from stackjax.growth import Growth, OptimizerState
from stackjax.growth.base import Fit, Reparameterization
from stackjax.growth.moment_starts import MomentStarts, learns
from stackjax.model.config import ModelConfig
from stackjax.model.transformer import LayerSpan, logical_axes
from stackjax.optimizers import Optimizer
from stackjax.sharding.axes import Axes
from stackjax.sharding.config import MeshConfig, MomentMemory
from stackjax.sharding.partition import auto_sharded, partition
from stackjax.training.learning_rate import LearningRate, ParameterRates
from stackjax.training.spikes import SpikeInputs

_ANY_RATE = LearningRate(
    shape="constant",
    peak=0.0,
    warmup_tokens=0.0,
    decay_start=0.0,
    decay_tokens=0.0,
    final_fraction=0.0,
    first_tokens=0.0,
    tokens_per_step=0.0,
)

_ANY_MIXTURE = Mixture(weights=(1.0,))


@dataclasses.dataclass(frozen=True)
class Counts:
    """Tokens, sequences and FLOPs consumed by a run so far."""

    tokens: int = 0
    examples: int = 0
    """Sequences; also the next sequence's index in the data order."""
    flops_6nd: int = 0
    """FLOPs as 6 x parameters x tokens (arXiv:2405.15319)."""
    flops: int = 0
    """FLOPs in matrix products."""

    def after(self, per_step: "Counts", steps: int = 1) -> "Counts":
        """Returns the counts after more steps, with `per_step` counts each."""
        mine, theirs = vars(self), vars(per_step)
        return Counts(**{name: mine[name] + steps * theirs[name] for name in mine})

    def since(self, before: "Counts") -> "Counts":
        """Returns the difference from earlier counts."""
        return Counts(**{name: vars(self)[name] - vars(before)[name] for name in vars(self)})

    def passes(self, every_tokens: int, before: "Counts") -> bool:
        """Returns whether the tokens reached a multiple of `every_tokens` since `before`."""
        return self.tokens // every_tokens > before.tokens // every_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waypoint:
    """A step and the run's counts after this step."""

    step: int
    counts: Counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A change by the user at a resume."""

    phase: int
    step: int
    """First step with the change."""
    tokens: int
    """The run's tokens at this step."""
    fields: tuple[str, ...]
    """Name, old value and new value for each changed config field."""
    resume_from: str = ""
    """Checkpoint to which the run went back; empty for the newest."""
    skip_examples: int = 0
    """Examples left out."""

    def __str__(self) -> str:
        parts = list(self.fields)
        if self.resume_from:
            parts.append(f"resumed from {self.resume_from}")
        if self.skip_examples:
            parts.append(f"{self.skip_examples:,} examples skipped")
        return f"at {self.tokens:,} tokens: {'; '.join(parts)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyEnd:
    """A stage's early end."""

    steps: int
    """Steps in the stage, fit included."""
    reason: str


class StepInputs(NamedTuple):
    """Inputs to a compiled train step besides state and batch."""

    learning_rate: LearningRate
    first_tokens: Any
    """`Phase.first_tokens`, a float32 scalar."""
    moment_starts: MomentStarts | None
    spikes: SpikeInputs | None = None
    """Limits and running statistics for loss spikes, new at every step; None without."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stage, or the fit before: one tree with trained parameters and one train step."""

    index: int
    """Position among all phases."""
    stage: int
    """Index of the stage."""
    fit: Fit | None
    """The fit of a growth operator's own parameters; None if the model trains."""
    source: ModelConfig
    """Model in the previous phase; for the first phase, the same model."""
    model: ModelConfig
    growth: Growth | None
    """Growth before step 0."""
    optimizer: Optimizer
    optimizer_state: OptimizerState
    """A fresh optimizer state, grown moments, or kept moments."""
    average_checkpoints: int
    """Last checkpoints of the previous phase whose mean parameters grow."""
    reparameterizations: tuple[Reparameterization, ...]
    """Functions from trained parameters to the model's parameters, such as masks."""
    trained_layers: tuple[bool, ...] | None
    """Trained layers; None for all parameters."""
    mesh: MeshConfig
    seq_len: int
    mixture: Mixture
    """Shares of the data's sources."""
    part: int
    """Position among the parts of a stage with different batches; each is a phase."""
    earlier_tokens: int
    """The stage's training tokens before step 0, in earlier parts."""
    batch_size: int
    accumulate: int
    moment_memory: MomentMemory
    num_steps: int
    learning_rate: LearningRate
    parameter_rates: ParameterRates | None
    """Learning-rate factors per parameter; None if all are 1."""
    moment_starts: MomentStarts | None
    """Starts for moments younger than the optimizer; None if there are none."""
    start: Counts
    """Counts before step 0."""
    per_step: Counts
    """Counts per step, from `waypoint` on."""
    waypoint: Waypoint
    """A step with known counts: step 0, or the newest resume with another batch size or skipped
    examples."""

    @property
    def name(self) -> Literal["fit", "train"]:
        """The name of the phase in its stage, in paths and in the lineage."""
        return "train" if self.fit is None else "fit"

    @property
    def directory(self) -> str:
        """Checkpoint directory, relative to the run directory."""
        part = f"_{self.part}" if self.part else ""
        return f"stage_{self.stage}/{self.name}{part}"

    @property
    def batch_field(self) -> str:
        """The config field that holds `batch_size` and `accumulate`."""
        step = f".batch_steps.{self.part - 1}" if self.part else ""
        return f"stages.{self.stage}{step}"

    def counts(self, step: int) -> Counts:
        """Returns the run's counts after a step; valid from the waypoint on."""
        return self.waypoint.counts.after(self.per_step, step - self.waypoint.step)

    @property
    def end(self) -> Counts:
        """Counts after the last step."""
        return self.counts(self.num_steps)

    @property
    def train_start(self) -> int:
        """The run's tokens before the stage's training; of a fit, before the fit."""
        return self.start.tokens - self.earlier_tokens

    @property
    def first_tokens(self) -> int:
        """The stage's training tokens, extrapolated to step 0 at the present batch size.

        After a step, the stage has `first_tokens + step * per_step.tokens` tokens. Perhaps
        negative, if the batch size changed within the phase.
        """
        return self.counts(0).tokens - self.train_start

    @property
    def stays_symmetric(self) -> bool:
        """Whether copied units stay equal because their gradients are always equal."""
        if self.growth is None or self.optimizer_state == "keep":
            return False
        rates = self.parameter_rates
        alike = rates is None or rates.rewarm is None
        return alike and self.growth.is_symmetric()

    @property
    def spans(self) -> list[LayerSpan] | None:
        """Scans over consecutive frozen or trained layers; None if all layers learn."""
        if self.trained_layers is None:
            return None
        return [
            LayerSpan(
                num_layers=len(list(run)),
                remat=self.model.remat,
                unroll=self.model.scan_unroll,
                trains=trains,
            )
            for trains, run in itertools.groupby(self.trained_layers)
        ]

    @property
    def program(self) -> "Phase":
        """The phase without position, length and step inputs: equal for equal train steps."""
        return dataclasses.replace(
            self,
            index=0,
            stage=0,
            growth=None,
            optimizer_state="reset",
            average_checkpoints=1,
            num_steps=0,
            learning_rate=_ANY_RATE,
            moment_starts=None,
            mixture=_ANY_MIXTURE,
            part=0,
            earlier_tokens=0,
            start=Counts(),
            waypoint=Waypoint(step=0, counts=Counts()),
        )

    def trains_model(self, step: int) -> bool:
        """Returns whether the trained parameters are the model's parameters after a step.

        True after all masks are open; never true during a fit.
        """
        tokens = self.first_tokens + step * self.per_step.tokens
        return all(
            tokens >= reparameterization.end_tokens
            for reparameterization in self.reparameterizations
        )

    @property
    def step_inputs(self) -> StepInputs:
        """Inputs for the compiled step, as NumPy arrays."""
        return StepInputs(
            learning_rate=jax.tree.map(np.float32, self.learning_rate),
            first_tokens=np.float32(self.first_tokens),
            moment_starts=self.moment_starts,
        )

    def tokens(
        self, step: jax.Array | int, first_tokens: jax.Array | float | None = None
    ) -> jax.Array:
        """Returns the stage's training tokens after a step, a float32 scalar."""
        if first_tokens is None:
            first_tokens = float(self.first_tokens)
        return first_tokens + jnp.asarray(step, jnp.float32) * float(self.per_step.tokens)

    def model_params(self, params: Any, tokens: jax.Array) -> Any:
        """Returns the model's parameters, made from the trained parameters.

        Args:
          tokens: Training tokens in the stage so far.
        """
        if not self.reparameterizations:
            return params
        axes = logical_axes(self.model)

        def apply(params: Any, tokens: jax.Array) -> Any:
            for reparameterization in self.reparameterizations:
                params = reparameterization.model_params(params, axes, tokens)
            return params

        layout = jax.tree.map(partition, axes, is_leaf=lambda node: isinstance(node, Axes))
        return auto_sharded(apply, layout)(params, tokens)

    def frozen(self) -> Any:
        """Returns the frozen entries per parameter, as booleans for broadcasting."""
        assert self.trained_layers is not None, "some layers do not learn"
        trained, has_tied_head = self.trained_layers, self.model.tie_head
        return jax.tree.map(
            lambda names: jnp.equal(learns(names, trained, has_tied_head=has_tied_head), 0),
            logical_axes(self.model),
            is_leaf=lambda node: isinstance(node, Axes),
        )

    def step_params(self, params: Any, updates: Any, rate: jax.Array, tokens: jax.Array) -> Any:
        """Returns the parameters after a step along the updates.

        Args:
          rate: The learning rate.
          tokens: Training tokens in the stage after the step.
        """
        if self.parameter_rates is None:
            return jax.tree.map(lambda p, update: p - rate * update, params, updates)
        factors = self.parameter_rates(logical_axes(self.model), tokens)
        return jax.tree.map(
            lambda p, update, factor: p - rate * factor * update, params, updates, factors
        )


def with_moment_starts(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """Returns the phases with their moment starts."""
    starts, updates, found = MomentStarts(), 0, [*phases[:1]]
    for before, phase in itertools.pairwise(phases):
        updates += before.num_steps
        if phase.optimizer_state == "reset":
            starts, updates = MomentStarts(), 0
        elif before.trained_layers is not None and not phase.part:
            starts = starts.after_freezing(
                before.trained_layers,
                updates,
                has_frozen_embedding=not before.model.tie_head,
                has_positions=before.model.positions == "learned",
            )
        if phase.optimizer_state != "reset" and phase.growth is not None:
            keeps = phase.optimizer_state == "keep"
            starts = starts.after_growth(phase.growth, phase.source, updates, keeps=keeps)
        known = None if starts == MomentStarts() else starts
        found.append(dataclasses.replace(phase, moment_starts=known))
    return tuple(found)
