"""Remat policies and loss chunks control stored and recomputed arrays."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import equations, tiny_model

from stackjax import model
from stackjax.data.batch import Batch

SHAPE = (1, 512)
VOCAB = 4096


def gradient_of(**fields):
    """Returns the jitted parameter gradient, and its abstract arguments."""
    sizes = {
        "embed_dim": 64,
        "mlp_dim": 192,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "vocab_multiple": 1,
    }
    config = tiny_model(num_layers=4, **(sizes | fields))
    params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    dtypes = Batch(jnp.int32, jnp.int32, jnp.int32, jnp.float32)
    batch = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(SHAPE, dtype), dtypes)

    def objective(params, batch):
        return model.next_token_loss(config, params, batch).objective

    return jax.jit(jax.grad(objective)), params, batch


@functools.cache
def num_products(remat):
    """Returns the numbers of weight products and attention products per layer."""
    gradient, *args = gradient_of(remat=remat, vocab_size=8)
    counts = collections.Counter()
    for equation in equations(gradient.trace(*args).jaxpr.jaxpr):
        if equation.primitive.name == "dot_general":
            _, (batched, _) = equation.params["dimension_numbers"]
            counts["heads" if batched else "weights"] += 1
    # The head has one forward and two backward products.
    return counts["weights"] - 3, counts["heads"]


def test_remat_recomputes_attention_then_gate_and_value_then_everything():
    # Seven products of weights, and two of heads in each of four blocks of queries; each has
    # two products in the backward pass. Nothing needs the result of the layer's last one.
    assert num_products("none") == (3 * 7, 3 * 2 * 4)
    assert num_products("dots") == (3 * 7, 4 * 2 * 4)
    # Gate and value again.
    assert num_products("lean") == (3 * 7 + 2, 4 * 2 * 4)
    assert num_products("full") == (4 * 7 - 1, 4 * 2 * 4)


@functools.cache
def compiled(remat, loss_chunk, scan_unroll=1):
    gradient, *args = gradient_of(remat=remat, loss_chunk=loss_chunk, scan_unroll=scan_unroll)
    return gradient.lower(*args).compile()


@pytest.mark.sample(3)
@pytest.mark.parametrize("scan_unroll", [1, 0, 2])
def test_remat_policies_are_ordered_by_memory(scan_unroll):
    none, dots, lean, full = (
        compiled(remat, 64, scan_unroll).memory_analysis().temp_size_in_bytes
        for remat in ("none", "dots", "lean", "full")
    )
    # Four layers store at least 64 + 2 x 192 float32 channels per token.
    assert none > 1.2 * dots
    assert dots > lean > full
    assert dots > 1.2 * full


@pytest.mark.parametrize(("loss_chunk", "holds"), [(64, False), (512, True)])
def test_loss_chunks_limit_the_memory_for_logits(loss_chunk, holds):
    rows, seq_len = SHAPE
    shapes = rf"f32\[({rows},{seq_len},{VOCAB}|{rows * seq_len},{VOCAB}|{seq_len},{VOCAB})\]"
    text = compiled("full", loss_chunk).as_text()
    assert bool(re.search(shapes, text)) == holds
    assert re.search(rf"f32\[{rows},{loss_chunk},{VOCAB}\]", text)
