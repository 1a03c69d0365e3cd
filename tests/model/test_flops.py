"""Sizes and FLOPs match published numbers and counts by hand."""

import dataclasses
import functools
import types

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from conftest import KINDS, first_microbatch, phase_of, random_batch, tiny_model

from stackjax import model
from stackjax.model import flops
from stackjax.model.config import ModelConfig


def paper_config(layers, embed, heads, head_dim, kv_heads, mlp):
    return ModelConfig(
        vocab_size=32000,
        num_layers=layers,
        embed_dim=embed,
        mlp_dim=mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


# The models of arXiv:2405.15319 in the released code: billions of parameters without
# embedding and head, and in total; and a sixth of the FLOPs per token, in billions,
# that the two axes of the published figures give.
PAPER = {
    "410M": (paper_config(24, 1024, 16, 64, 16, 2816), "0.308", "0.374", 0.374),
    "1.1B": (paper_config(24, 2048, 32, 64, 32, 5632), "1.233", "1.364", 1.364),
    "3B": (paper_config(32, 2560, 20, 128, 4, 7040), "2.234", "2.397", 2.398),
    "7B": (paper_config(32, 4096, 32, 128, 8, 11008), "5.671", "5.933", 5.933),
}

TINY = ModelConfig(
    vocab_size=11,
    num_layers=3,
    embed_dim=8,
    mlp_dim=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)


def parameter_shapes(config):
    """Returns the shapes of all parameters, written out."""
    d, v, f = config.embed_dim, config.vocab_size, config.mlp_dim
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    layer = [(d,), (d, n, h), (d, k, h), (d, k, h), (n, h, d), (d,), (d, 2, f), (f, d)]
    if config.qk_norm:
        layer += [(h,), (h,)]
    if config.qkv_bias:
        layer += [(n, h), (k, h), (k, h)]
    outer = [(v, d), (d,)] + ([] if config.tie_head else [(d, v)])
    return outer + layer * config.num_layers


def size(shape):
    return shape[0] * size(shape[1:]) if shape else 1


def fake_device(kind):
    return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize("name", PAPER)
def test_num_params_match_the_paper(name):
    config, non_embedding, total, _ = PAPER[name]
    tables = 2 * config.vocab_size * config.embed_dim
    assert f"{flops.num_params(config) / 1e9:.3f}" == total
    assert f"{(flops.num_params(config) - tables) / 1e9:.3f}" == non_embedding


@pytest.mark.parametrize("name", PAPER)
def test_flops_per_token_match_the_published_plots(name):
    config, _, _, sixth = PAPER[name]
    # The plot axes were read to about three digits.
    assert flops.flops_6nd(config) / 6e9 == pytest.approx(sixth, abs=1e-3)


def test_base_of_the_1b_model_has_a_quarter_of_the_layers():
    base = dataclasses.replace(PAPER["1.1B"][0], num_layers=6)
    assert f"{flops.num_params(base) / 1e9:.3f}" == "0.439"


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tie_head", [False, True])
def test_num_params_match_all_arrays(tie_head, qk_norm, qkv_bias):
    config = dataclasses.replace(TINY, tie_head=tie_head, qk_norm=qk_norm, qkv_bias=qkv_bias)
    assert flops.num_params(config) == sum(map(size, parameter_shapes(config)))


@pytest.mark.parametrize("name", KINDS)
def test_num_params_match_the_arrays_of_init(name):
    config = dataclasses.replace(KINDS[name], vocab_multiple=1)
    params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    arrays = jax.tree.leaves(params)
    assert flops.num_params(config) == sum(leaf.size for leaf in arrays)
    in_layers = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    assert flops.num_layer_params(config) == in_layers


def test_mlp_without_a_gate_has_two_products():
    ungated = dataclasses.replace(TINY, gated=False)
    saved = 3 * 2 * TINY.num_layers * TINY.embed_dim * TINY.mlp_dim
    assert flops.matmul_flops(TINY, 16) - flops.matmul_flops(ungated, 16) == saved


def test_matmul_flops_add_up_over_a_list_of_products():
    t, d, h, v = 16, 8, 6, 11
    # (rows, inner, columns) of every product in a forward pass over one sequence.
    heads = [(t, d, h)] * (4 + 2 + 2) + [(t, h, d)] * 4
    attention = [(t, h, t), (t, t, h)] * 4
    layer = [*heads, *attention, (t, d, 2 * 20), (t, 20, d)]
    products = layer * 3 + [(t, d, v)]
    forward = sum(2 * rows * inner * columns for rows, inner, columns in products)
    assert flops.matmul_flops(TINY, t) * t == 3 * forward


def test_model_without_layers_costs_its_head():
    config = tiny_model(num_layers=0)
    assert flops.num_params(config) == 16 * (2 * 11 + 1)
    assert flops.matmul_flops(config, 8) == 3 * 2 * 16 * 11


def test_tied_head_counts_as_a_product():
    tied = dataclasses.replace(TINY, tie_head=True)
    assert flops.matmul_flops(tied, 16) == flops.matmul_flops(TINY, 16)


def test_vocabulary_padding_costs_nothing():
    padded = dataclasses.replace(TINY, vocab_multiple=512)
    assert flops.num_params(padded) == flops.num_params(TINY)
    assert flops.matmul_flops(padded, 16) == flops.matmul_flops(TINY, 16)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("an unknown device", None),
    ],
)
def test_peak_flops_are_dense_and_per_device(kind, teraflops):
    expected = None if teraflops is None else pytest.approx(teraflops * 1e12)
    assert flops.peak_flops(fake_device(kind)) == expected


