"""Compiled optimizers, and Muon's orthogonalization in NumPy."""

import functools

import jax
import numpy as np

from stackjax import model
from stackjax.sharding.axes import Axes


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(size=np.shape(leaf))), tree)


@functools.cache
def compiled_optimizer(config, optimizer):
    """Returns the compiled `init` and `update` functions."""
    tx = optimizer.build(model.logical_axes(config))
    return jax.jit(tx.init), jax.jit(tx.update)


def orthogonalized(matrix):
    """Returns the matrix after five Newton-Schulz steps in float64 (Keller Jordan's Muon)."""
    x = matrix / np.sqrt(np.sum(matrix * matrix))
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def by_name(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, Axes)
    )
    return {path[-1].key: leaf for path, leaf in leaves}
