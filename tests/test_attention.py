"""Attention agrees with loops over heads and positions; rotations with their algebra."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from stackjax.model.attention import causal_attention, rotate, rotation

B, T, H = 2, 5, 4


def attention_by_loops(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """Softmax attention in float64, one query at a time."""
    rows, seq_len, num_heads, head_dim = q_BTNH.shape
    group = num_heads // k_BTKH.shape[2]
    out_BTNH = np.zeros(q_BTNH.shape)
    for b in range(rows):
        for n in range(num_heads):
            for t in range(seq_len):
                seen = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]]
                query, keys = q_BTNH[b, t, n], k_BTKH[b, seen, n // group]
                scores = np.exp(keys @ query / np.sqrt(head_dim))
                out_BTNH[b, t, n] = scores / scores.sum() @ v_BTKH[b, seen, n // group]
    return out_BTNH


def random_heads(num_heads, num_kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [rng.normal(size=(B, T, n, H)).astype(np.float32) for n in heads]


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    kv_heads=st.sampled_from([1, 2, 4]),
    segments=st.lists(st.integers(0, 2), min_size=B * T, max_size=B * T),
)
def test_outputs_are_those_of_loops_whatever_the_segments(kv_heads, segments):
    # Segments need not be sorted: packing best-fit may put them anywhere.
    segments_BT = np.reshape(np.int32(segments), (B, T))
    q, k, v = random_heads(4, kv_heads)
    out = causal_attention(*map(jnp.asarray, (q, k, v)), jnp.asarray(segments_BT), "xla")
    # Float32 sums of a handful of terms of size one.
    np.testing.assert_allclose(out, attention_by_loops(q, k, v, segments_BT), atol=2e-6)


def test_in_bfloat16_the_softmax_is_still_float32():
    q, k, v = (jnp.bfloat16(x) for x in random_heads(4, 2, seed=1))
    one = jnp.zeros((B, T), jnp.int32)
    out = causal_attention(8 * q, k, v, one, "xla")
    wide = [np.float64(x) for x in (8 * q, k, v)]
    # Only weights and result may round, to 8 bits; logits of size 30 that were rounded
    # would move the weights by a tenth.
    error = np.abs(np.float64(out) - attention_by_loops(*wide, np.zeros((B, T))))
    assert error.max() < 0.03


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.integers(0, 4000), st.integers(0, 50), st.integers(0, 4000))
def test_rotated_products_depend_on_the_distance_alone(position, distance, shift):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, H)), jnp.float32)

    def product(first):
        turn = rotation(jnp.int32([[first, first + distance]]), H, 1e4)
        query, key = np.asarray(rotate(x, *turn))[0, :, 0]
        return query @ key

    # Angles up to 4000 are float32: their sine is off by up to 4000 / 2**24, twice.
    assert product(position) == pytest.approx(product(position + shift), abs=5e-3)


def test_channel_i_turns_with_channel_i_plus_half():
    position, theta = 3, 100.0
    x = np.arange(1.0, H + 1)
    turn = rotation(jnp.int32([[position]]), H, theta)
    turned = np.asarray(rotate(jnp.float32(x)[None, None, None], *turn))[0, 0, 0]
    for i in range(H // 2):
        angle = position * theta ** (-2 * i / H)
        cosine, sine = np.cos(angle), np.sin(angle)
        pair = (
            x[i] * cosine - x[i + H // 2] * sine,
            x[i + H // 2] * cosine + x[i] * sine,
        )
        # Float32 of numbers below ten.
        assert (turned[i], turned[i + H // 2]) == pytest.approx(pair, abs=1e-5)
