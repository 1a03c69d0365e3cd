"""CompleteP in training: factors of optimizers, the coordinate check, and refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from completep import SIZES, with_completep
from conftest import (
    MODELS,
    first_microbatch,
    phase_of,
    random_batch,
    random_params,
    tiny_model,
    tiny_run,
)
from optimizers import by_name

from stackjax import model
from stackjax.config import Stage
from stackjax.growth import Learn, Stack, WidthSplit
from stackjax.model.config import CompleteP, axis_size
from stackjax.model.layer_kind import LayerKind
from stackjax.model.transformer import embed, final_norm, layer_function, unembed
from stackjax.optimizers import AdamW, Muon, Optimizer
from stackjax.runtime.errors import UserError
from stackjax.training.compile import phase_optimizer
from stackjax.training.expand import expand
from stackjax.training.learning_rate import ParameterRates
from stackjax.training.train_state import init_state, train_step

# Three times the layers, 4 times the channels, 2 times the units, 6 times the heads, 3 times
# the key heads and 2 times the head_dim of the base: 12 and 6 times the channels of heads.
LARGE = tiny_model(
    num_layers=6,
    embed_dim=32,
    mlp_dim=20,
    num_heads=12,
    num_kv_heads=6,
    head_dim=4,
    qkv_bias=True,
    completep=CompleteP(
        base_layers=2,
        base_embed_dim=8,
        base_mlp_dim=10,
        base_heads=2,
        base_kv_heads=2,
        base_head_dim=2,
    ),
)
ADAMW_RATES = {"query": 4, "key": 4, "value": 4, "gate_up": 4, "out": 12, "down": 2}
"""The divisor of each matrix's learning rate: the ratio of the fan-in."""
# The product of the ratio of the fan-in, the ratio of the larger fan, and 1 / the ratio of the
# fan-out. Larger fans: 48 and 8 (query), 32 and 8 (key), 32 and 10 (units), 48 and 8 (out).
MUON_RATES = {
    "query": np.sqrt(4 * 6 / 12),
    "key": np.sqrt(4 * 4 / 6),
    "value": np.sqrt(4 * 4 / 6),
    "gate_up": np.sqrt(4 * 3.2 / 2),
    "out": np.sqrt(12 * 6 / 4),
    "down": np.sqrt(2 * 3.2 / 4),
}
RATES = {"adamw": ADAMW_RATES, "muon": MUON_RATES}
OPTIMIZERS = {
    "adamw": AdamW(peak_learning_rate=1e-2),
    "muon": Muon(peak_learning_rate=1e-2),
}


def scaled_phase(config, optimizer):
    """Returns the phase of a run without growth."""
    rates = None
    if config.has_factors:
        rates = ParameterRates(
            source=config,
            growth=None,
            rewarm=None,
            scale_by_fan_in=False,
            trained_layers=None,
            optimizer=optimizer,
        )
    rate = optimizer.peak_learning_rate
    return phase_of(config, rate=rate, optimizer=optimizer, parameter_rates=rates)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_and_decays_match_the_table(name):
    config = LARGE
    optimizer = dataclasses.replace(OPTIMIZERS[name], weight_decay=0.5)
    phase = scaled_phase(config, optimizer)
    rates = by_name(phase.parameter_rates(model.logical_axes(config), jnp.zeros(())))
    params = random_params(config)
    zeros, tx = jax.tree.map(jnp.zeros_like, params), phase_optimizer(phase)
    decays = by_name(jax.jit(lambda p: tx.update(zeros, tx.init(p), p)[0])(params))
    for leaf, value in by_name(params).items():
        divisor = RATES[name].get(leaf, 1)
        assert float(rates[leaf].item()) == pytest.approx(1 / divisor, rel=1e-6), leaf
        is_matrix = leaf in (*ADAMW_RATES, "embedding", "head")
        expected = 0.5 * divisor * value if is_matrix else 0 * value
        np.testing.assert_allclose(decays[leaf], expected, rtol=1e-5, atol=1e-7, err_msg=leaf)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_epsilons_match_the_table(name):
    """With epsilon far above the gradient, the update is the gradient over epsilon."""
    optimizer = dataclasses.replace(OPTIMIZERS[name], weight_decay=0.0, epsilon=1.0)
    params = random_params(LARGE)
    tx = phase_optimizer(scaled_phase(LARGE, optimizer))
    grads = jax.tree.map(lambda leaf: 1e-6 * leaf, params)
    updates = by_name(jax.jit(lambda g: tx.update(g, tx.init(g), params)[0])(grads))
    outside = {"embedding", "head", "final_norm"}
    for leaf, grad in by_name(grads).items():
        if name == "muon" and leaf in ADAMW_RATES:
            continue
        expected = grad * (4 if leaf in outside else 4 * 3)
        # Epsilon is at least 1 / 12, and the gradient at most 2e-6.
        np.testing.assert_allclose(updates[leaf], expected, rtol=1e-4, err_msg=leaf)


