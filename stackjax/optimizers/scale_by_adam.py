"""AdamW as optax transformations."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from stackjax.model.parametrization import Ratios
from stackjax.optimizers.adamw import AdamW
from stackjax.sharding.axes import Axes


def adamw(config: AdamW, axes: Any, ratios: Any = None) -> optax.GradientTransformation:
    """Returns clipping, Adam, and weight decay for matrices only.

    Args:
      ratios: The `Ratios` of each parameter, for CompleteP.
    """
    scale = scale_by_adam(config, axes, ratios)
    return with_clip_and_decay(config, scale, axes, ratios)


def clipped_adam(config: AdamW) -> optax.GradientTransformation:
    """Returns clipping and Adam."""
    return optax.chain(clip_by_global_norm(config.clip_norm), scale_by_adam(config))


def with_clip_and_decay(
    config: AdamW, scale: optax.GradientTransformation, axes: Any, ratios: Any = None
) -> optax.GradientTransformation:
    """Returns a transformation between clipping and weight decay for matrices.

    Args:
      ratios: The `Ratios` of each parameter, for CompleteP.
    """
    decays = map_axes(lambda names: bool(names.reads), axes)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decays)
    if ratios is not None:
        decay = optax.masked(_add_scaled_weights(config, axes, ratios), decays)
    return optax.chain(clip_by_global_norm(config.clip_norm), scale, decay)


def _add_scaled_weights(config: AdamW, axes: Any, ratios: Any) -> optax.GradientTransformation:
    """Returns weight decay without CompleteP's learning-rate factors."""

    def add(update: Any, param: Any, names: Axes, sizes: Ratios) -> Any:
        if is_masked(update):
            return update
        return update + config.weight_decay / config.rate_factor(names, sizes) * param

    return optax.stateless(
        lambda updates, params: jax.tree.map(
            add, updates, params, axes, ratios, is_leaf=is_masked
        )
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns clipping as in optax, by a factor that XLA fuses with later products.

    `optax.clip_by_global_norm` selects gradients or clipped gradients, and so stores both.
    """

    def clip(updates: Any, _: Any) -> Any:
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda update: factor * update, updates)

    return optax.stateless(clip)


def scale_by_adam(
    config: AdamW, axes: Any = None, ratios: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Returns Adam. With `moment_starts`, bias corrections count each entry's updates.

    Args:
      ratios: The `Ratios` of each parameter, for CompleteP's epsilons.
    """
    epsilons = map_axes(lambda _: config.epsilon, axes)
    if ratios is not None:
        epsilons = jax.tree.map(functools.partial(_epsilon, config), axes, ratios)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)

    def update(
        updates: Any, state: Any, params: Any = None, *, moment_starts: Any = None
    ) -> tuple[Any, Any]:
        updates, state = adam.update(updates, state, params)
        if moment_starts is None and ratios is None:
            return updates, state

        def correction(names: Axes, decay: float) -> jax.Array:
            if moment_starts is None:
                return 1 - decay**state.count
            return moment_starts.correction(names, decay, state.count)

        def direction(mu: Any, nu: Any, names: Axes, epsilon: float) -> Any:
            if is_masked(mu):
                return mu
            mu = mu / correction(names, config.b1)
            nu = nu / correction(names, config.b2)
            return mu / (jnp.sqrt(nu) + epsilon)

        moments = state.mu, state.nu
        return jax.tree.map(direction, *moments, axes, epsilons, is_leaf=is_masked), state

    return store_moments(
        optax.GradientTransformationExtraArgs(adam.init, update), config.moments_dtype
    )


def _epsilon(config: AdamW, axes: Axes, ratios: Ratios) -> float:
    """Returns a parameter's epsilon under CompleteP, proportional to the gradient."""
    return config.epsilon / (ratios.embed * (ratios.layers if axes.stacked else 1.0))


def store_moments(
    tx: optax.GradientTransformationExtraArgs, dtype: Literal["float32", "bfloat16"]
) -> optax.GradientTransformationExtraArgs:
    """Returns Adam or Muon with moments stored in `dtype`; steps compute in float32."""
    if dtype == "float32":
        return tx

    def cast(state: Any, to: str) -> Any:
        # By name, because Muon's state also has polynomial coefficients.
        trees = {name: getattr(state, name) for name in ("mu", "nu") if hasattr(state, name)}
        return state._replace(**jax.tree.map(lambda moment: moment.astype(to), trees))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = tx.update(updates, cast(state, "float32"), params, **extra)
        return updates, cast(state, dtype)

    return optax.GradientTransformationExtraArgs(
        lambda params: cast(tx.init(params), dtype), update
    )


def map_axes(function: Callable[[Axes], Any], axes: Any) -> Any:
    """Returns `function` of each parameter's `Axes`."""
    return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, Axes))


def is_masked(node: Any) -> bool:
    """Returns whether another optimizer updates a parameter."""
    return isinstance(node, optax.MaskedNode)
