"""Growth under CompleteP, in float64 against transformers."""

import functools

import jax
import jax.numpy as jnp
import judge
import numpy as np
import pytest
from completep import standard, with_completep
from conftest import GROWTHS, MODELS, tiny_model
from float64_growth import KEY, grow, random_values, source_params

from stackjax import model
from stackjax.growth import (
    DepthZero,
    Interleave,
    Learn,
    Noise,
    Stack,
    WidthSplit,
    chain,
)
from stackjax.growth.grow_tree import grow_tree
from stackjax.model.config import CompleteP
from stackjax.model.transformer import hidden
from stackjax.runtime.errors import UserError

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 8), dtype=np.int32)
# As in `test_function_preserving`.
FLOAT64, DIFFERENT = 1e-12, 1e-3


def logits(config, params):
    """Returns the logits from transformers."""
    return judge.logits(*standard(config, params), TOKENS)


def cases():
    for model_name, config in MODELS.items():
        for name, growth in GROWTHS.items():
            scaled = with_completep(config)
            try:
                growth.target_config(scaled)
            except UserError:
                continue
            yield pytest.param(growth, scaled, id=f"{model_name}-{name}")


@pytest.mark.sample(3)
@pytest.mark.parametrize(("growth", "config"), list(cases()))
def test_growth_preserves_the_function_as_it_says(growth, config):
    error = logits(*grow(growth, config, closes_masks=True)) - logits(
        config, source_params(config)
    )
    if growth.preserves_function == "never":
        assert np.abs(error).max() > DIFFERENT
    else:
        assert np.abs(error).max() < FLOAT64


@pytest.mark.parametrize("growth", [Learn(embed=2), Learn(2, embed=2, mlp=2, heads=2)], ids=str)
def test_learned_growth_of_channels_is_refused(growth):
    with pytest.raises(UserError, match=r"learn\(.*embed=2.* grows model.embed_dim"):
        growth.target_config(with_completep(MODELS["gqa"]))
    assert Learn(2, mlp=2).target_config(with_completep(MODELS["gqa"])).mlp_dim == 40


COPIES = {"stack": Stack(2), "interleave": Interleave(2), "learn": Learn(2)}


@pytest.mark.parametrize("name", COPIES)
def test_copied_layers_keep_their_values_and_halve_their_branches(name):
    config = with_completep(MODELS["gqa"])
    target, grown = grow(COPIES[name], config, closes_masks=True)
    _, copies = standard(target, grown)
    _, source = standard(config, source_params(config))
    sources = COPIES[name].axis_maps(config)["layers"].sources
    for leaf in ("query", "mlp_norm", "out", "down"):
        factor = 0.5 if leaf in ("out", "down") else 1
        expected = factor * source["layers"][leaf][list(sources)]
        np.testing.assert_allclose(copies["layers"][leaf], expected, rtol=1e-12)


def branch_error(growth, config, size):
    """Returns the change of the logits by growth, with branches times `size`."""
    params = source_params(config)
    layers = dict(params["layers"])
    for name in ("out", "down"):
        layers[name] = size * layers[name]
    params = {**params, "layers": layers}
    axes = model.logical_axes(config)
    target = growth.target_config(config)
    with jax.enable_x64(True):
        fresh = functools.partial(random_values, axes=axes, seed=1)
        grown = growth.target_params(params, axes, config, key=KEY, fresh=fresh)
    run = logits if config.completep else lambda *model: judge.logits(*model, TOKENS)
    error = run(target, jax.tree.map(np.asarray, grown)) - run(config, params)
    return np.sqrt(np.mean(np.square(error)))


@pytest.mark.parametrize("name", ["stack", "interleave"])
def test_copied_layers_change_the_function_in_second_order_of_the_branches(name):
    config, sizes = MODELS["gqa"], (2**-8, 2**-10)
    for each, order in ((with_completep(config), 2), (config, 1)):
        large, small = (branch_error(COPIES[name], each, size) for size in sizes)
        assert np.log2(large / small) / 2 == pytest.approx(order, abs=0.05)


def gradient(config, params):
    """Returns the gradient of the loss."""

    def loss(params):
        logits = model.apply(config, params, TOKENS, POSITIONS, None)
        chosen = jax.nn.log_softmax(logits[:, :-1, : config.vocab_size])
        return -jnp.mean(jnp.take_along_axis(chosen, TOKENS[:, 1:, None], axis=-1))

    return jax.jit(jax.grad(loss))(params)


