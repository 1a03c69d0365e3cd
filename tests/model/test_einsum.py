"""Weight products sum in memory order, and weight gradients sum in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import equations, first_microbatch, mesh_of, random_batch, tiny_model

from stackjax import model
from stackjax.model.einsum import contract
from stackjax.model.transformer import HEAD_PRODUCT
from stackjax.sharding.partition import logical, on_mesh

SIZES = {"B": 8, "T": 256, "D": 16, "N": 4, "H": 6, "G": 2, "F": 20, "V": 24}
# Every weight product; either the activations or the results are larger.
PRODUCTS = ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DGF->BTGF", "BTF,FD->BTD"]
PRODUCTS += HEAD_PRODUCT.values()


def plain_contract(spec, x, w, out_sharding):
    """The same product, for automatic differentiation."""
    return jnp.einsum(spec, x, w.astype(x.dtype), out_sharding=out_sharding)


@pytest.mark.parametrize("spec", PRODUCTS)
def test_weight_gradients_over_many_tokens_have_float32_rounding(spec):
    of_x, of_w, of_out = spec.replace("->", ",").split(",")
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=[SIZES[axis] for axis in of]) for of in (of_x, of_w, of_out))
    x, g, w = jnp.bfloat16(x), jnp.bfloat16(g), jnp.float32(w)
    expected = np.einsum(f"{of_x},{of_out}->{of_w}", np.float64(x), np.float64(g))

    def gradient(product):
        _, pull = jax.vjp(lambda w: product(spec, x, w, None), w)
        (grad,) = jax.jit(pull)(g)
        assert grad.dtype == jnp.float32
        return np.abs(np.float64(grad) - expected).max() / np.abs(expected).max()

    # A sum of 2048 products that are exact in float32, in any order; and in bfloat16 its
    # result alone rounds to 2**-9.
    assert gradient(contract) < 2e-6
    assert gradient(plain_contract) > 2**-11


@pytest.mark.parametrize("spec", PRODUCTS)
def test_summed_axes_are_in_memory_order(spec):
    of_x, of_w, _ = spec.replace("->", ",").split(",")
    x, w = (jnp.zeros([SIZES[axis] for axis in of]) for of in (of_x, of_w))

    def value_and_gradients(x, w):
        value, pull = jax.vjp(lambda x, w: contract(spec, x, w, None), x, w)
        return value, pull(value)

    jaxpr = jax.make_jaxpr(value_and_gradients)(x, w).jaxpr
    summed = [
        contracted
        for equation in equations(jaxpr)
        if equation.primitive.name == "dot_general"
        for contracted in equation.params["dimension_numbers"][0]
    ]
    assert len(summed) == 6
    assert all(list(axes) == sorted(axes) for axes in summed)


def sums_over_tokens(function, *args):
    """Returns dtype and size of every product that is summed over devices."""
    (tokens,) = logical("batch")
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            spec = equation.invars[0].aval.sharding.spec
            if any(spec[axis] == tokens for axis in contracted):
                yield equation.outvars[0].aval.dtype, equation.outvars[0].aval.size


def test_weight_gradients_are_summed_over_devices_in_float32():
    config = tiny_model(compute_dtype="bfloat16", scan_unroll=1, loss_chunk=4)
    mesh = mesh_of("fsdp 8")
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
        batch = jax.tree.map(
            lambda field: jax.device_put(field, logical("batch", None)),
            first_microbatch(random_batch()),
        )

        def objective(params):
            return model.next_token_loss(config, params, batch).objective

        sums = list(sums_over_tokens(jax.grad(objective), on_mesh(abstract, mesh)))
    layers = {k: leaf for k, leaf in abstract["layers"].items() if not k.endswith("norm")}
    # Of a scan over layers, in which gate and value are multiplied apart, and of two chunks
    # of the loss.
    halves = layers.pop("gate_up").size // 2
    sizes = [leaf.size // config.num_layers for leaf in layers.values()]
    sizes += 2 * [halves // config.num_layers] + 2 * [abstract["head"].size]
    assert {str(dtype) for dtype, _ in sums} == {"float32"}
    assert sorted(size for _, size in sums) == sorted(sizes)
