"""Gradients of several replicas and microbatches."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import mesh_of, random_batch, tiny_model, tiny_run

from stackjax.accelerators.costs import program_costs
from stackjax.accelerators.hlo import parse_module
from stackjax.config import Stage
from stackjax.data.device import batch_sharding
from stackjax.growth import DepthRandom, Learn
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import abstract_state, compile_step, jit_step
from stackjax.training.expand import expand


def bytes_between_replicas(accumulate):
    """Bytes that cross from four devices to the other four in a step."""
    # A single layer, so that the program has no loop over layers.
    config = tiny_run(model=tiny_model(num_layers=1), model_is="source")
    phase = dataclasses.replace(
        expand(config)[0],
        batch_size=64,
        accumulate=accumulate,
        mesh=MeshConfig(replica=2, fsdp=4),
    )
    with jax.set_mesh(build_mesh(phase.mesh)):
        text = compile_step(config, phase).as_text()
    collectives = program_costs(parse_module(text), 8, 4).collectives
    return sum(each.wire_bytes for each in collectives if each.crosses_hosts)


def test_gradients_cross_the_network_between_replicas_once_per_step():
    num_bytes = bytes_between_replicas(2)
    assert bytes_between_replicas(4) == num_bytes > 0


def random_state(phase):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.uniform(0.1, 0.2, leaf.shape).astype(leaf.dtype), abstract_state(phase)
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "growth",
    [
        DepthRandom(2, mask_tokens=640),
        Learn(2, embed=2, mlp=2, heads=2, fit_steps=3, learning_rate=0.25),
    ],
)
def test_masked_and_learned_growth_train_alike_on_replicas(growth):
    config = tiny_run()
    stages = config.stages[0], Stage(tokens=1280, batch_size=16, accumulate=2, growth=growth)
    phase = expand(dataclasses.replace(config, stages=stages, model_is="source"))[1]
    batch = random_batch(accumulate=2)
    state = random_state(phase)
    alone, metrics = jit_step(phase)(phase.step_inputs, state, batch)
    mesh = mesh_of("replica 2, fsdp 2, tensor 2")
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(abstract_state(phase), mesh))
        placed = jax.device_put(state, layout), jax.device_put(batch, batch_sharding(mesh))
        found, found_metrics = jit_step(phase)(phase.step_inputs, *placed)
    for name in ("loss", "grad_norm"):
        assert float(found_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)