def test_muon_epsilon_is_divided_by_the_ratio_of_layers():
    muon, params = Muon(peak_learning_rate=1e-2, weight_decay=0.0), random_params(LARGE)
    grads = jax.tree.map(lambda leaf: 1e-6 * leaf, params)

    def first_update(config, epsilon):
        optimizer = dataclasses.replace(muon, epsilon=epsilon)
        tx = phase_optimizer(scaled_phase(config, optimizer))
        return by_name(jax.jit(lambda g: tx.update(g, tx.init(g), params)[0])(grads))

    plain = dataclasses.replace(LARGE, completep=None)
    found, expected = first_update(LARGE, 3e-3), first_update(plain, 1e-3)
    for leaf in ADAMW_RATES:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=1e-5)


def test_optimizer_state_has_the_form_without_completep():
    for optimizer in OPTIMIZERS.values():
        shapes = [
            jax.eval_shape(phase_optimizer(scaled_phase(config, optimizer)).init, params)
            for config in (LARGE, dataclasses.replace(LARGE, completep=None))
            for params in [random_params(LARGE)]
        ]
        assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_base_sizes_of_the_model_itself_train_bit_for_bit_like_the_standard(name):
    config, found = MODELS["gqa, tied, qk_norm"], []
    for each in (config, with_completep(config, CompleteP.of(config))):
        phase = scaled_phase(each, OPTIMIZERS[name])
        tx = phase_optimizer(phase)
        step = jax.jit(functools.partial(train_step, phase, tx, 0.0, phase.step_inputs))
        state = jax.jit(functools.partial(init_state, each, tx))(jax.random.key(0))
        for seed in range(3):
            state, _ = step(state, random_batch(seed))
        found.append(state)
    jax.tree.map(np.testing.assert_array_equal, *found)


BASE = tiny_model(
    vocab_size=64,
    vocab_multiple=1,
    num_layers=2,
    embed_dim=32,
    mlp_dim=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
)
SIZES_BY_AXIS = {
    "width": [
        {"embed_dim": 32 * m, "mlp_dim": 64 * m, "num_heads": 2 * m, "num_kv_heads": 2 * m}
        for m in (1, 2, 8)
    ],
    "depth": [{"num_layers": 2 * m} for m in (1, 4, 16)],
}
RATIOS = {"width": (1, 2, 8), "depth": (1, 4, 16)}
COORDINATES = first_microbatch(random_batch(rows=8, seq_len=16, vocab_size=64))


