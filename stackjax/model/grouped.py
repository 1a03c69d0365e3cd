"""Products between sorted rows and their groups' matrices, on a single device.

Group 0 comes first, then group 1, and so on. On CPUs and GPUs, where
`jax.lax.ragged_dot` multiplies every row with every matrix, products run block by block: each
group fills whole blocks, and rows that pad a block are zero.

Shapes: R rows, C input channels, F output channels, E groups, M blocks, S rows in a block.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from stackjax.sharding.platform import platform_of, target_device

_BLOCKS = {"cpu": (16, 256), "gpu": (64, 512)}
"""Fewest and most rows in a block, by platform."""


def rows_per_block(num_rows: int, num_groups: int) -> int:
    """Returns the rows in a block, 2 to some power; 1 if the device needs no blocks.

    On average, a group fills about four blocks: an eighth is then padding.
    """
    platform = platform_of(target_device())
    if platform == "tpu":
        return 1
    least, most = _BLOCKS.get(platform, _BLOCKS["gpu"])
    quarter = max(1, num_rows // (4 * num_groups))
    return min(max(2 ** round(math.log2(quarter)), least), most)


def grouped_product(
    x_RC: jax.Array,
    w_ECF: jax.Array,
    sizes_E: jax.Array,
    block: int,
    *,
    is_sparse: bool = False,
    is_transposed: bool = False,
) -> jax.Array:
    """Returns each row times its group's matrix, [R, F] in the dtype of `x`.

    Rows after the last group are zero; they must be zero in `x` for `block` above 1.

    Args:
      sizes_E: Rows in each group, divisible by `block`.
      block: As from `rows_per_block`.
      is_sparse: Whether most rows may be after the last group, and so are skipped.
      is_transposed: Whether the matrices are [E, F, C].
    """
    if block == 1:
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (2 if is_transposed else 1,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        )
        return _masked(jax.lax.ragged_dot_general(x_RC, w_ECF, sizes_E, numbers), sizes_E)
    spec = "SC,FC->SF" if is_transposed else "SC,CF->SF"

    def step(m: jax.Array, out_RF: jax.Array, group: jax.Array) -> jax.Array:
        x_SC = jax.lax.dynamic_slice_in_dim(x_RC, m * block, block)
        y_SF = jnp.einsum(spec, x_SC, w_ECF[group])
        return jax.lax.dynamic_update_slice_in_dim(out_RF, y_SF, m * block, 0)

    num_blocks = None if is_sparse else x_RC.shape[0] // block
    shape = x_RC.shape[0], w_ECF.shape[1 if is_transposed else 2]
    return _each_block(step, jnp.zeros(shape, x_RC.dtype), sizes_E, block, num_blocks)


def grouped_outer(
    x_RC: jax.Array,
    g_RF: jax.Array,
    sizes_E: jax.Array,
    block: int,
    dtype: jnp.dtype,
    *,
    is_sparse: bool = False,
) -> jax.Array:
    """Returns each group's outer products, summed over rows, [E, C, F].

    Arguments as for `grouped_product`.
    """
    if block == 1:
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        x_RC, g_RF = _masked(x_RC, sizes_E), _masked(g_RF, sizes_E)
        return jax.lax.ragged_dot_general(
            x_RC, g_RF, sizes_E, numbers, preferred_element_type=dtype
        )

    def step(m: jax.Array, out_ECF: jax.Array, group: jax.Array) -> jax.Array:
        x_SC, g_SF = (jax.lax.dynamic_slice_in_dim(a, m * block, block) for a in (x_RC, g_RF))
        found = jnp.einsum("SC,SF->CF", x_SC, g_SF, preferred_element_type=dtype)
        return out_ECF.at[group].add(found)

    num_blocks = None if is_sparse else x_RC.shape[0] // block
    shape = (sizes_E.shape[0], x_RC.shape[1], g_RF.shape[1])
    return _each_block(step, jnp.zeros(shape, dtype), sizes_E, block, num_blocks)


def _each_block(
    step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    out: jax.Array,
    sizes_E: jax.Array,
    block: int,
    num_blocks: int | None,
) -> jax.Array:
    """Returns the result after `step(m, result, group)` for every block.

    Blocks after the last group count to it.

    Args:
      num_blocks: None for the groups' blocks alone.
    """
    ends_E = jnp.cumsum(sizes_E) // block

    def run(m: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.sum(ends_E <= m)
        return step(m, out, jnp.minimum(group, sizes_E.shape[0] - 1))

    return jax.lax.fori_loop(0, ends_E[-1] if num_blocks is None else num_blocks, run, out)


def _masked(x_RC: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns rows with zeros after the last group, which `ragged_dot` leaves undefined."""
    is_row_R1 = jnp.arange(x_RC.shape[0])[:, None] < jnp.sum(sizes_E)
    return jnp.where(is_row_R1, x_RC, 0)
