"""Mixtures of experts: each token's experts, and products with the experts' matrices.

Every device sorts its tokens by expert; with `expert` in the mesh, tokens go to their
experts' devices, and back. Gradients are written by hand, so that no gathered weight outlives
the forward pass.

Shapes: B batch, T time, D embed, F hidden units per expert, E experts, K experts per token, R
rows on all devices, sorted by expert on each. G is 2: gate and value of a SwiGLU.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from stackjax.model import dispatch
from stackjax.model.activation import recomputed
from stackjax.model.dispatch import Places, Plan
from stackjax.model.einsum import MLP_PRODUCT, PRODUCT
from stackjax.model.grouped import grouped_outer, grouped_product, rows_per_block
from stackjax.sharding.config import EXPERT
from stackjax.sharding.partition import layout, logical, mesh_axes_in, num_shards, resharded

_INTO = ("experts", "embed", "gate_up", "expert_mlp")
_OUT = ("experts", "expert_mlp", "embed")


def mixture(
    x_BTD: jax.Array,
    share_BTK: jax.Array,
    chosen_BTK: jax.Array,
    gate_up_EDGF: jax.Array,
    down_EFD: jax.Array,
    gated: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Returns each token's sum of its experts' outputs, times their shares, [B, T, D].

    Args:
      gated: Hidden activations from gate and value.
    """
    num_experts, devices = gate_up_EDGF.shape[0], num_shards("experts")
    plan, block = _plan(chosen_BTK, num_experts, devices)
    x_RD: Any = _to_rows(x_BTD, plan)
    # Shares multiply hidden units: their gradient then needs no expert's output.
    share_R1: Any = _to_rows(share_BTK, _of_choices(plan))

    def weighted(both_RGF: jax.Array, share_R1: jax.Array) -> jax.Array:
        return gated(both_RGF[:, 0], both_RGF[:, 1]) * share_R1

    both_RGF: Any = _product(_INTO, block, x_RD, gate_up_EDGF, plan.sizes_E)
    both_RGF = checkpoint_name(both_RGF, MLP_PRODUCT)
    h_RF = recomputed(weighted)(both_RGF, share_R1)
    y_RD: Any = _product(_OUT, block, h_RF, down_EFD, plan.sizes_E)
    out_BTD: Any = _from_rows(x_BTD.shape, checkpoint_name(y_RD, PRODUCT), plan)
    return out_BTD


