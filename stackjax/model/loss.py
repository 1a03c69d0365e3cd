"""Next-token loss whose logits need not be held for the whole sequence at once.

Shapes: B batch, T time, D embed, V vocabulary (padded).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stackjax.data.batch import Batch
from stackjax.model.config import ModelConfig
from stackjax.model.transformer import LayerSpan, Params, hidden, unembed


class LossSums(NamedTuple):
    """Sums over the positions of a batch, weighted by `loss_weights`."""

    nll: jax.Array
    """Negative log-likelihood of the next token, in nats."""
    squared_normaliser: jax.Array
    """Squared log-normaliser of the logits: the z-loss of arXiv:2204.02311."""


def next_token_loss(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    spans: Sequence[LayerSpan] | None = None,
) -> LossSums:
    """Returns the loss sums of one microbatch, whose fields are [B, T].

    With `config.loss_chunk`, logits exist for that many positions at a time and are
    computed again in the backward pass.

    Args:
      spans: How the layers run, as `apply` takes it.
    """
    x_BTD = hidden(config, params, batch.tokens, batch.positions, batch.segments, spans)
    # Position t learns the token at t + 1; the last position has no weight.
    labels_BT = jnp.roll(batch.tokens, -1, axis=1)
    sums = functools.partial(_sums, config, params)
    seq_len = labels_BT.shape[1]
    chunk = config.loss_chunk or seq_len
    if chunk >= seq_len:
        return sums(x_BTD, labels_BT, batch.loss_weights)
    if seq_len % chunk:
        raise ValueError(
            f"model.loss_chunk is {chunk}, which does not divide data.seq_len {seq_len}."
        )
    # Chunks are cut from T, which no mesh axis shards, never from B times T.
    total = LossSums(jnp.zeros(()), jnp.zeros(()))
    remat_sums = jax.checkpoint(sums)
    for start in range(0, seq_len, chunk):
        part = slice(start, start + chunk)
        arrays = (x_BTD[:, part], labels_BT[:, part], batch.loss_weights[:, part])
        total = jax.tree.map(jnp.add, total, remat_sums(*arrays))
    return total


def _sums(
    config: ModelConfig,
    params: Params,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
) -> LossSums:
    logits_BTV = unembed(config, params, x_BTD)
    normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A gather of the label's logit would fail where the vocabulary is sharded.
    token_V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
    is_label_BTV = token_V == labels_BT[:, :, None]
    label_BT = jnp.sum(jnp.where(is_label_BTV, logits_BTV, 0.0), axis=-1)
    nll = jnp.sum((normaliser_BT - label_BT) * weights_BT)
    return LossSums(nll, jnp.sum(jnp.square(normaliser_BT) * weights_BT))
