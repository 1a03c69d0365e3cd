"""Growth of float64 parameters, for judges of functions and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackjax import model
from stackjax.model.config import axis_size
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes

KEY = jax.random.key(0)


def random_values(config, axes, seed):
    """Random float64 parameters; matrices preserve activation scale and gains are near 1."""
    rng = np.random.default_rng(seed)

    def draw(names):
        shape = tuple(axis_size(config, axis) for axis in names.names)
        return rng.normal(size=shape) / 4 if names.reads else rng.uniform(0.5, 1.5, shape)

    return jax.tree.map(draw, axes, is_leaf=lambda node: isinstance(node, Axes))


def fits(growth, config):
    """Whether a model can grow."""
    try:
        growth.target_config(config)
    except UserError:
        return False
    return True


def source_params(config):
    """Random float64 parameters of the source."""
    return random_values(config, model.logical_axes(config), seed=0)


def grow(growth, config, *, closes_masks=False):
    """Returns the target config and the grown float64 parameters.

    Args:
      closes_masks: Whether to apply the masks as they are at the start.
    """
    axes, grown_axes = (model.logical_axes(c) for c in (config, growth.target_config(config)))

    def fresh(model_config):
        return random_values(model_config, model.logical_axes(model_config), seed=1)

    draws = np.random.default_rng(2)

    def normal(key, shape, dtype=None, out_sharding=None):
        return jnp.asarray(draws.normal(size=shape), dtype)

    @jax.jit
    def run(params):
        params = growth.target_params(params, axes, config, key=KEY, fresh=fresh)
        for mask in growth.reparameterizations(config) if closes_masks else ():
            params = mask.model_params(params, grown_axes, jnp.float64(0))
        return params

    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        # Any noise works. Compiling float64 draws would take longer than the whole test.
        patch.setattr(jax.random, "normal", normal)
        grown = jax.tree.map(np.asarray, run(source_params(config)))
    assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {np.dtype(np.float64)}
    return growth.target_config(config), grown
