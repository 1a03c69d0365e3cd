"""Tokens to their experts' rows, and back: sorted on a device, exchanged between devices.

No token is dropped: with experts on X devices, a device can receive all the other rows, so
its buffers are X times as long as without `expert` in the mesh.

Shapes: N tokens on a device, K experts per token, D channels, R rows, E experts on a device, X
devices along `expert`, C rows sent to each device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stackjax.sharding.config import EXPERT


class Places(NamedTuple):
    """Where rows come from and go to."""

    source_R: jax.Array
    """The entry (token times K, plus choice) at each row; N K for a row without one."""
    row_NK: jax.Array
    """Each entry's row; R for an entry without one."""


class Plan(NamedTuple):
    """Places for a batch, for `to_rows` and `from_rows`."""

    sent: Places | None
    """From tokens to the rows sent to each device; None without `expert` in the mesh."""
    sorted: Places
    """From tokens, or from received rows, to rows by expert."""
    sizes_E: jax.Array
    """Each expert's rows, whole blocks."""

    @property
    def num_tokens(self) -> int:
        """Tokens on a device (N)."""
        return (self.sorted if self.sent is None else self.sent).row_NK.shape[0]


def plan_rows(chosen_NK: jax.Array, num_experts: int, devices: int, block: int) -> Plan:
    """Returns a device's plan for its tokens' choices.

    Args:
      num_experts: All experts, on all devices.
      devices: Devices along `expert`.
      block: Rows in a block, as from `rows_per_block`.
    """
    num_local = num_experts // devices
    if devices == 1:
        places, sizes_E = _by_expert(chosen_NK, num_local, block)
        return Plan(None, places, sizes_E)
    rows = chosen_NK.size
    firsts_X = jnp.arange(devices) * rows
    sent = _places(chosen_NK // num_local, firsts_X, devices * rows)
    label_N1 = chosen_NK.reshape(-1, 1) % num_local
    label_R1 = _exchanged(moved(label_N1, _of_choices(sent), num_local))
    places, sizes_E = _by_expert(label_R1, num_local, block)
    return Plan(sent, places, sizes_E)


def of_choices(plan: Plan) -> Plan:
    """Returns the plan for choices instead of tokens: each has a single row."""
    if plan.sent is None:
        return plan._replace(sorted=_of_choices(plan.sorted))
    return plan._replace(sent=_of_choices(plan.sent))  # received rows are single already


def _of_choices(places: Places) -> Places:
    return places._replace(row_NK=places.row_NK.reshape(-1, 1))


def to_rows(x_ND: jax.Array, plan: Plan) -> jax.Array:
    """Returns the tokens by expert, [R, D]; zero in rows without a token."""
    if plan.sent is not None:
        x_ND = _exchanged(moved(x_ND, plan.sent))
    return moved(x_ND, plan.sorted)


def from_rows(y_RD: jax.Array, plan: Plan) -> jax.Array:
    """Returns each token's sum over its rows, [N, D]: `to_rows` transposed."""
    y_ND = gathered_back(y_RD, plan.sorted)
    return y_ND if plan.sent is None else gathered_back(_exchanged(y_ND), plan.sent)


def moved(x_ND: jax.Array, places: Places, empty: int = 0) -> jax.Array:
    """Returns the tokens' rows, [R, D], with `empty` in rows without a token."""
    token_R = places.source_R // places.row_NK.shape[1]
    return x_ND.at[token_R].get(mode="fill", fill_value=empty)


def gathered_back(y_RD: jax.Array, places: Places) -> jax.Array:
    """Returns the sum over each token's rows, [N, D]: `moved` transposed."""
    return sum(
        y_RD.at[places.row_NK[:, k]].get(mode="fill", fill_value=0)
        for k in range(places.row_NK.shape[1])
    )  # type: ignore


def _by_expert(group_NK: jax.Array, num_groups: int, block: int) -> tuple[Places, jax.Array]:
    """Returns places by expert, in whole blocks, and each expert's rows.

    Args:
      group_NK: The expert; `num_groups` for an entry without a row.
    """
    counts_E = jnp.bincount(group_NK.reshape(-1), length=num_groups)
    sizes_E = -(-counts_E // block) * block
    entries = group_NK.size
    # Every expert has at most `block - 1` padding rows, and without tokens none.
    num_rows = -(-(entries + min(num_groups, entries) * (block - 1)) // block) * block
    return _places(group_NK, jnp.cumsum(sizes_E) - sizes_E, num_rows), sizes_E


def _places(group_NK: jax.Array, firsts_G: jax.Array, num_rows: int) -> Places:
    """Returns the entries' places in groups.

    Args:
      group_NK: The group; one past the last for an entry without a row.
      firsts_G: Each group's first row.
    """
    num_groups = firsts_G.shape[0]
    group_N = group_NK.reshape(-1)
    order_N = jnp.argsort(group_N, stable=True)
    sorted_N = group_N[order_N]
    counts_G = jnp.bincount(group_N, length=num_groups)
    shift_G = jnp.append(firsts_G - (jnp.cumsum(counts_G) - counts_G), 0)
    row_N = jnp.where(
        sorted_N < num_groups, jnp.arange(group_N.shape[0]) + shift_G[sorted_N], num_rows
    )
    empty_R = jnp.full(num_rows, group_N.shape[0], order_N.dtype)
    source_R = empty_R.at[row_N].set(order_N, mode="drop")
    row_NK = jnp.zeros_like(row_N).at[order_N].set(row_N).reshape(group_NK.shape)
    return Places(source_R, row_NK)


def _exchanged(x_RD: Any) -> Any:
    """Returns the rows that the devices along `expert` send to this one; its own inverse."""
    return jax.lax.all_to_all(x_RD, EXPERT, split_axis=0, concat_axis=0, tiled=True)
