"""A phase of a run: which model runs, what of it trains, for how long, and how fast."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from stackjax.growth import Growth
from stackjax.growth.base import Reparameterisation
from stackjax.growth.masked import Mask
from stackjax.growth.moment_starts import Births, learns
from stackjax.model.config import ModelConfig
from stackjax.model.transformer import LayerSpan, logical_axes
from stackjax.sharding.axes import Axes
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.partition import laid_out, partition
from stackjax.training.optimizer import LearningRate, ParameterRates


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a run has consumed, over all its stages; whole numbers of any size."""

    tokens: int = 0
    examples: int = 0
    """Sequences; the index of the next one in the order of the data."""
    flops_6nd: int = 0
    """FLOPs by 6 x parameters x tokens, as arXiv:2405.15319 counts."""
    flops: int = 0
    """FLOPs of the matrix products."""

    def after(self, per_step: "Counts", steps: int = 1) -> "Counts":
        """Returns the counts after `steps` steps of `per_step` each."""
        mine, theirs = vars(self), vars(per_step)
        return Counts(**{name: mine[name] + steps * theirs[name] for name in mine})

    def since(self, before: "Counts") -> "Counts":
        """Returns what was consumed between two counts."""
        return Counts(**{name: vars(self)[name] - vars(before)[name] for name in vars(self)})

    def passes(self, every_tokens: int, before: "Counts") -> bool:
        """Returns whether a multiple of `every_tokens` was reached since `before`."""
        return self.tokens // every_tokens > before.tokens // every_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waypoint:
    """A step of a phase, and the counts of the run there."""

    step: int
    counts: Counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What a user changed of a run when resuming it."""

    phase: int
    step: int
    """The step of the phase from which the change holds."""
    tokens: int
    """Tokens of the run there."""
    fields: tuple[str, ...]
    """Name, old and new value of each field of the config."""
    resume_from: str = ""
    """The checkpoint that the run went back to; empty for its newest."""
    skip_examples: int = 0
    """Examples that were left out of the data."""

    def __str__(self) -> str:
        said = list(self.fields)
        if self.resume_from:
            said.append(f"resumed from {self.resume_from}")
        if self.skip_examples:
            said.append(f"{self.skip_examples:,} examples skipped")
        return f"at {self.tokens:,} tokens: {'; '.join(said)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a stage has ended before its length was up."""

    steps: int
    """Of the stage, those of a fit included."""
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a stage with one tree of trainable parameters and one compiled step."""

    index: int
    """Position among the phases of the run."""
    stage: int
    """Index of the stage that it belongs to."""
    name: Literal["fit", "train"]
    """What the phase does in its stage: fit the maps of a learned growth, or train."""
    source: ModelConfig
    """The model of the phase before, or the phase's own if it is the first."""
    model: ModelConfig
    growth: Growth | None
    """How the model grows out of the phase before."""
    optimizer_state: Literal["reset", "grow", "keep"]
    """Whether the optimizer starts afresh, grows its moments, or keeps old ones."""
    reparameterisations: tuple[Reparameterisation, ...]
    """What lies between the parameters that train and those that the model runs."""
    trained_layers: tuple[bool, ...] | None
    """Which layers learn; None if everything does."""
    mesh: MeshConfig
    batch_size: int
    accumulate: int
    num_steps: int
    learning_rate: LearningRate
    parameter_rates: ParameterRates | None
    """Factors of the learning rate of each parameter; None if all are 1."""
    births: Births | None
    """When moments begin that are younger than the optimizer; None if none are."""
    start: Counts
    """What the run has consumed before the phase."""
    per_step: Counts
    """What each step consumes, from `waypoint` on."""
    waypoint: Waypoint
    """A step whose counts are known: step 0, or the step where a resumed run changed its
    batch size or skipped examples."""

    @property
    def directory(self) -> str:
        """Where its checkpoints lie in the run directory."""
        return f"stage_{self.stage}/{self.name}"

    def counts(self, step: int) -> Counts:
        """Returns what the run has consumed after a step, from the waypoint on."""
        return self.waypoint.counts.after(self.per_step, step - self.waypoint.step)

    @property
    def end(self) -> Counts:
        """What the run has consumed after the phase."""
        return self.counts(self.num_steps)

    @property
    def first_tokens(self) -> int:
        """The tokens of the phase at step 0, if every step had the size of the present ones.

        The tokens after a step are this plus `step * per_step.tokens`. It is 0 unless the
        batch size has changed within the phase, and may be negative.
        """
        return self.counts(0).tokens - self.start.tokens

    @property
    def stays_symmetric(self) -> bool:
        """Whether copies in the model are equal and have equal gradients for ever."""
        if self.growth is None or self.optimizer_state == "keep":
            return False
        rates = self.parameter_rates
        alike = rates is None or rates.rewarm is None
        return alike and self.growth.is_symmetric()

    @property
    def spans(self) -> list[LayerSpan] | None:
        """How the layers run where only some learn: one scan for each run of them."""
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

    def trains_model(self, step: int) -> bool:
        """Returns whether what trains is, after a step, what the model runs.

        It is once every mask is open, and never while the maps of a growth are fitted.
        """
        tokens = self.first_tokens + step * self.per_step.tokens
        return all(
            isinstance(mask, Mask) and tokens >= mask.open_tokens
            for mask in self.reparameterisations
        )

    def model_params(self, params: Any, step: jax.Array | int) -> Any:
        """Returns the parameters that the model runs, of those that train."""
        if not self.reparameterisations:
            return params
        axes = logical_axes(self.model)
        tokens = self._tokens(step)

        def apply(params: Any, tokens: jax.Array) -> Any:
            for reparameterisation in self.reparameterisations:
                params = reparameterisation.model_params(params, axes, tokens)
            return params

        layout = jax.tree.map(partition, axes, is_leaf=lambda node: isinstance(node, Axes))
        return laid_out(apply, layout)(params, tokens)

    def frozen(self) -> Any:
        """Returns which entries of each parameter do not learn; booleans that broadcast."""
        assert self.trained_layers is not None, "some layers do not learn"
        trained, has_tied_head = self.trained_layers, self.model.tie_head
        return jax.tree.map(
            lambda names: jnp.equal(learns(names, trained, has_tied_head=has_tied_head), 0),
            logical_axes(self.model),
            is_leaf=lambda node: isinstance(node, Axes),
        )

    def step_params(self, params: Any, updates: Any, step: jax.Array) -> Any:
        """Returns parameters after a step along the optimizer's updates."""
        rate = self.learning_rate(step)
        if self.parameter_rates is None:
            return jax.tree.map(lambda p, update: p - rate * update, params, updates)
        tokens = self._tokens(step + 1)
        factors = self.parameter_rates(logical_axes(self.model), tokens)
        return jax.tree.map(
            lambda p, update, factor: p - rate * factor * update, params, updates, factors
        )

    def _tokens(self, step: jax.Array | int) -> jax.Array:
        """Returns the tokens of the phase after a step, a float32 scalar."""
        return self.first_tokens + jnp.asarray(step, jnp.float32) * float(self.per_step.tokens)


def with_births(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """Returns the phases of a run, which know when the moments of each parameter begin."""
    births, updates, found = Births(), 0, [*phases[:1]]
    for before, phase in itertools.pairwise(phases):
        updates += before.num_steps
        if phase.optimizer_state == "reset":
            births, updates = Births(), 0
        elif before.trained_layers is not None:
            births = births.after_freezing(
                before.trained_layers, updates, has_frozen_embedding=not before.model.tie_head
            )
        if phase.optimizer_state != "reset" and phase.growth is not None:
            keeps = phase.optimizer_state == "keep"
            births = births.after_growth(phase.growth, phase.source, updates, keeps=keeps)
        known = None if births == Births() else dataclasses.replace(births, now=updates)
        found.append(dataclasses.replace(phase, births=known))
    return tuple(found)