@functools.cache
def coordinates(config, optimizer):
    """Returns the size of streams, and of the changes of streams and logits in four steps.

    The root mean squares are over tokens and channels. Streams are measured after half of the
    layers and after all. Embeddings start at a size of 1 and the head at zero: random parts of
    branches and logits, which fall with depth and width, are then small.
    """
    phase = scaled_phase(config, optimizer)
    tx = phase_optimizer(phase)

    def seen(params):
        run = layer_function(config, COORDINATES.positions, COORDINATES.segments)

        def layer(x, weights):
            y, _ = run(x, weights, LayerKind())
            return y, y

        x = embed(config, params, COORDINATES.tokens, COORDINATES.positions)
        x, streams = jax.lax.scan(layer, x, params["layers"])
        half = streams[config.num_layers // 2 - 1]
        return half, x, unembed(config, params, final_norm(config, params, x))

    def loss(params):
        return model.next_token_loss(config, params, COORDINATES).objective / 100

    def step(_, carry):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        rate, tokens = jnp.float32(optimizer.peak_learning_rate), jnp.float32(0)
        return phase.step_params(params, updates, rate, tokens), state

    @jax.jit
    def measure(key):
        params = model.init(config, key)
        params["embedding"] /= jnp.std(params["embedding"])
        params["head"] = jnp.zeros_like(params["head"])
        trained, _ = jax.lax.fori_loop(0, 4, step, (params, tx.init(params)))
        before, after = seen(params), seen(trained)
        changes = [b - a for a, b in zip(before, after, strict=True)]
        return [optax.tree.norm(x) / x.size**0.5 for x in (*before[:2], *changes)]

    names = ("half", "last", "change of half", "change of last", "change of logits")
    return dict(zip(names, jax.device_get(measure(jax.random.key(0))), strict=True))


def slopes(axis, optimizer, *, scaled):
    """Returns the slope of each coordinate in log2, per doubling of a size."""
    found = []
    for sizes in SIZES_BY_AXIS[axis]:
        config = dataclasses.replace(BASE, **sizes)
        if scaled:
            config = with_completep(config, CompleteP.of(BASE))
        found.append(coordinates(config, optimizer))
    log_ratios = np.log2(RATIOS[axis])
    return {
        name: np.polyfit(log_ratios, np.log2([each[name] for each in found]), 1)[0]
        for name in found[0]
    }


COORDINATE_OPTIMIZERS = {
    "adamw": AdamW(peak_learning_rate=4e-3),
    "muon": Muon(peak_learning_rate=2e-2),
}
# Sizes of 1 to 16 times the base are small enough for slopes of 0.18 from the base itself.
BAND = 0.25


@pytest.mark.sample(3)
@pytest.mark.parametrize("axis", SIZES_BY_AXIS)
@pytest.mark.parametrize("name", COORDINATE_OPTIMIZERS)
def test_coordinates_and_their_updates_do_not_depend_on_the_size(name, axis):
    found = slopes(axis, COORDINATE_OPTIMIZERS[name], scaled=True)
    assert max(map(abs, found.values())) < BAND, found


@pytest.mark.sample(3)
@pytest.mark.parametrize("axis", SIZES_BY_AXIS)
@pytest.mark.parametrize("name", COORDINATE_OPTIMIZERS)
def test_updates_of_the_standard_model_grow_with_the_size(name, axis):
    found = slopes(axis, COORDINATE_OPTIMIZERS[name], scaled=False)
    assert found["change of last"] > 0.4, found


def test_rates_follow_the_model_of_each_stage():
    config = with_completep(tiny_model(num_layers=6), SIZES)
    run = tiny_run(
        model=config,
        stages=(
            Stage(tokens=640, batch_size=8),
            Stage(tokens=640, batch_size=8, growth=Stack(2)),
            Stage(tokens=640, batch_size=8, growth=WidthSplit(embed=2)),
            Stage(tokens=640, batch_size=8),
        ),
    )
    phases = expand(run)
    sizes = [(phase.model.num_layers, phase.model.embed_dim) for phase in phases]
    assert sizes == [(3, 8), (6, 8), (6, 16), (6, 16)]
    for phase in phases:
        axes = model.logical_axes(phase.model)
        rates = by_name(phase.parameter_rates(axes, jnp.zeros(())))
        channels = axis_size(phase.model, "embed") / 4
        assert float(rates["query"].item()) == pytest.approx(1 / channels)
        assert float(rates["out"].item()) == pytest.approx(1 / (4 * 6 / (2 * 2)))
        assert float(rates["embedding"].item()) == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signs(Optimizer):
    """An optimizer without a rule for CompleteP."""

    def build(self, axes):
        return optax.scale_by_sign()


def test_settings_without_a_rule_are_refused():
    run = tiny_run(model=with_completep(tiny_model(num_layers=6)))
    twice = dataclasses.replace(run.stages[1], growth=WidthSplit(embed=2), scale_by_fan_in=True)
    with pytest.raises(UserError, match=r"^stages\.1\.scale_by_fan_in is set, and model\.comp"):
        expand(dataclasses.replace(run, stages=(run.stages[0], twice)))
    with pytest.raises(UserError, match=r"^optimizer signs has no rule for model\.completep"):
        expand(dataclasses.replace(run, optimizer=Signs(peak_learning_rate=1e-2)))


def test_fit_has_no_factors_and_the_grown_model_has():
    run = tiny_run(model=with_completep(tiny_model(num_layers=6)))
    grown = dataclasses.replace(run.stages[1], growth=Learn(2, fit_steps=2))
    _, fit, trained = expand(dataclasses.replace(run, stages=(run.stages[0], grown)))
    assert fit.fit is not None
    assert fit.parameter_rates is None
    assert trained.parameter_rates.target == trained.model
