"""What every layer of a model is like: how near to its copies, how strong, how large.

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
from stackjax.model import Params
from stackjax.sharding.partition import logical
from stackjax.training.phase import Phase


def layer_sources(phases: Sequence[Phase]) -> tuple[int, ...] | None:
    """Returns the source of every layer of the last phase, by the last growth in depth.

    None where no phase grows in depth. Phases after the one that does keep its copies: those
    after the fit of a learned growth, and those that grow in width or not at all.
    """
    for phase in reversed(phases):
        maps = phase.growth.axis_maps(phase.source) if phase.growth is not None else {}
        if "layers" in maps:
            return maps["layers"].sources
    return None


def layer_statistics(
    phase: Phase,
    sources: tuple[int, ...] | None,
    params: Params,
    step: jax.Array,
    batch: Batch,
) -> dict[str, jax.Array]:
    """Returns numbers of every layer of the model that a phase runs, each [L] in float32.

    `contribution` is that of `model.contributions`, on a batch `[1, B, T]`. `norm` is the root
    mean square of a layer's matrices. `similarity` is the mean cosine similarity of a layer's
    matrices, taken as one vector, with those of the other copies of its source; NaN where there
    is none.

    Args:
      sources: The source of every layer; without them there is no similarity.
      params: Those that train.
      step: The step of the phase that they are of.
    """
    params = phase.model_params(params, step)
    microbatch = jax.tree.map(lambda field: field[0], batch)
    matrices = _matrices(params["layers"], model.logical_axes(phase.model)["layers"])
    products_LL = sum(map(_products, matrices))
    squares_L = jnp.diagonal(products_LL)
    size = sum(math.prod(matrix.shape[1:]) for matrix in matrices)
    found = {
        "contribution": model.contributions(phase.model, params, microbatch),
        "norm": jnp.sqrt(squares_L / size),
    }
    if sources is not None:
        lengths_L = jnp.sqrt(squares_L)
        cosines_LL = products_LL / (lengths_L[:, None] * lengths_L[None, :])
        found["similarity"] = _mean_over_copies(cosines_LL, sources)
    return found


def _matrices(layers: Params, axes: Any) -> list[jax.Array]:
    """Returns the parameters of the layers that read an axis, and not gains."""
    stacked = zip(jax.tree.leaves(layers), jax.tree.leaves(axes), strict=True)
    return [leaf for leaf, names in stacked if names.reads]


def _products(matrix: jax.Array) -> jax.Array:
    """Returns the inner products of every two layers' matrices [L, L]."""
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
    """Returns the mean of every row over the other copies of its source [L]."""
    is_other = np.equal.outer(sources, sources) & ~np.eye(len(sources), dtype=bool)
    sums_L = jnp.sum(jnp.where(is_other, values_LL, 0), axis=1)
    return sums_L / is_other.sum(axis=1)  # 0 / 0 where there are none
