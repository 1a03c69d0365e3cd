"""Attention matches loops over heads and positions; rotary positions obey their algebra."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import described_mesh, mesh_of, tiny_model
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from stackjax.model import attention_kernels
from stackjax.model.attention import causal_attention, choose_kernel
from stackjax.model.context_attention import query_pieces
from stackjax.model.masking import ANY_PAST, Masking
from stackjax.model.rotary import rotate, rotation
from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import logical

B, T, H = 2, 5, 4


def attention_by_loops(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """Returns softmax attention in float64, query by query."""
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


compiled_attention = jax.jit(causal_attention, static_argnums=4)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    kv_heads=st.sampled_from([1, 2, 4]),
    segments=st.lists(st.integers(0, 2), min_size=B * T, max_size=B * T),
)
def test_attention_matches_numpy_loops(kv_heads, segments):
    # Segments need not be sorted: packing best-fit may put them anywhere.
    segments_BT = np.reshape(np.int32(segments), (B, T))
    q, k, v = random_heads(4, kv_heads)
    out = compiled_attention(q, k, v, segments_BT, "xla")
    # Float32 sums with a few terms near 1.
    np.testing.assert_allclose(out, attention_by_loops(q, k, v, segments_BT), atol=2e-6)


def test_softmax_is_float32_for_bfloat16_inputs():
    q, k, v = (jnp.bfloat16(x) for x in random_heads(4, 2, seed=1))
    one = jnp.zeros((B, T), jnp.int32)
    out = causal_attention(8 * q, k, v, one, "xla")
    wide = [np.float64(x) for x in (8 * q, k, v)]
    # Only weights and result may round, to 8 bits; logits of size 30 that were rounded
    # would move the weights by a tenth.
    error = np.abs(np.float64(out) - attention_by_loops(*wide, np.zeros((B, T))))
    assert error.max() < 0.03


@pytest.fixture
def interpreted(monkeypatch):
    """Runs kernels on a CPU: splash interpreted, the cuDNN call by XLA."""
    for name in ("make_splash_mha_single_device", "make_splash_mha"):
        make = functools.partial(getattr(splash, name), interpret=True)
        monkeypatch.setattr(splash, name, make)
    if jax.default_backend() != "gpu":
        attend = jax.nn.dot_product_attention

        def attend_by_xla(*args, implementation, **options):
            assert implementation in ("cudnn", "xla")
            return attend(*args, implementation="xla", **options)

        monkeypatch.setattr(jax.nn, "dot_product_attention", attend_by_xla)


def kernel_inputs(dtype, rows, seq_len, num_kv_heads, head_dim):
    """Returns queries, keys, values, an output gradient, and segments with two documents."""
    rng = np.random.default_rng(0)
    shapes = [(rows, seq_len, n, head_dim) for n in (4, num_kv_heads, num_kv_heads, 4)]
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    cut = rng.integers(1, seq_len, (rows, 1))
    return jax.device_put((arrays, (np.arange(seq_len) >= cut).astype(np.int32)))


def plain_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, masking=ANY_PAST):
    """Returns attention with a float32 softmax over the full T x T products."""
    q_BTNH, k_BSKH, v_BSKH = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
    logits = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / q_BTNH.shape[-1] ** 0.5
    mask = np.tri(q_BTNH.shape[1], dtype=bool)[None]
    if masking.window is not None:
        mask = mask & ~np.tri(q_BTNH.shape[1], k=-masking.window, dtype=bool)
    if masking.cap is not None:
        logits = masking.cap * jnp.tanh(logits / masking.cap)
    if segments_BT is not None:
        mask &= segments_BT[:, :, None] == segments_BT[:, None, :]
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)


def value_and_gradients(attend, arrays, segments):
    """Returns the output and the gradients for queries, keys and values."""

    def run(q, k, v, g, segments):
        out, pull = jax.vjp(lambda *heads: attend(*heads, segments), q, k, v)
        return out, *pull(g.astype(out.dtype))

    return jax.jit(run)(*arrays, segments)


# Kernel, type, sequence length, key heads, channels, whether a row is two documents. XLA's
# blocks have 128, 128 and 44 queries; of 384, splash attention makes three blocks.
KERNELS = [
    ("xla", jnp.float32, 300, 2, 8, False),
    ("xla", jnp.float32, 300, 4, 8, True),
    ("xla", jnp.bfloat16, 300, 2, 8, True),
    ("splash", jnp.float32, 128, 2, 8, True),
    ("splash", jnp.float32, 384, 4, 8, False),
    ("splash", jnp.bfloat16, 128, 2, 8, True),
    ("cudnn", jnp.bfloat16, 256, 2, 64, False),
    ("cudnn", jnp.bfloat16, 256, 2, 64, True),
    ("cudnn", jnp.bfloat16, 256, 4, 64, False),
    ("cudnn", jnp.bfloat16, 256, 4, 64, True),
]
# The roundings of a sum of up to 300 products of size one; in bfloat16 those of weights,
# which are below one, of the result and of its gradient, to 8 bits each.
TOLERANCES = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


@pytest.mark.sample(3)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kernel", "dtype", "seq_len", "num_kv_heads", "head_dim", "documents"), KERNELS
)
def test_kernels_match_plain_softmax_in_value_and_gradient(
    kernel, dtype, seq_len, num_kv_heads, head_dim, documents
):
    arrays, segments = kernel_inputs(dtype, 2, seq_len, num_kv_heads, head_dim)
    # None means a single segment.
    segments = segments if documents else None
    attend = functools.partial(causal_attention, kernel=kernel)
    found = value_and_gradients(attend, arrays, segments)
    expected = value_and_gradients(plain_attention, arrays, segments)
    for leaf, other in zip(found, expected, strict=True):
        assert leaf.dtype == dtype
        leaf, other = np.float32(leaf), np.float32(other)
        tolerance = TOLERANCES[dtype] * np.abs(other).max()
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance)


# Of 300 tokens, XLA's blocks have 75 queries, or with a window fewer.
MASKINGS = [
    ("xla", jnp.float32, 300, Masking(window=2)),
    ("xla", jnp.float32, 300, Masking(window=40)),
    ("xla", jnp.float32, 300, Masking(window=150, cap=0.5)),
    ("xla", jnp.bfloat16, 300, Masking(window=100, cap=0.5)),
    ("xla", jnp.float32, 300, Masking(window=400)),
    ("splash", jnp.float32, 384, Masking(window=100)),
    ("splash", jnp.float32, 128, Masking(window=60, cap=0.5)),
    ("cudnn", jnp.bfloat16, 256, Masking(window=100)),
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("kernel", "dtype", "seq_len", "masking"), MASKINGS)
def test_windows_and_caps_match_plain_softmax_in_value_and_gradient(
    kernel, dtype, seq_len, masking, documents, monkeypatch
):
    monkeypatch.setattr(attention_kernels, "_MASK_BLOCK", 100)
    monkeypatch.setattr(attention_kernels, "_KEY_MULTIPLE", 8)
    arrays, segments = kernel_inputs(dtype, 2, seq_len, 2, 8)
    segments = segments if documents else None
    attend = functools.partial(causal_attention, kernel=kernel, masking=masking)
    found = value_and_gradients(attend, arrays, segments)
    plain = functools.partial(plain_attention, masking=masking)
    expected = value_and_gradients(plain, arrays, segments)
    for leaf, other in zip(found, expected, strict=True):
        leaf, other = np.float32(leaf), np.float32(other)
        tolerance = TOLERANCES[dtype] * np.abs(other).max()
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance)


def test_blocks_skip_the_keys_before_a_window():
    x = jnp.zeros((1, 2048, 1, 8))

    def flops(window):
        attend = functools.partial(
            causal_attention, segments_BT=None, kernel="xla", masking=Masking(window)
        )
        return jax.jit(attend).lower(x, x, x).cost_analysis()["flops"]

    # Blocks of 128 queries have up to 255 keys, and without a window 1280 on average.
    assert flops(128) < 0.25 * flops(None)


@pytest.mark.usefixtures("interpreted")
def test_blocks_of_queries_with_document_masks_match_plain_softmax(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_MASK_BLOCK", 100)
    arrays, segments = kernel_inputs(jnp.float32, 2, 256, 2, 8)
    attend = functools.partial(causal_attention, kernel="cudnn")
    found = value_and_gradients(attend, arrays, segments)
    expected = value_and_gradients(plain_attention, arrays, segments)
    for leaf, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_document_masks_of_cudnn_have_a_block_of_queries(monkeypatch):
    shapes = []

    def attend(q, k, v, *, mask, is_causal, implementation):
        shapes.append(mask.shape)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    q = jax.ShapeDtypeStruct((2, 9000, 4, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 9000), jnp.int32)
    run = functools.partial(causal_attention, kernel="cudnn")
    assert jax.eval_shape(run, q, q, q, segments) == q
    assert shapes == [(2, 1, 4096, 4096), (2, 1, 4096, 8192), (2, 1, 808, 9000)]


@pytest.mark.usefixtures("interpreted")
def test_kernel_runs_on_each_devices_rows_and_heads():
    arrays, segments = kernel_inputs(jnp.float32, 4, 128, 2, 8)
    expected = value_and_gradients(plain_attention, arrays, segments)
    with jax.set_mesh(mesh_of("fsdp 4, tensor 2")):
        heads = logical("batch", None, "heads", None)
        arrays = [jax.device_put(x, heads) for x in arrays]
        segments = jax.device_put(segments, logical("batch", None))
        attend = functools.partial(causal_attention, kernel="splash")
        found = value_and_gradients(attend, arrays, segments)
    for leaf, other in zip(found, expected, strict=True):
        # One row with two heads, or with one key head.
        assert leaf.sharding.shard_shape(leaf.shape) == (1, 128, leaf.shape[2] // 2, 8)
        # The tolerance is as above.
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * np.abs(other).max())


# Kernel, type, mesh, sequence length, key heads, and pieces of the queries: 1 if each device
# gets whole sequences for some heads.
CONTEXT = [
    ("xla", jnp.float32, {"fsdp": 2, "context": 4}, 24, 4, 1),
    ("xla", jnp.float32, {"fsdp": 2, "context": 4}, 24, 2, 8),
    ("xla", jnp.float32, {"context": 3}, 24, 2, 6),
    ("cudnn", jnp.bfloat16, {"context": 2, "tensor": 2}, 64, 4, 1),
    ("cudnn", jnp.bfloat16, {"context": 2, "tensor": 2}, 64, 2, 4),
    ("splash", jnp.float32, {"fsdp": 2, "context": 2, "tensor": 2}, 128, 4, 1),
    ("splash", jnp.float32, {"fsdp": 2, "context": 2, "tensor": 2}, 512, 2, 4),
    ("splash", jnp.bfloat16, {"context": 4}, 1024, 2, 8),
]
CONTEXT_WINDOWS = [
    ("xla", jnp.float32, {"fsdp": 2, "context": 4}, 24, 4, Masking(7, 0.5)),
    ("xla", jnp.float32, {"context": 3}, 24, 2, Masking(7)),
    ("splash", jnp.float32, {"fsdp": 2, "context": 2}, 512, 1, Masking(150, 0.5)),
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kernel", "dtype", "sizes", "seq_len", "num_kv_heads", "masking"), CONTEXT_WINDOWS
)
def test_sharded_sequences_have_windows_and_caps(
    kernel, dtype, sizes, seq_len, num_kv_heads, masking
):
    arrays, segments = kernel_inputs(dtype, 2, seq_len, num_kv_heads, 8)
    plain = functools.partial(plain_attention, masking=masking)
    expected = value_and_gradients(plain, arrays, segments)
    devices = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(build_mesh(MeshConfig(**sizes), devices)):
        arrays = [jax.device_put(x, logical("batch", "seq", "heads", None)) for x in arrays]
        segments = jax.device_put(segments, logical("batch", "seq"))
        attend = functools.partial(causal_attention, kernel=kernel, masking=masking)
        found = value_and_gradients(attend, arrays, segments)
        if kernel == "xla" and num_kv_heads == 2:
            capped = functools.partial(attend, masking=Masking(7, 0.5))
            with pytest.raises(UserError, match=r"attention_cap .* mesh\.context"):
                capped(*arrays[:3], segments)
    for leaf, other in zip(found, expected, strict=True):
        leaf, other = np.float32(leaf), np.float32(other)
        tolerance = TOLERANCES[dtype] * np.abs(other).max()
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance)


@pytest.mark.sample(7)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype", "sizes", "seq_len", "num_kv_heads", "pieces"), CONTEXT
)
def test_sharded_sequences_do_not_change_attention(
    kernel, dtype, sizes, seq_len, num_kv_heads, pieces, documents
):
    arrays, segments = kernel_inputs(dtype, 2, seq_len, num_kv_heads, 8)
    segments = segments if documents else None
    expected = value_and_gradients(plain_attention, arrays, segments)
    devices = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(build_mesh(MeshConfig(**sizes), devices)):
        assert query_pieces(num_kv_heads) == pieces
        heads = logical("batch", "seq", "heads", None)
        arrays = [jax.device_put(x, heads) for x in arrays]
        if documents:
            segments = jax.device_put(segments, logical("batch", "seq"))
        attend = functools.partial(causal_attention, kernel=kernel)
        found = value_and_gradients(attend, arrays, segments)
    for leaf, other in zip(found, expected, strict=True):
        assert leaf.sharding.spec == heads
        leaf, other = np.float32(leaf), np.float32(other)
        tolerance = TOLERANCES[dtype] * np.abs(other).max()
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("seq_len", [128, 384, 640, 2048])
def test_splash_attention_supports_every_chosen_length(seq_len):
    x = jax.ShapeDtypeStruct((1, seq_len, 2, 64), jnp.bfloat16)
    attend = functools.partial(causal_attention, segments_BT=None, kernel="splash")
    assert jax.eval_shape(attend, x, x, x) == x


H100 = "NVIDIA H100 80GB HBM3", "gpu"
# Described GPUs have the platform "cuda".
B200 = "NVIDIA B200", "cuda"
V100 = "Tesla V100-SXM2-16GB", "gpu"
MI300X = "AMD Instinct MI300X", "gpu"
TPU = "TPU v5", "tpu"
CPU = "cpu", "cpu"


# Device kind and platform, type, head_dim, sequence length, and the kernel for them.
CHOICES = [
    (H100, jnp.bfloat16, 64, 2048, "cudnn"),
    (H100, jnp.bfloat16, 128, 1000, "cudnn"),
    (H100, jnp.float32, 64, 2048, "xla"),
    (H100, jnp.bfloat16, 160, 2048, "xla"),
    (H100, jnp.bfloat16, 4, 2048, "xla"),
    (H100, jnp.bfloat16, 64, 2047, "xla"),
    (MI300X, jnp.bfloat16, 64, 2048, "xla"),
    (B200, jnp.bfloat16, 64, 2048, "cudnn"),
    (V100, jnp.bfloat16, 64, 2048, "xla"),
    (TPU, jnp.bfloat16, 64, 2048, "splash"),
    (TPU, jnp.float32, 256, 640, "splash"),
    (TPU, jnp.bfloat16, 64, 2000, "xla"),
    (CPU, jnp.float32, 64, 2048, "xla"),
    (CPU, jnp.bfloat16, 64, 2048, "xla"),
]


@pytest.mark.parametrize(("device", "dtype", "head_dim", "seq_len", "kernel"), CHOICES)
def test_auto_chooses_the_fastest_kernel_on_the_meshs_devices(
    device, dtype, head_dim, seq_len, kernel
):
    config = tiny_model(head_dim=head_dim)
    with jax.sharding.use_abstract_mesh(described_mesh(*device)):
        assert choose_kernel(config, dtype, seq_len) == kernel
        for named in ("xla", "cudnn", "splash"):
            config = dataclasses.replace(config, attention=named)
            assert choose_kernel(config, dtype, seq_len) == named


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.integers(0, 4000), st.integers(0, 50), st.integers(0, 4000))
def test_rotary_products_depend_only_on_distance(position, distance, shift):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, H)), jnp.float32)

    def product(first):
        turn = rotation(jnp.int32([[first, first + distance]]), H, 1e4)
        query, key = np.asarray(rotate(x, *turn))[0, :, 0]
        return query @ key

    # Float32 angles up to 4000 give sine errors up to 4000 / 2**24, twice.
    assert product(position) == pytest.approx(product(position + shift), abs=5e-3)


def test_rotary_pairs_channel_i_with_i_plus_half():
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
        # Float32 rounding for numbers below ten.
        assert (turned[i], turned[i + H // 2]) == pytest.approx(pair, abs=1e-5)


@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)])
def test_gradient_of_a_rotation_turns_back(dtype, rounding):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, H)), dtype)
    turn = rotation(jnp.arange(10).reshape(2, 5), H, 100.0)
    turned, pullback = jax.vjp(lambda x: rotate(x, *turn), x)
    (back,) = pullback(turned)
    np.testing.assert_allclose(np.float32(back), np.float32(x), atol=rounding)
    assert np.abs(np.float32(turned - x)).max() > 0.5
