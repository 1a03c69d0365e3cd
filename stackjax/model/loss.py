"""Next-token loss in chunks of positions, to limit the memory for logits.

Shapes: B batch, T time, D embed, V vocabulary (padded).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stackjax.data.batch import Batch
from stackjax.model.config import ModelConfig
from stackjax.model.einsum import contract_gradients, gathered
from stackjax.model.router import RouterSums, router_loss
from stackjax.model.transformer import (
    HEAD_PRODUCT,
    LayerSpan,
    Params,
    head_weight,
    hidden_and_routed,
    logits,
)
from stackjax.sharding.partition import logical, num_shards, resharded


class LossSums(NamedTuple):
    """Sums over the positions of a batch, weighted by `loss_weights`."""

    nll: jax.Array
    """Negative log-likelihood of the next token in nats, without a gradient."""
    objective: jax.Array
    """The minimized value: nll + z_loss * (log-normalizer squared), and in models with experts
    the routers' losses, times the sum of `loss_weights`."""
    router: RouterSums | None = None
    """The routers' statistics; None without experts."""


def next_token_loss(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    *,
    z_loss: float = 0.0,
    spans: Sequence[LayerSpan] | None = None,
) -> LossSums:
    """Returns the loss sums over a microbatch with fields [B, T].

    Logits and their gradients are computed together, in chunks of `config.loss_chunk`
    positions, so logits are neither stored nor recomputed.

    Args:
      z_loss: Weight of the squared log-normalizer (arXiv:2204.02311).
      spans: Execution of the layers, as in `apply`.
    """
    args = batch.tokens, batch.positions, batch.segments, spans
    x_BTD, routed = hidden_and_routed(config, params, *args)
    labels_BT = _next_tokens(batch.tokens)
    w = head_weight(config, params)
    sums: Any = _loss_sums(config, z_loss, x_BTD, w, labels_BT, batch.loss_weights)
    nll, objective, router = jax.lax.stop_gradient(sums.nll), sums.objective, None
    if routed is not None:
        assert config.routing is not None
        weight = jnp.sum(batch.loss_weights)
        of_routers, router = router_loss(config.routing, routed, weight)
        objective += of_routers
    return LossSums(nll, objective, router)


def _next_tokens(tokens_BT: jax.Array) -> jax.Array:
    """Returns the label of each position: the next token; the last position has weight 0."""
    tokens_BT = resharded(tokens_BT, logical("batch", None))
    labels_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    return resharded(labels_BT, logical("batch", "seq"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_sums(
    config: ModelConfig,
    z_loss: float,
    x_BTD: jax.Array,
    w: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
) -> LossSums:
    zeros = LossSums(jnp.zeros(()), jnp.zeros(()))
    whole = gathered(w, x_BTD.dtype)
    chunks = _chunks(config, x_BTD, labels_BT, weights_BT)
    parts = (_chunk_loss(config, z_loss, whole, *chunk)[0] for chunk in chunks)
    return functools.reduce(lambda *sums: jax.tree.map(jnp.add, *sums), parts, zeros)


def _forward(
    config: ModelConfig,
    z_loss: float,
    x_BTD: jax.Array,
    w: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[LossSums, tuple[jax.Array, jax.Array]]:
    """Returns the sums, and the gradients of the objective for `x_BTD` and `w`."""
    sums, w_gradient = LossSums(jnp.zeros(()), jnp.zeros(())), None
    x_gradients = []
    # Gathered once, not for every chunk.
    whole = gathered(w, x_BTD.dtype)
    for x_BCD, *targets in _chunks(config, x_BTD, labels_BT, weights_BT):
        part, logits_gradient = _chunk_loss(config, z_loss, whole, x_BCD, *targets)
        by_x, by_w = contract_gradients(
            HEAD_PRODUCT[config.tie_head], x_BCD, w, logits_gradient.astype(x_BCD.dtype), whole
        )
        sums = jax.tree.map(jnp.add, sums, part)
        x_gradients.append(by_x)
        w_gradient = by_w if w_gradient is None else w_gradient + by_w
    assert w_gradient is not None, "a sequence has at least one position"
    return sums, (_joined(x_gradients), w_gradient)


def _backward(
    config: ModelConfig,
    z_loss: float,
    gradients: tuple[jax.Array, jax.Array],
    sums_gradient: LossSums,
) -> tuple[jax.Array, jax.Array, None, None]:
    scale = sums_gradient.objective
    x_gradient, w_gradient = (scale.astype(g.dtype) * g for g in gradients)
    return x_gradient, w_gradient, None, None


_loss_sums.defvjp(_forward, _backward)


def _chunks(config: ModelConfig, *arrays: jax.Array) -> Iterator[tuple[jax.Array, ...]]:
    """Yields chunks with the same positions of every shard of the sequence."""
    # Slice along T, not along B * T: the batch is sharded.
    for start in range(0, arrays[0].shape[1] // num_shards("seq"), config.loss_chunk):
        chunk = slice(start, start + config.loss_chunk)
        yield tuple(
            _from_shards(_by_shard(array)[:, :, chunk])
            if num_shards("seq") > 1
            else array[:, chunk]
            for array in arrays
        )


def _joined(chunks: Sequence[jax.Array]) -> jax.Array:
    """Returns an array [B, T, D] of all positions, from chunks as from `_chunks`."""
    if num_shards("seq") == 1:
        return jnp.concatenate(chunks, axis=1)
    return _from_shards(jnp.concatenate([_by_shard(chunk) for chunk in chunks], axis=2))


def _by_shard(x: jax.Array) -> jax.Array:
    """Returns an array [B, T, ...] as [B, shard, T / shards, ...]."""
    batch, seq_len, *rest = x.shape
    shards = num_shards("seq")
    layout = logical("batch", "seq", None, *(None,) * len(rest))
    return jnp.reshape(x, (batch, shards, seq_len // shards, *rest), out_sharding=layout)


def _from_shards(x: jax.Array) -> jax.Array:
    """Returns an array [B, shard, T / shards, ...] as [B, T, ...]."""
    batch, shards, length, *rest = x.shape
    layout = logical("batch", "seq", *(None,) * len(rest))
    return jnp.reshape(x, (batch, shards * length, *rest), out_sharding=layout)


def _chunk_loss(
    config: ModelConfig,
    z_loss: float,
    w: jax.Array,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[LossSums, jax.Array]:
    """Returns a chunk's sums, and the gradient of the objective for the chunk's logits."""
    logits_BTV = logits(config, w, x_BTD)
    normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A gather of the label's logit would fail for a sharded vocabulary.
    token_V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
    is_label_BTV = token_V == labels_BT[:, :, None]
    label_BT = jnp.sum(jnp.where(is_label_BTV, logits_BTV, 0.0), axis=-1)
    nll = jnp.sum((normalizer_BT - label_BT) * weights_BT)
    squares = jnp.sum(jnp.square(normalizer_BT) * weights_BT)
    probabilities_BTV = jnp.exp(logits_BTV - normalizer_BT[:, :, None])
    pull_BT = weights_BT * (1 + 2 * z_loss * normalizer_BT)
    gradient_BTV = probabilities_BTV * pull_BT[:, :, None] - jnp.where(
        is_label_BTV, weights_BT[:, :, None], 0.0
    )
    if config.logit_cap is not None:
        # Padding logits are -inf, and have no gradient.
        share_BTV = jnp.maximum(logits_BTV / config.logit_cap, -1.0)
        gradient_BTV *= 1 - jnp.square(share_BTV)
    return LossSums(nll, nll + z_loss * squares), gradient_BTV
