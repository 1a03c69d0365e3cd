"""Sampling from logits by temperature, top-k and top-p.

Shapes: B batch, V vocabulary, K candidates.
"""

import jax
import jax.numpy as jnp

from stackjax.options import Sampling


def sample(logits_BV: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Returns a token for each row, int32 [B], independent of other rows."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BK, tokens_BK = candidates(logits_BV, sampling)
    rows = jnp.arange(len(logits_BK))
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    choice_B = jax.vmap(jax.random.categorical)(keys_B, logits_BK)
    return jnp.take_along_axis(tokens_BK, choice_B[:, None], axis=-1)[:, 0]


def candidates(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Returns the candidates' logits, float32 [B, K], and tokens, [B, K].

    Logits are divided by the temperature, and -inf for excluded tokens. Candidates are sorted
    by probability if `top_k` or `top_p` is set.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    # Shift the maximum to 0, to avoid overflow at low temperature.
    logits_BV -= jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV /= sampling.temperature
    vocab_size = logits_BV.shape[-1]
    if sampling.top_k is None and sampling.top_p == 1:
        return logits_BV, jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    kept = vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size)
    logits_BK, tokens_BK = jax.lax.top_k(logits_BV, kept)
    probabilities_BK = jax.nn.softmax(logits_BK, axis=-1)
    before_BK = jnp.cumsum(probabilities_BK, axis=-1) - probabilities_BK
    # top_p = 1 keeps all tokens, even if rounding makes the sum exceed 1.
    is_kept_BK = (before_BK < sampling.top_p) | (sampling.top_p == 1)
    return jnp.where(is_kept_BK, logits_BK, -jnp.inf), tokens_BK
