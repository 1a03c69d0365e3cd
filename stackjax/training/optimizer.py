"""AdamW and Muon by axis names, and the course of the learning rate over tokens."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from stackjax.config import OptimizerConfig, Rewarm, Schedule
from stackjax.growth import Growth
from stackjax.growth.axis_map import is_new
from stackjax.growth.moment_starts import Births, learns
from stackjax.model.config import ModelConfig, axis_size
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import laid_out, partition_of


def build_optimizer(
    config: OptimizerConfig, axes: Any, births: Births | None = None
) -> optax.GradientTransformation:
    """Returns AdamW or Muon without its learning rate, which the step applies.

    Matrices decay; what reads no axis (the gain of a norm) does not.

    Args:
      axes: The `Axes` of each parameter.
      births: When moments begin that are younger than the optimizer; None if none are. Its
        bias corrections then count the updates of each entry.
    """
    is_muon = config.name == "muon"
    decays = _map_axes(lambda names: bool(names.reads), axes)
    return optax.chain(
        _clip_by_global_norm(config.clip_norm),
        _scale_by_muon(config, axes, births)
        if is_muon
        else _scale_by_adam(config, axes, births),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def build_fit_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns what fits the maps of a learned growth: Adam, the source held fixed."""
    adam = optax.chain(_clip_by_global_norm(config.clip_norm), _scale_by_adam(config))
    labels = {"maps": "fitted", "source": "fixed"}
    return optax.partition({"fitted": adam, "fixed": optax.set_to_zero()}, labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate of a phase: a schedule whose every number is settled."""

    peak: float
    schedule: Schedule
    horizon_tokens: int
    """Tokens after which the decay has ended, from the start of the schedule's axis."""
    first_tokens: int
    """Tokens on the schedule's axis before the first step of the phase."""
    tokens_per_step: int

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """Returns the rate of a step of the phase, counted from 0."""
        # Floats, because whole runs have more tokens than an int32 can count.
        steps_done = jnp.asarray(step, jnp.float32) + 1
        tokens = float(self.first_tokens) + float(self.tokens_per_step) * steps_done
        warmup = jnp.minimum(1.0, tokens / max(float(self.schedule.warmup_tokens), 1.0))
        return self.peak * warmup * self._decay(tokens)

    def _decay(self, tokens: jax.Array) -> jax.Array:
        final, horizon = self.schedule.final_fraction, float(self.horizon_tokens)
        start = horizon - (self.schedule.decay_tokens or 0)
        if self.schedule.shape == "cosine":
            start = float(self.schedule.warmup_tokens)
        progress = jnp.clip((tokens - start) / max(horizon - start, 1.0), 0.0, 1.0)
        if self.schedule.shape == "cosine":
            return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if self.schedule.shape == "wsd":
            return 1 - (1 - final) * progress
        return jnp.ones_like(progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterRates:
    """What each parameter's learning rate is multiplied by in a phase."""

    source: ModelConfig
    growth: Growth | None
    """How the phase's model grew out of `source`."""
    rewarm: Rewarm | None
    scale_by_fan_in: bool
    trained_layers: tuple[bool, ...] | None
    """Which layers learn; None if everything does."""

    def __call__(self, axes: Any, tokens: jax.Array) -> Any:
        """Returns a factor for each parameter, which broadcasts against it.

        Args:
          axes: The `Axes` of each parameter.
          tokens: Tokens since growth; a float32 scalar.
        """
        return _map_axes(functools.partial(self._rate, tokens), axes)

    def _rate(self, tokens: jax.Array, names: Axes) -> jax.Array:
        rate = jnp.ones((1,) * len(names.names))
        if self.rewarm is not None and self.growth is not None:
            maps = self.growth.axis_maps(self.source)
            risen = jnp.minimum(1.0, tokens / float(self.rewarm.tokens))
            rate *= jnp.where(is_new(names, maps), self.rewarm.ratio * risen, 1.0)
        if self.scale_by_fan_in and self.growth is not None:
            target = self.growth.target_config(self.source)
            for name in names.reads:
                rate *= axis_size(self.source, name) / axis_size(target, name)
        if self.trained_layers is not None:
            has_tied_head = self.source.tie_head
            rate *= learns(names, self.trained_layers, has_tied_head=has_tied_head)
        return rate


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns optax's clipping with one factor for all, which fuses with what reads them.

    Optax's own chooses between the gradients and clipped ones, and so keeps both.
    """

    def clip(updates: Any, _: Any) -> Any:
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda update: factor * update, updates)

    return optax.stateless(clip)


def _scale_by_muon(
    config: OptimizerConfig, axes: Any, births: Births | None
) -> optax.GradientTransformation:
    """Returns Muon (arXiv:2502.16982) for the matrices of layers, Adam for the rest.

    With momentum m = beta m + (1 - beta) g, the update t (from 1) orthogonalises Nesterov's
    beta m / (1 - beta^(t + 1)) + (1 - beta) g / (1 - beta^t), with the bias corrections of
    NAdam. Without them, as in the code of Keller Jordan and of the paper, the first updates
    would weigh the newest gradient less; for large t both are the same direction.
    """

    def dimensions(names: Axes) -> optax.contrib.MuonDimensionNumbers | optax.MaskedNode:
        if not names.stacked or not names.reads:
            return optax.MaskedNode()
        place = names.names.index
        # Fused matrices are orthogonalized separately, like layers.
        writes = tuple(place(name) for name in names.writes)
        reads = tuple(place(name) for name in names.reads)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=reads, output_axis=writes)

    matrices = _map_axes(dimensions, axes)

    def as_large_as_adam(
        update: jax.Array, matrix: optax.contrib.MuonDimensionNumbers
    ) -> jax.Array:
        sides: Any = (matrix.reduction_axis, matrix.output_axis)
        fans = (math.prod(update.shape[axis] for axis in side) for side in sides)
        return 0.2 * math.sqrt(max(fans)) * update

    scale = functools.partial(
        optax.contrib.scale_by_muon, eps=config.epsilon, weight_dimension_numbers=matrices
    )
    momentum = scale(beta=config.momentum, nesterov=True)
    if births is not None:
        as_it_is = scale(beta=0.0, nesterov=False)
        momentum = _muon_with_births(momentum, as_it_is, config.momentum, axes, births)
    muon = optax.chain(
        _store_moments(momentum, config.moments_dtype),
        optax.stateless(lambda updates, _: jax.tree.map(as_large_as_adam, updates, matrices)),
    )
    tx = optax.partition(
        {"muon": muon, "adam": _scale_by_adam(config, axes, births)},
        _map_axes(lambda names: "muon" if names.stacked and names.reads else "adam", axes),
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Muon makes matrices of arrays with more axes, which only the compiler knows how
        # to lay out.
        layout = jax.tree.map(lambda x: partition_of(jax.typeof(x)), (updates, state))
        return laid_out(tx.update, layout)(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


def _muon_with_births(
    momentum: optax.GradientTransformation,
    orthogonalise: optax.GradientTransformation,
    beta: float,
    axes: Any,
    births: Births,
) -> optax.GradientTransformation:
    """Returns Muon whose bias corrections count the updates of each entry.

    Args:
      momentum: Muon itself, for its state.
      orthogonalise: Muon without momentum.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = momentum.update(updates, state, params)

        def ahead(grad: Any, mu: Any, names: Axes) -> Any:
            if isinstance(grad, optax.MaskedNode):
                return grad
            next_one = births.correction(names, beta, state.count + 1)
            this_one = births.correction(names, beta, state.count)
            return beta * mu / next_one + (1 - beta) * grad / this_one

        updates = jax.tree.map(ahead, updates, state.mu, axes, is_leaf=_is_masked)
        updates, _ = orthogonalise.update(updates, state, params)
        return updates, state

    return optax.GradientTransformation(momentum.init, update)


def _scale_by_adam(
    config: OptimizerConfig, axes: Any = None, births: Births | None = None
) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    if births is not None:
        adam = _adam_with_births(adam, config, axes, births)
    return _store_moments(adam, config.moments_dtype)


def _adam_with_births(
    adam: optax.GradientTransformation, config: OptimizerConfig, axes: Any, births: Births
) -> optax.GradientTransformation:
    """Returns Adam whose bias corrections count the updates of each entry."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(updates, state, params)

        def direction(mu: Any, nu: Any, names: Axes) -> Any:
            if isinstance(mu, optax.MaskedNode):
                return mu
            mu = mu / births.correction(names, config.b1, state.count)
            nu = nu / births.correction(names, config.b2, state.count)
            return mu / (jnp.sqrt(nu) + config.epsilon)

        return jax.tree.map(direction, state.mu, state.nu, axes, is_leaf=_is_masked), state

    return optax.GradientTransformation(adam.init, update)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _store_moments(
    tx: optax.GradientTransformation, dtype: Literal["float32", "bfloat16"]
) -> optax.GradientTransformation:
    """Returns Adam or Muon with moments of a type, which a step computes in float32."""
    if dtype == "float32":
        return tx

    def cast(state: Any, to: str) -> Any:
        # By name: Muon's state also has the coefficients of its polynomial.
        trees = {name: getattr(state, name) for name in ("mu", "nu") if hasattr(state, name)}
        return state._replace(**jax.tree.map(lambda moment: moment.astype(to), trees))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(tx.init(params), dtype), update)


def _map_axes(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, Axes))
