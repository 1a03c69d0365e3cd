"""Looped models, and their growth into models with a layer for each loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import judge
import numpy as np
import pytest
from conftest import (
    KINDS,
    MODELS,
    first_microbatch,
    mesh_of,
    phase_of,
    random_batch,
    random_params,
    tiny_model,
    tiny_run,
)

from stackjax import model
from stackjax.growth import Stack, Untie, WidthSplit, chain, parse_growth
from stackjax.growth.grow_tree import grow_tree
from stackjax.model.config import CompleteP, untied
from stackjax.model.decoding import empty_cache, extend
from stackjax.model.flops import flops_6nd, matmul_flops, num_params
from stackjax.model.transformer import unembed
from stackjax.optimizers import AdamW
from stackjax.sharding.partition import on_mesh
from stackjax.training.expand import expand
from stackjax.training.train_state import TrainState, grow_state, init_state, train_step

B, T = 2, 8
KEY = jax.random.key(0)
LOOPED = {name: dataclasses.replace(config, loops=2) for name, config in MODELS.items()}
GQA = LOOPED["gqa"]
TOKENS = np.random.default_rng(0).integers(0, 11, (B, T), dtype=np.int32)
PLACES = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


def copied(params, loops):
    """Returns parameters with each layer repeated, in the order of the loops."""
    layers = {name: np.concatenate([leaf] * loops) for name, leaf in params["layers"].items()}
    return params | {"layers": layers}


def grow(growth, source, params):
    return jax.device_get(
        jax.jit(grow_tree, static_argnums=(0, 1))(growth, source, params, KEY)
    )


def logits(config, params):
    found = jax.jit(model.apply, static_argnums=0)(config, params, TOKENS, PLACES, None)
    return np.asarray(found)[..., : config.vocab_size]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("loops", [2, 3])
def test_looped_model_matches_transformers_with_repeated_layers(name, loops):
    config = dataclasses.replace(LOOPED[name], loops=loops)
    params = random_params(config)
    expected = judge.logits(untied(config), copied(params, loops), TOKENS)
    # Float32 through six or nine layers; logits are near 1.
    np.testing.assert_allclose(logits(config, params), expected, atol=5e-5)


@pytest.mark.parametrize("name", KINDS)
def test_looped_layer_kinds_equal_repeated_layers(name):
    # Each loop begins with the first kind, also after a cut period.
    config = dataclasses.replace(KINDS[name], loops=2)
    params = random_params(config)
    expected = logits(untied(config), jax.tree.map(jnp.asarray, copied(params, 2)))
    # Embeddings that are multiplied by 4 have larger roundings.
    np.testing.assert_allclose(logits(config, params), expected, atol=2e-4)
    based = dataclasses.replace(tiny_model(pattern=config.pattern), loops=2)
    assert not dataclasses.replace(based, completep=CompleteP.of(based)).has_factors


# How the layers run: number of layers, loops, and fields of execution.
EXECUTION = [
    (1, 4, {"scan_unroll": 1}),
    (1, 4, {"scan_unroll": 0}),
    (3, 2, {"scan_unroll": 0}),
    (3, 2, {"scan_unroll": 6, "remat": "dots"}),
    (2, 3, {"scan_unroll": 1, "remat": "full"}),
]


@pytest.mark.parametrize(("num_layers", "loops", "fields"), EXECUTION)
def test_untied_model_has_the_same_loss_and_its_gradients_sum_to_the_looped_ones(
    num_layers, loops, fields
):
    source = tiny_model(num_layers=num_layers, loops=loops, **fields)
    growth, params = Untie(loops), random_params(source)
    target, grown = growth.target_config(source), grow(growth, source, params)
    assert target == untied(source)
    assert growth.source_config(target) == source
    jax.tree.map(np.testing.assert_array_equal, grown, copied(params, loops))
    batch = first_microbatch(random_batch())

    def loss(config, params):
        return model.next_token_loss(config, params, batch).objective

    step = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    (before, gradient), (after, of_copies) = step(source, params), step(target, grown)
    # The same float32 products, perhaps compiled in another order.
    assert float(after) == pytest.approx(float(before), rel=1e-6)
    for name, leaf in of_copies["layers"].items():
        summed = np.sum(np.reshape(leaf, (loops, num_layers, *leaf.shape[1:])), axis=0)
        expected = gradient["layers"][name]
        np.testing.assert_allclose(summed, expected, atol=1e-5 * np.abs(expected).max())


def test_a_part_of_the_loops_can_be_untied():
    source = tiny_model(num_layers=2, loops=6)
    half = Untie(3).target_config(source)
    assert (half.num_layers, half.loops) == (6, 2)
    assert chain(Untie(3), Untie(2)).target_config(source) == untied(source)
    grown = grow(Untie(3), source, random_params(source))
    before, after = logits(source, random_params(source)), logits(half, grown)
    np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("growth", [Untie(2), chain(WidthSplit(embed=2, mlp=2), Untie(2))])
def test_growth_of_a_looped_model_is_function_preserving(growth):
    assert growth.preserves_function == "always"
    assert parse_growth(str(growth)) == growth
    target = growth.target_config(GQA)
    assert growth.source_config(target) == GQA
    found = logits(target, grow(growth, GQA, random_params(GQA)))
    np.testing.assert_allclose(found, logits(GQA, random_params(GQA)), atol=1e-5)


def test_loops_are_kept_by_other_growth_and_must_be_divisible():
    assert Stack(2).target_config(GQA).loops == 2
    assert Untie(2).is_symmetric() is False
    with pytest.raises(ValueError, match=r"untie\(3\) does not fit model.loops 2"):
        Untie(3).target_config(GQA)
    with pytest.raises(ValueError, match=r"model.loops is 9999, so 29997 layers would run"):
        tiny_model(loops=9999)


@pytest.mark.parametrize("mode", ["grow", "keep"])
def test_moments_are_shared_or_kept_by_the_first_loop(mode):
    optimizer = AdamW(peak_learning_rate=1e-2)
    tx, phase = optimizer.build(model.logical_axes(GQA)), phase_of(GQA)
    params = random_params(GQA)
    state = TrainState(jnp.int32(0), params, jax.jit(tx.init)(params))
    step = jax.jit(functools.partial(train_step, phase, tx, 0.0, phase.step_inputs))
    state, _ = step(state, random_batch())
    target = Untie(2).target_config(GQA)
    tx = optimizer.build(model.logical_axes(target))
    grown = jax.jit(functools.partial(grow_state, Untie(2), GQA, tx, optimizer_state=mode))(
        state, key=KEY
    )

    def moments(state, kind):
        return next(getattr(n, kind) for n in state.opt_state if hasattr(n, kind))

    for kind, order in (("mu", 1), ("nu", 2)):
        before, after = moments(state, kind)["layers"], moments(grown, kind)["layers"]
        for name, leaf in before.items():
            shares = (0.5**order, 0.5**order) if mode == "grow" else (1.0, 0.0)
            expected = np.concatenate([share * np.asarray(leaf) for share in shares])
            np.testing.assert_allclose(after[name], expected, rtol=1e-6)


def test_untying_on_eight_devices_matches_one_device_and_keeps_the_sharding():
    mesh = mesh_of("replica 2, fsdp 2, tensor 2")
    target = Untie(2).target_config(GQA)
    tx = AdamW(peak_learning_rate=1e-2).build(model.logical_axes(target))
    expected = grow(Untie(2), GQA, random_params(GQA))
    with jax.set_mesh(mesh):
        abstract = on_mesh(jax.eval_shape(lambda: init_state(GQA, tx, KEY)), mesh).params
        params = jax.device_put(
            random_params(GQA), jax.tree.map(lambda leaf: leaf.sharding, abstract)
        )
        grown = jax.jit(grow_tree, static_argnums=(0, 1))(Untie(2), GQA, params, KEY)
        wanted = on_mesh(jax.eval_shape(lambda: model.init(target, KEY)), mesh)
        for leaf, like in zip(jax.tree.leaves(grown), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(grown), expected)


@pytest.mark.parametrize("pieces", [(8,), (3, 1, 4)])
def test_cache_of_a_looped_model_has_entries_for_each_loop(pieces):
    params, cache, start, found = random_params(GQA), empty_cache(GQA, B, 11), 0, []
    assert cache.keys_LBKSH.shape[0] == 6
    for length in pieces:
        piece = np.s_[:, start : start + length]
        x_BTD, cache = jax.jit(extend, static_argnums=0)(
            GQA, params, cache, TOKENS[piece], PLACES[piece]
        )
        found.append(unembed(GQA, params, x_BTD)[..., :11])
        start += length
    np.testing.assert_allclose(np.concatenate(found, 1), logits(GQA, params), atol=2e-5)


@pytest.mark.parametrize("name", LOOPED)
def test_looped_model_costs_what_the_untied_model_costs(name):
    config = LOOPED[name]
    assert num_params(config) == num_params(MODELS[name])
    assert matmul_flops(config, 8) == matmul_flops(untied(config), 8)
    assert flops_6nd(config) == flops_6nd(untied(config))
    # Gradients pass all layers above the first trained layer of the first loop.
    trained = (False, True, False)
    assert matmul_flops(config, 8, trained) == matmul_flops(untied(config), 8, trained * 2)
    assert flops_6nd(config, trained) == flops_6nd(untied(config), trained * 2)


def test_contributions_have_an_entry_for_each_loop():
    batch = first_microbatch(random_batch())
    params = random_params(GQA)
    measure = jax.jit(model.contributions, static_argnums=0)
    found = measure(GQA, params, batch)
    expected = measure(untied(GQA), copied(params, 2), batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_looped_layers_start_as_the_untied_layers_do():
    """The initial standard deviations follow from the depth."""
    stds = [
        np.asarray(model.init(config, KEY)["layers"]["down"]).std()
        for config in (GQA, untied(GQA))
    ]
    assert stds[0] == pytest.approx(stds[1], rel=0.2)


def test_run_of_a_looped_model_counts_the_flops_of_its_depth():
    run = tiny_run(model=tiny_model(num_layers=6))
    last = dataclasses.replace(run.stages[1], growth=Untie(2))
    looped = dataclasses.replace(run, stages=(run.stages[0], last))
    source, target = expand(looped)
    assert (source.model.num_layers, source.model.loops) == (3, 2)
    assert (target.model.num_layers, target.model.loops) == (6, 1)
    assert source.per_step.flops * 2 == target.per_step.flops
