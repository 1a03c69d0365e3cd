"""Per-layer statistics: similarity to copies, contribution to the residual stream, norm.

Shapes: L layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackjax import model
from stackjax.data.batch import Batch
from stackjax.growth.axis_map import NEW
from stackjax.model import ModelConfig, Params
from stackjax.model.config import layers_along
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import logical
from stackjax.training.phase import Phase


def layer_sources(phases: Sequence[Phase]) -> tuple[int, ...] | None:
    """Returns every layer's source in the last phase, or None without growth in depth.

    The last growth in depth decides: later phases without growth in depth keep the copies.
    """
    for phase in reversed(phases):
        maps = phase.growth.axis_maps(phase.source) if phase.growth is not None else {}
        if "layers" in maps:
            return maps["layers"].sources
    return None


def layer_statistics(
    config: ModelConfig, sources: tuple[int, ...] | None, params: Params, batch: Batch
) -> dict[str, jax.Array]:
    """Returns statistics per layer, each [L] in float32.

    `contribution` is `model.contributions` on a batch `[1, B, T]`. `norm` is the root mean
    square of a layer's matrices. `similarity` compares a layer's matrices, flattened to one
    vector, with other copies from the same source layer: the mean cosine similarity, or NaN
    for a layer without copies.

    Args:
      sources: Every layer's source; without sources there is no similarity.
    """
    microbatch = jax.tree.map(lambda field: field[0], batch)
    products_LL, size_L = 0, np.zeros(config.num_layers)
    for leaf, names in _matrices(params["layers"], model.logical_axes(config)["layers"]):
        layers = np.array(layers_along(config, names.layer_axis), int)
        products_LL += _among(layers, _products(leaf), config.num_layers)
        size_L[layers] += math.prod(leaf.shape[1:])
    squares_L = jnp.diagonal(products_LL)
    found = {
        "contribution": model.contributions(config, params, microbatch),
        "norm": jnp.sqrt(squares_L / size_L.astype(np.float32)),
    }
    if sources is not None:
        lengths_L = jnp.sqrt(squares_L)
        cosines_LL = products_LL / (lengths_L[:, None] * lengths_L[None, :])
        found["similarity"] = _mean_over_copies(cosines_LL, sources)
    return found


def _matrices(layers: Params, axes: Any) -> list[tuple[jax.Array, Axes]]:
    """Returns all layers' matrices, without norm gains."""
    stacked = zip(jax.tree.leaves(layers), jax.tree.leaves(axes), strict=True)
    return [(leaf, names) for leaf, names in stacked if names.reads]


def _among(layers: np.ndarray, products: jax.Array, num_layers: int) -> jax.Array:
    """Returns products of some layers as those of all [L, L], zero for the others."""
    if len(layers) == num_layers:
        return products
    return jnp.zeros((num_layers,) * 2, products.dtype).at[np.ix_(layers, layers)].set(products)


def _products(matrix: jax.Array) -> jax.Array:
    """Returns a matrix's inner products for all pairs of layers [L, L]."""
    inner = tuple(range(1, matrix.ndim))
    return jnp.tensordot(
        matrix,
        matrix,
        axes=(inner, inner),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
        out_sharding=logical(None, None),
    )


def _mean_over_copies(values_LL: jax.Array, sources: tuple[int, ...]) -> jax.Array:
    """Returns each row's mean over other copies from the same source [L]."""
    is_other = np.equal.outer(sources, sources) & ~np.eye(len(sources), dtype=bool)
    is_other &= np.array(sources) != NEW
    sums_L = jnp.sum(jnp.where(is_other, values_LL, 0), axis=1)
    return sums_L / is_other.sum(axis=1)  # 0 / 0 without copies
