"""A plain train step in JAX, without optimization for speed.

Shapes: B batch, T query time, S key time, D embed, N heads, H head_dim, F mlp, V vocabulary.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scripts.peers.peer import LEARNING_RATE, Peer, Shape


def build(shape: Shape) -> Peer:
    """Returns the step; the first call compiles."""
    tx = optax.adamw(LEARNING_RATE, b1=0.9, b2=0.95, weight_decay=0.1)
    params = jax.jit(functools.partial(init, shape))(jax.random.key(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, tokens_BT: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens_BT, shape.num_heads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return Peer(
        step=step,
        state=(params, tx.init(params)),
        batch=jnp.asarray(shape.tokens()),
        wait=jax.block_until_ready,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
    )


def init(shape: Shape, key: jax.Array) -> Any:
    """Returns float32 parameters."""
    keys = iter(jax.random.split(key, 2 + 7 * shape.num_layers))

    def matrix(fan_in: int, fan_out: int) -> jax.Array:
        return jax.random.normal(next(keys), (fan_in, fan_out)) / math.sqrt(fan_in)

    embed, mlp = shape.embed_dim, shape.mlp_dim
    layers = [
        {
            "attention_norm": jnp.ones(embed),
            "query": matrix(embed, embed),
            "key": matrix(embed, embed),
            "value": matrix(embed, embed),
            "out": matrix(embed, embed),
            "mlp_norm": jnp.ones(embed),
            "gate": matrix(embed, mlp),
            "up": matrix(embed, mlp),
            "down": matrix(mlp, embed),
        }
        for _ in range(shape.num_layers)
    ]
    return {
        "embedding": 0.02 * jax.random.normal(next(keys), (shape.vocab_size, embed)),
        "layers": layers,
        "final_norm": jnp.ones(embed),
        "head": matrix(embed, shape.vocab_size),
    }


def loss_fn(params: Any, tokens_BT: jax.Array, num_heads: int) -> jax.Array:
    """Returns the mean negative log-likelihood per token."""
    logits_BTV = apply(params, tokens_BT[:, :-1], num_heads)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    labels_BT1 = tokens_BT[:, 1:, None]
    return -jnp.take_along_axis(log_probs_BTV, labels_BT1, axis=-1).mean()


def apply(params: Any, tokens_BT: jax.Array, num_heads: int) -> jax.Array:
    """Returns the logits [B, T, V]."""
    x_BTD = params["embedding"][tokens_BT]
    for layer in params["layers"]:
        x_BTD += attention(layer, rms_norm(x_BTD, layer["attention_norm"]), num_heads)
        x_BTD += mlp(layer, rms_norm(x_BTD, layer["mlp_norm"]))
    return rms_norm(x_BTD, params["final_norm"]) @ params["head"]


def attention(layer: Any, x_BTD: jax.Array, num_heads: int) -> jax.Array:
    """Returns causal self-attention with rotary positions."""
    batch, seq_len, embed = x_BTD.shape
    heads = (batch, seq_len, num_heads, embed // num_heads)
    q_BTNH = rotate((x_BTD @ layer["query"]).reshape(heads))
    k_BSNH = rotate((x_BTD @ layer["key"]).reshape(heads))
    v_BSNH = (x_BTD @ layer["value"]).reshape(heads)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / math.sqrt(heads[-1])
    is_past_TS = jnp.tril(jnp.ones((seq_len, seq_len), bool))
    scores_BNTS = jnp.where(is_past_TS[None, None], scores_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(scores_BNTS)
    out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)
    return out_BTNH.reshape(x_BTD.shape) @ layer["out"]


def rotate(x_BTNH: jax.Array) -> jax.Array:
    """Returns queries or keys rotated by position."""
    _, seq_len, _, head_dim = x_BTNH.shape
    frequencies = 10_000.0 ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angles = jnp.arange(seq_len)[None, :, None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def mlp(layer: Any, x_BTD: jax.Array) -> jax.Array:
    """Returns SwiGLU."""
    return (jax.nn.silu(x_BTD @ layer["gate"]) * (x_BTD @ layer["up"])) @ layer["down"]


def rms_norm(x_BTD: jax.Array, gain_D: jax.Array) -> jax.Array:
    """Returns RMSNorm over the last axis."""
    mean_square = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
    return x_BTD * jax.lax.rsqrt(mean_square + 1e-5) * gain_D[None, None]