def test_cpu_has_no_known_peak():
    assert flops.mfu(1e3, jax.devices("cpu")) is None


def test_mfu_is_unknown_with_an_unknown_device():
    devices = [fake_device("NVIDIA H200"), fake_device("an unknown device")]
    assert flops.mfu(1e3, devices) is None


def test_mfu_counts_the_peaks_of_all_devices():
    per_token = flops.matmul_flops(PAPER["1.1B"][0], 2048)
    one = flops.mfu(5e4 * per_token, [fake_device("NVIDIA H200")])
    eight = flops.mfu(4e5 * per_token, [fake_device("NVIDIA H200")] * 8)
    # 5e4 tokens/s times 6 (1.30e9 weights) + 12 L T D = 9.0 GFLOP, over 989.4 TFLOP/s.
    assert one == pytest.approx(0.455, abs=0.005)
    assert eight == pytest.approx(one)


# Which layers of three learn, and how often the matrices of each, and its attention, are
# multiplied with: once forward, once for the gradient of what comes in, once for their own.
# Attention has no weights of its own, so its two products come back whole or not at all.
PASSES = {
    "all": ((True, True, True), (3, 3, 3), (3, 3, 3)),
    "last": ((False, False, True), (1, 1, 3), (1, 1, 3)),
    "middle": ((False, True, False), (1, 3, 2), (1, 3, 3)),
    "first": ((True, False, False), (3, 2, 2), (3, 3, 3)),
    "all but the middle": ((True, False, True), (3, 2, 3), (3, 3, 3)),
}


@pytest.mark.parametrize("name", PASSES)
def test_frozen_layers_cost_fewer_products(name):
    trained, weights, attention = PASSES[name]
    # D 8, N 4, K 2, H 6, F 20, V 11, T 16: query, out, key, value, SwiGLU; scores, mixing.
    layer = 2 * (2 * 8 * 24 + 2 * 8 * 12 + 3 * 8 * 20)
    scores = 2 * (2 * 16 * 24)
    expected = sum(weights) * layer + sum(attention) * scores + 3 * 2 * 8 * 11
    assert flops.matmul_flops(TINY, 16, trained) == expected
    assert flops.matmul_flops(TINY, 16, list(trained)) == expected


@pytest.mark.parametrize("tie_head", [False, True])
@pytest.mark.parametrize("name", PASSES)
def test_frozen_parameters_cost_two_or_four_by_6nd(name, tie_head):
    trained, passes, _ = PASSES[name]
    layer = 2 * 8 * 24 + 2 * 8 * 12 + 3 * 8 * 20 + 2 * 8
    expected = sum(2 * count * layer for count in passes) + 6 * 8
    # A tied embedding trains as the head.
    expected += 6 * 11 * 8 if tie_head else (2 + 6) * 11 * 8
    config = dataclasses.replace(TINY, tie_head=tie_head)
    assert flops.flops_6nd(config, trained) == expected


@hypothesis.given(st.integers(1, 6), st.integers(1, 99), st.data())
def test_more_trained_layers_cost_more(num_layers, seq_len, data):
    config = dataclasses.replace(TINY, num_layers=num_layers)
    every = st.lists(st.booleans(), min_size=num_layers, max_size=num_layers)
    trained = data.draw(every.filter(any))
    more = [a or b for a, b in zip(trained, data.draw(every), strict=True)]
    costs = [flops.matmul_flops(config, seq_len, layers) for layers in (trained, more)]
    assert costs[0] <= costs[1] <= flops.matmul_flops(config, seq_len)
    assert flops.matmul_flops(config, seq_len, [True] * num_layers) == flops.matmul_flops(
        config, seq_len
    )
    forward = flops.matmul_flops(config, seq_len) / 3
    assert costs[0] > forward


MATMULS = ModelConfig(
    vocab_size=512,
    num_layers=3,
    embed_dim=256,
    mlp_dim=704,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    scan_unroll=0,  # all: XLA counts the body of a loop once.
)


# One block of attention: with more of them, less than the full square is computed.
SEQ_LEN = 64


def counted_flops(config, spans=None, *, backward=True):
    """Returns XLA's FLOP count for the loss of one sequence, or for the gradient."""
    batch = first_microbatch(random_batch(rows=1, seq_len=SEQ_LEN))

    def loss(params):
        return model.next_token_loss(config, params, batch, spans=spans).objective

    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    step = jax.jit(jax.grad(loss) if backward else loss)
    return step.lower(params).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_matmul_flops_match_xla(backward, loops):
    config = dataclasses.replace(MATMULS, loops=loops)
    expected = flops.matmul_flops(config, SEQ_LEN) * SEQ_LEN / (1 if backward else 3)
    # Other operations (norms, softmax, SwiGLU) are below 3 % at this width.
    assert counted_flops(config, backward=backward) == pytest.approx(expected, rel=0.03)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", [name for name in PASSES if name != "all"])
def test_matmul_flops_with_frozen_layers_match_xla(name):
    trained = PASSES[name][0]
    phase = phase_of(MATMULS, trained_layers=trained)
    expected = flops.matmul_flops(MATMULS, SEQ_LEN, trained) * SEQ_LEN
    # The tolerance is as above.
    assert counted_flops(MATMULS, phase.spans) == pytest.approx(expected, rel=0.03)
