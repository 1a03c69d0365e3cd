"""Scans over layers of several kinds: whole periods, and a program that does not grow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import equations, first_microbatch, random_batch, random_params, tiny_model

from stackjax import model
from stackjax.model import flops
from stackjax.model.config import CompleteP, ModelConfig, RopeScaling, differences
from stackjax.model.layer_kind import LayerKind
from stackjax.model.layer_scan import layer_runs
from stackjax.model.transformer import LayerSpan
from stackjax.runtime.errors import UserError

A, B = LayerKind(window=2), LayerKind()

# Kinds, period, and the first layer, the end and the kinds of each scan.
RUNS = {
    "one kind": ((A, A, A), 1, [(0, 3, (A,))]),
    "whole periods": ((A, B) * 2, 2, [(0, 4, (A, B))]),
    "cut period": ((A, A, B) * 2 + (A, A), 3, [(0, 6, (A, A, B)), (6, 8, (A,))]),
    "one period": ((B, B, A), 3, [(0, 2, (B,)), (2, 3, (A,))]),
    "equal kinds in a longer pattern": ((A,) * 5, 2, [(0, 5, (A,))]),
    "from inside a period": ((B, A, B, A), 2, [(0, 4, (B, A))]),
}


@pytest.mark.parametrize("name", RUNS)
def test_whole_periods_are_one_scan_and_others_scans_over_equal_kinds(name):
    kinds, period, expected = RUNS[name]
    runs = [(run.start, run.stop, run.kinds) for run in layer_runs(kinds, period)]
    assert runs == expected


@pytest.mark.parametrize("num_layers", [12, 14])
def test_program_has_as_many_operations_for_any_number_of_periods(num_layers):
    def count(num_layers):
        config = tiny_model(num_layers=num_layers, pattern=(A, A, B))
        batch = first_microbatch(random_batch(rows=1))
        abstract = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
        run = jax.grad(lambda params: model.next_token_loss(config, params, batch).objective)
        return sum(1 for _ in equations(jax.make_jaxpr(run)(abstract).jaxpr))

    assert count(num_layers) == count(num_layers + 24)


@pytest.mark.parametrize("frozen", [(1, 2), (2, 5), (4, 6)])
def test_spans_from_inside_a_period_have_the_same_function_and_gradient(frozen):
    config = tiny_model(num_layers=8, pattern=(A, A, LayerKind(rotary=False)))
    batch, (start, stop) = first_microbatch(random_batch(rows=1)), frozen
    sizes = ((start, True), (stop - start, False), (8 - stop, True))
    cut = [
        LayerSpan(num_layers=size, remat="none", unroll=1, trains=trains)
        for size, trains in sizes
    ]

    def value_and_gradient(spans):
        def objective(params):
            inputs = batch.tokens, batch.positions, batch.segments
            logits = model.apply(config, params, *inputs, spans)
            return jnp.sum(jnp.sin(logits[..., : config.vocab_size]))

        return jax.jit(jax.value_and_grad(objective))(random_params(config))

    (value, found), (plain, expected) = map(value_and_gradient, (cut, None))
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    for name, leaf in expected["layers"].items():
        leaf = np.array(leaf)
        leaf[start:stop] = 0
        tolerance = 1e-5 * np.abs(leaf).max()
        np.testing.assert_allclose(found["layers"][name], leaf, rtol=0, atol=tolerance)


def test_parameters_do_not_depend_on_the_pattern():
    plain, mixed = tiny_model(), tiny_model(pattern=(A, B))
    assert model.logical_axes(plain) == model.logical_axes(mixed)
    leaves = zip(*map(jax.tree.leaves, map(random_params, (plain, mixed))), strict=True)
    assert all((leaf == other).all() for leaf, other in leaves)


def test_windows_cost_the_products_inside():
    config = tiny_model(num_layers=4, loops=2, pattern=(LayerKind(window=3), B))
    plain = dataclasses.replace(config, pattern=())
    heads = 4 * config.num_heads * config.head_dim * 3
    # Four of eight layers see 3 of 8 keys.
    saved = flops.matmul_flops(plain, 8) - flops.matmul_flops(config, 8)
    assert saved == 4 * heads * (8 - 3)
    assert flops.matmul_flops(plain, 3) == flops.matmul_flops(config, 3)
    assert "2 window 3, 2 global" in flops.describe(config)


WRONG = {
    "window": (lambda: LayerKind(window=0), r"model\.pattern\.window is 0"),
    "scaling": (lambda: LayerKind(rope_scaling=RopeScaling()), "without rope_theta"),
    "share": (lambda: tiny_model(rotary_share=0.5), r"rotary_share is 0\.5, 3 of 6"),
    "norm": (lambda: tiny_model(qk_norm_over="all_heads"), "qk_norm is False"),
    "cap": (
        lambda: tiny_model(attention_cap=1.0, attention="cudnn"),
        "cuDNN's attention has no",
    ),
    "completep": (
        lambda: tiny_model(unit_offset=True, completep=CompleteP.of(tiny_model())),
        "completep has no rule",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_switches_are_refused_by_name(name):
    make, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        make()


def test_models_with_the_same_kinds_do_not_differ():
    config = tiny_model(num_layers=4, pattern=(A, B))
    for pattern in ((A, B, A, B), (A, B, A, B, B)):
        assert differences(config, dataclasses.replace(config, pattern=pattern)) == ""
    other = dataclasses.replace(config, pattern=(A, B, B))
    assert "model.pattern" in differences(config, other)
    assert differences(tiny_model(), tiny_model(pattern=(B,))) == ""


def test_kinds_repeat_over_the_layers():
    config = tiny_model(num_layers=5, pattern=(A, B))
    assert config.kinds == (A, B, A, B, A)
    assert isinstance(config, ModelConfig) and tiny_model().kinds == (B,) * 3