def _on_devices(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
    """Returns a function that runs on each device's part; the function itself without mesh."""
    if logical() is None:
        return function
    # All collectives are explicit.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _rows(*names: str | None) -> P:
    """Returns the rows' partition spec, with logical names for further axes."""
    tokens, others = logical("batch", "seq"), logical(*names)
    return P() if tokens is None or others is None else P(mesh_axes_in(tokens), *others)


def _plan_specs(devices: int) -> Any:
    places: Any = Places(_rows(), _rows(None))  # type: ignore
    return Plan(None if devices == 1 else places, places, _rows())  # type: ignore


def _plan(chosen_BTK: jax.Array, num_experts: int, devices: int) -> tuple[Plan, int]:
    """Returns all devices' plans, and the rows in a block."""

    def plan(chosen_BTK: jax.Array) -> Plan:
        chosen_NK = chosen_BTK.reshape(-1, chosen_BTK.shape[-1])
        return dispatch.plan_rows(chosen_NK, num_experts, devices, block)

    on_device = chosen_BTK.size // (num_shards("batch") * num_shards("seq"))
    block = rows_per_block(on_device * devices, num_experts)
    specs = (logical("batch", "seq", None),)
    return _on_devices(plan, specs, _plan_specs(devices))(chosen_BTK), block


def _of_choices(plan: Plan) -> Plan:
    """Returns the plan for choices instead of tokens: each has a single row."""
    specs = _plan_specs(1 if plan.sent is None else 2)
    return _on_devices(dispatch.of_choices, (specs,), specs)(plan)


@jax.custom_vjp
def _to_rows(x_BTD: jax.Array, plan: Plan) -> jax.Array:
    """Returns `dispatch.to_rows` on every device."""

    def to_rows(x_BTD: jax.Array, plan: Plan) -> jax.Array:
        return dispatch.to_rows(x_BTD.reshape(plan.num_tokens, -1), plan)

    specs = logical("batch", "seq", None), _plan_specs(1 if plan.sent is None else 2)
    return _on_devices(to_rows, specs, _rows(None))(x_BTD, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_rows(shape: tuple[int, ...], y_RD: jax.Array, plan: Plan) -> jax.Array:
    """Returns `dispatch.from_rows` on every device: `_to_rows` transposed.

    Args:
      shape: The result's shape [B, T, D].
    """
    length = shape[1] // num_shards("seq")

    def from_rows(y_RD: jax.Array, plan: Plan) -> jax.Array:
        return dispatch.from_rows(y_RD, plan).reshape(-1, length, shape[2])

    specs = _rows(None), _plan_specs(1 if plan.sent is None else 2)
    return _on_devices(from_rows, specs, logical("batch", "seq", None))(y_RD, plan)


_to_rows.defvjp(
    lambda x, plan: (_to_rows(x, plan), (x.shape, plan)),
    lambda kept, g: (_from_rows(kept[0], g, kept[1]), None),
)
_from_rows.defvjp(
    lambda shape, y, plan: (_from_rows(shape, y, plan), plan),
    lambda _, plan, g: (_to_rows(g, plan), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    names: tuple[str, ...], block: int, x_RC: jax.Array, w: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """Returns each row times its expert's matrix, [R, ...].

    Weights are gathered along `embed` in the rows' dtype, again for the backward pass;
    their gradient is summed in the stored dtype, and scattered to the stored shards.

    Args:
      names: The weight's logical axes: experts, input channels, output channels.
      block: As for `grouped_product`.
    """

    def product(x_RC: jax.Array, w: jax.Array, sizes_E: jax.Array) -> jax.Array:
        flat = w.reshape(*w.shape[:2], -1)
        y = grouped_product(x_RC, flat, sizes_E, block, is_sparse=is_sparse)
        return _summed(y.reshape(-1, *w.shape[2:]), summed)

    summed, is_sparse = _axes(names[1]), num_shards("experts") > 1
    specs = _rows(_split(names[1])), _whole(names), _rows()
    run = _on_devices(product, specs, _rows(*map(_split, names[2:])))
    return run(x_RC, _gathered(w, x_RC.dtype, names), sizes_E)


def _forward(
    names: tuple[str, ...], block: int, x_RC: jax.Array, w: jax.Array, sizes_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    product: Any = _product(names, block, x_RC, w, sizes_E)
    return product, (x_RC, w, sizes_E)


def _backward(
    names: tuple[str, ...], block: int, kept: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    def gradients(
        x_RC: jax.Array, w: jax.Array, sizes_E: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        flat, g_RF = w.reshape(*w.shape[:2], -1), g.reshape(g.shape[0], -1)
        by_x = grouped_product(
            g_RF, flat, sizes_E, block, is_sparse=is_sparse, is_transposed=True
        )
        by_w = grouped_outer(x_RC, g_RF, sizes_E, block, stored, is_sparse=is_sparse)
        return _summed(by_x, summed), scatter(by_w.reshape(w.shape))

    x_RC, w, sizes_E = kept
    stored, is_sparse = w.dtype, num_shards("experts") > 1
    summed, scatter = _axes(names[-1]), _sum_to_shards(names)
    # Without the barrier, the compiler keeps all layers' gathered weights.
    again = jax.lax.optimization_barrier(w) if num_shards("embed") > 1 else w
    whole = _gathered(again, x_RC.dtype, names)
    rows = _rows(_split(names[1]))
    specs = rows, _whole(names), _rows(), _rows(*map(_split, names[2:]))
    run = _on_devices(gradients, specs, (rows, layout(w)))
    return *run(x_RC, whole, sizes_E, g), None


_product.defvjp(_forward, _backward)


def _split(name: str) -> str | None:
    """Returns the logical axis if activations have it, else None."""
    return name if name == "expert_mlp" else None


def _whole(names: tuple[str, ...]) -> P | None:
    """Returns a weight's partition spec in a product: whole along `embed`."""
    return logical(*(name if name != "embed" else None for name in names))


def _gathered(w: jax.Array, dtype: Any, names: tuple[str, ...]) -> jax.Array:
    return resharded(w.astype(dtype), _whole(names))


def _axes(name: str) -> tuple[str, ...]:
    """Returns the mesh axes over which a product's sum over a logical axis is split."""
    return mesh_axes_in(logical(_split(name)) or P())


def _sum_to_shards(names: tuple[str, ...]) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from a device's weight gradient to its shard in the sum."""
    stored = logical(*names)
    if stored is None:
        return lambda w: w
    place = names.index("embed")
    shards = mesh_axes_in(P(stored[place]))
    others = [axis for axis in mesh_axes_in(_rows()) if axis not in (*shards, EXPERT)]

    def scatter(w: jax.Array) -> jax.Array:
        # Devices along `expert` have other experts, and no sum.
        w = jax.lax.psum(w, others) if others else w
        if not shards:
            return w
        return jax.lax.psum_scatter(w, shards, scatter_dimension=place, tiled=True)

    return scatter


def _summed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x
