"""A layer's router: a token's experts, their shares, and losses.

Shapes: B batch, T time, D embed, E experts, K chosen experts, L layers with experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from stackjax.model.config import ModelConfig
from stackjax.model.einsum import contract
from stackjax.model.routing_config import Routing
from stackjax.sharding.partition import logical


class Routed(NamedTuple):
    """A router's statistics: means over a batch's tokens."""

    load_E: jax.Array
    """Each expert's share in the tokens, without a gradient; the sum is `top_k`."""
    score_E: jax.Array
    """Each expert's mean score, relative to the sum over experts."""
    square: jax.Array
    """The logits' mean squared log-normalizer."""
    entropy: jax.Array
    """The relative scores' mean entropy in nats, without a gradient."""


class RouterSums(NamedTuple):
    """Means over tokens, times a batch's weight, so that sums over batches are means."""

    load_LE: jax.Array
    """As `Routed.load_E`, in all layers with experts that a token passes."""
    entropy_L: jax.Array
    """As `Routed.entropy`."""
    balance: jax.Array
    """The balance loss, without its weight."""
    square: jax.Array
    """The mean squared log-normalizer."""


def route(
    routing: Routing, x_BTD: jax.Array, w_DE: jax.Array, bias_E: jax.Array | None
) -> tuple[jax.Array, jax.Array, Routed]:
    """Returns shares and chosen experts, [B, T, K] each, and the router's statistics.

    Scores are float32 or wider. Equal scores choose the experts with the lowest numbers.

    Args:
      bias_E: Added to the scores for the choice only.
    """
    wide_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    logits_BTE = contract("BTD,DE->BTE", wide_BTD, w_DE, logical("batch", "seq", None))
    if routing.score == "softmax":
        score_BTE = jax.nn.softmax(logits_BTE)
    else:
        score_BTE = jax.nn.sigmoid(logits_BTE)
    ranked_BTE = score_BTE if bias_E is None else score_BTE + bias_E[None, None]
    _, chosen_BTK = jax.lax.top_k(jax.lax.stop_gradient(ranked_BTE), routing.top_k)
    expert_111E = jnp.arange(score_BTE.shape[-1])[None, None, None]
    is_chosen_BTKE = chosen_BTK[..., None] == expert_111E
    share_BTK = jnp.sum(jnp.where(is_chosen_BTKE, score_BTE[:, :, None], 0), axis=-1)
    if routing.normalize:
        share_BTK /= jnp.sum(share_BTK, axis=-1, keepdims=True)
    if routing.scale != 1:
        share_BTK *= routing.scale
    load_BTE = jnp.sum(is_chosen_BTKE, axis=2, dtype=score_BTE.dtype)
    relative_BTE = score_BTE
    if routing.score == "sigmoid":
        relative_BTE /= jnp.sum(score_BTE, axis=-1, keepdims=True)
    normalizer_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    fixed_BTE = jax.lax.stop_gradient(relative_BTE)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(fixed_BTE, fixed_BTE), axis=-1)
    routed = Routed(
        load_E=jnp.mean(load_BTE, axis=(0, 1)),
        score_E=jnp.mean(relative_BTE, axis=(0, 1)),
        square=jnp.mean(jnp.square(normalizer_BT)),
        entropy=jnp.mean(entropy_BT),
    )
    return share_BTK.astype(x_BTD.dtype), chosen_BTK, routed


def router_shapes(config: ModelConfig) -> RouterSums | None:
    """Returns the shapes in a model's sums, abstract; None without experts."""
    passes = config.loops * sum(config.has_experts(kind) for kind in config.kinds)
    if not passes:
        return None
    shapes = (passes, config.num_experts), (passes,), (), ()
    return RouterSums(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))  # type: ignore


def router_loss(
    routing: Routing, routed: Routed, weight: jax.Array
) -> tuple[jax.Array, RouterSums]:
    """Returns the routers' loss, and the sums, both times a batch's weight.

    A layer's balance loss is E times load times mean score, summed over experts
    (arXiv:2101.03961); it is `top_k` for equal loads. It is not additive over tokens: loads and
    scores are means over one batch, a microbatch on all devices.

    Args:
      routed: Statistics with a leading axis for layers.
      weight: The batch's share in a step.
    """
    num_experts = routed.load_E.shape[-1]
    balance = num_experts * jnp.mean(jnp.sum(routed.load_E * routed.score_E, axis=-1))
    square = jnp.mean(routed.square)
    loss = routing.z_loss * square
    if routing.balance == "loss":
        loss += routing.balance_weight * balance
    sums = RouterSums(routed.load_E, routed.entropy, balance, square)
    sums = jax.tree.map(lambda leaf: jax.lax.stop_gradient(weight * leaf), sums)
    return weight * loss, sums


def router_metrics(sums: RouterSums) -> dict[str, jax.Array]:
    """Returns a step's metrics, from its batches' sums.

    Loads are relative to equal loads: `max_load` and `min_load` are the largest and smallest in
    any layer, `layer_max_load` is each layer's largest. `router_entropy` is in nats, at most
    the logarithm for equal scores. `balance_loss` and `router_z_loss` are without
    weights.
    """
    num_experts = sums.load_LE.shape[-1]
    load_LE = sums.load_LE * num_experts / jnp.sum(sums.load_LE, axis=-1, keepdims=True)
    return {
        "balance_loss": sums.balance,
        "router_z_loss": sums.square,
        "router_entropy": jnp.mean(sums.entropy_L),
        "max_load": jnp.max(load_LE),
        "min_load": jnp.min(load_LE),
        "layer_max_load": jnp.max(load_LE, axis=-1),
    }