POSITIONS = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
SPLITS = {
    "all axes": WidthSplit(embed=2, mlp=2, heads=2),
    "chain": chain(WidthSplit(embed=2), WidthSplit(mlp=2)),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("tied", [False, True])
def test_grown_moments_are_the_gradients_of_copies(name, tied):
    growth = SPLITS[name]
    config = with_completep(tiny_model(tie_head=tied, compute_dtype="float32"))
    axes, params = model.logical_axes(config), source_params(config)
    target, grown = grow(growth, config, closes_masks=True)
    narrow = functools.partial(jax.tree.map, np.float32)
    source_gradient = gradient(config, narrow(params))
    expected = gradient(target, narrow(grown))
    for order in (1, 2):
        moment = jax.tree.map(lambda leaf: leaf**order, source_gradient)  # noqa: B023
        found = growth.target_moment(moment, axes, config, order=order)
        for leaf, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            wanted = np.asarray(wanted) ** order
            np.testing.assert_allclose(leaf, wanted, atol=1e-4 * np.abs(wanted).max())


def test_moments_of_copied_layers_are_divided_by_the_growth_factor():
    config = with_completep(MODELS["gqa"])
    axes, moment = model.logical_axes(config), source_params(config)
    for order in (0, 1, 2):
        found = Stack(4).target_moment(moment, axes, config, order=order)
        expected = Stack(4).grow_moment(moment, axes, config, order=order)
        np.testing.assert_allclose(
            found["layers"]["query"], expected["layers"]["query"] / 4**order, rtol=1e-6
        )
        np.testing.assert_array_equal(found["head"], expected["head"])


def test_old_layers_of_zero_growth_have_the_gradients_of_the_source():
    """Under CompleteP, output matrices grow by the factor lost by their branches."""
    config, growth = with_completep(MODELS["gqa"]), DepthZero(2)
    target, grown = grow(growth, config, closes_masks=True)
    np.testing.assert_allclose(
        grown["layers"]["out"][::2], 2 * source_params(config)["layers"]["out"], rtol=1e-12
    )
    narrow = functools.partial(jax.tree.map, np.float32)
    before = gradient(config, narrow(source_params(config)))
    after = gradient(target, narrow(grown))
    moment = growth.target_moment(before, model.logical_axes(config), config, order=1)
    for name, leaf in after["layers"].items():
        np.testing.assert_allclose(leaf[::2], moment["layers"][name][::2], atol=1e-5)


def test_noise_has_the_size_of_initial_values():
    sizes = {"num_layers": 4, "embed_dim": 64, "num_heads": 8}
    base = CompleteP.of(tiny_model(num_layers=2))
    config = tiny_model(vocab_size=96, **sizes, completep=base)
    initial = jax.jit(model.init, static_argnums=0)(config, KEY)
    noise = jax.jit(grow_tree, static_argnums=(0, 1))(Noise(1.0), config, initial, KEY)
    for name in ("embedding", "head"):
        found, expected = (float(np.std(each[name])) for each in (noise, initial))
        assert found == pytest.approx(expected, rel=0.1)
    for name in ("query", "gate_up", "value"):
        found, expected = (float(np.std(each["layers"][name])) for each in (noise, initial))
        assert found == pytest.approx(expected, rel=0.1)


def initial_error(growth, num_layers):
    """Returns the relative change of the last stream at initial values, embeddings near 1."""
    sizes = {"embed_dim": 32, "mlp_dim": 64, "num_layers": num_layers}
    base = CompleteP.of(tiny_model(**sizes | {"num_layers": 2}))
    config = tiny_model(**sizes, completep=base)
    axes, target = model.logical_axes(config), growth.target_config(config)

    @jax.jit
    def error(key):
        params = model.init(config, key)
        params["embedding"] /= jnp.std(params["embedding"])
        grown = growth.target_params(params, axes, config, key=key, fresh=params.get)
        before = hidden(config, params, TOKENS, POSITIONS, None)
        after = hidden(target, grown, TOKENS, POSITIONS, None)
        return jnp.sqrt(jnp.mean(jnp.square(after - before)) / jnp.mean(jnp.square(before)))

    return float(error(KEY))


@pytest.mark.parametrize(("name", "order"), [("stack", -1), ("interleave", -1.5)])
def test_error_of_copied_layers_falls_with_the_depth_of_the_source(name, order):
    depths = (4, 16, 64)
    errors = [initial_error(COPIES[name], depth) for depth in depths]
    slope, _ = np.polyfit(np.log2(depths), np.log2(errors), 1)
    assert slope == pytest.approx(order, abs=0.2)
