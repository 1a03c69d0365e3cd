"""Layer statistics match float64 references; layer rows are complete."""

import dataclasses
import functools
import itertools

import jax
import judge
import numpy as np
import pytest
from conftest import (
    COPIES,
    MESHES,
    mesh_of,
    phase_of,
    random_batch,
    random_params,
    tiny_model,
    tiny_run,
)
from runs import rarely_saved, rows

from stackjax import model
from stackjax.config import Stage
from stackjax.data.device import batch_sharding
from stackjax.growth import DepthRandom, DepthZero, Learn, Noise, Stack, WidthSplit, chain
from stackjax.run import seam as seam_module
from stackjax.run.layer_statistics import layer_sources, layer_statistics
from stackjax.run.train import train
from stackjax.sharding.partition import on_mesh
from stackjax.training.expand import expand

MATRICES = ("query", "key", "value", "out", "gate_up", "down")
COPIED = (0, 1, 1, 2, 1, 0)
STATISTICS = jax.jit(layer_statistics, static_argnums=(0, 1))


def measure(config, params, sources=None, batch=None):
    batch = random_batch() if batch is None else batch
    return jax.tree.map(np.asarray, STATISTICS(config, sources, params, batch))


def grown_params(growth, source):
    """Random source parameters after growth."""
    grow = functools.partial(
        growth.grow_params,
        axes=model.logical_axes(source),
        source=source,
        fresh=random_params,
    )
    return jax.jit(grow)(random_params(source), key=jax.random.key(1))


def vectors(params):
    """Each layer's matrices as a vector, in float64."""
    layers = params["layers"]
    parts = [np.float64(layers[name]) for name in MATRICES]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def mean_cosine(values, sources, layer):
    """Mean cosine with the other copies of the same source."""
    cosines = [
        values[layer] @ other / np.linalg.norm(values[layer]) / np.linalg.norm(other)
        for i, other in enumerate(values)
        if i != layer and sources[i] == sources[layer]
    ]
    return np.mean(cosines) if cosines else np.nan


def test_contributions_match_transformers_in_float64(config):
    params, batch = random_params(config), random_batch()
    whole = np.broadcast_to(np.arange(8, dtype=np.int32), batch.tokens.shape)
    # Some tokens have weight zero or less than one.
    weights = batch.loss_weights * np.where(whole % 3, 1, np.float32(0.25))
    batch = batch._replace(segments=None, positions=whole, loss_weights=weights)
    streams = judge.streams(config, params, batch.tokens[0])

    def square(x):
        return np.sum(weights[0][..., None] * x**2)

    expected = [
        np.sqrt(square(after - before) / square(before))
        for before, after in itertools.pairwise(streams)
    ]
    found = measure(config, params, batch=batch)["contribution"]
    # Float32 through three layers, as for the logits.
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_norms_and_similarities_match_float64(config):
    config = dataclasses.replace(config, num_layers=len(COPIED))
    params = random_params(config)
    found, values = measure(config, params, COPIED), vectors(params)
    # Sums of thousands of float32 products; products of different layers cancel.
    np.testing.assert_allclose(found["norm"], np.sqrt(np.mean(values**2, axis=1)), rtol=1e-5)
    expected = [mean_cosine(values, COPIED, layer) for layer in range(len(COPIED))]
    np.testing.assert_allclose(found["similarity"], expected, atol=1e-5)
    assert np.isnan(found["similarity"]).tolist() == [False, False, False, True, False, False]


WIDE = tiny_model(num_layers=len(COPIED), num_heads=8, num_kv_heads=4)


@functools.cache
def on_one_device():
    return measure(WIDE, random_params(WIDE), COPIED)


@pytest.mark.parametrize("name", MESHES)
def test_statistics_are_equal_on_every_mesh(name):
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: model.init(WIDE, jax.random.key(0)))
        layout = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(abstract, mesh))
        params = jax.device_put(random_params(WIDE), layout)
        batch = jax.device_put(random_batch(), batch_sharding(mesh))
        found = STATISTICS(WIDE, COPIED, params, batch)
    for key, expected in on_one_device().items():
        # Every process can read the values.
        assert found[key].is_fully_replicated
        # The same float32 sums in another order, over up to eight devices.
        np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", COPIES)
def test_copies_are_equal_after_growth_without_noise(name):
    (growth, sources), source = COPIES[name], tiny_model()
    target = growth.target_config(source)
    has_copies = [sources.count(layer) > 1 for layer in sources]
    # Rounding in float32.
    same = pytest.approx(np.where(has_copies, 1, np.nan), abs=1e-6, nan_ok=True)
    assert measure(target, grown_params(growth, source), sources)["similarity"] == same
    parted = measure(target, grown_params(chain(growth, Noise(0.2)), source), sources)
    assert (parted["similarity"][has_copies] < 0.999).all()


def test_zero_and_masked_layers_contribute_nothing():
    source = tiny_model()
    for growth in (DepthZero(2), DepthRandom(2, mask_tokens=128)):
        target, params = growth.target_config(source), grown_params(growth, source)
        masks = growth.reparameterizations(source)
        is_new = growth.axis_maps(source)["layers"].is_new
        phase = phase_of(target, reparameterizations=masks)
        found = measure(target, phase.model_params(params, 0))["contribution"]
        assert (found[is_new] == 0).all()
        assert (found[~is_new] > 0).all()
    # Without masks the last growth's layers contribute.
    assert (measure(target, params)["contribution"] > 0).all()


@pytest.mark.parametrize(
    ("growths", "expected"),
    [
        ((), None),
        ((WidthSplit(mlp=2),), None),
        ((Stack(2),), (0, 1, 0, 1)),
        ((Stack(2), None), (0, 1, 0, 1)),
        ((Stack(2), WidthSplit(mlp=2)), (0, 1, 0, 1)),
        ((Stack(2), Stack(2)), (0, 1, 2, 3, 0, 1, 2, 3)),
        ((Learn(2, fit_steps=3),), (0, 1, 0, 1)),
    ],
    ids=str,
)
def test_last_growth_in_depth_defines_copies(growths, expected):
    stages = [Stage(tokens=640, batch_size=8, growth=growth) for growth in (None, *growths)]
    sizes = tiny_model(num_layers=2)
    config = tiny_run(model=sizes, model_is="source", stages=tuple(stages))
    assert layer_sources(expand(config)) == expected


def layer_run(world, workdir, **fields):
    """A run with layer statistics; the second stage has 8 steps."""
    config = world.config("--evaluation.layers", workdir=workdir)
    stage = dataclasses.replace(config.stages[1], **fields)
    return rarely_saved(dataclasses.replace(config, stages=(config.stages[0], stage)))


def test_layer_rows_at_evaluations_and_growth(world, tmp_path, monkeypatch):
    config = layer_run(world, tmp_path)

    def clear(workdir, phase):
        raise InterruptedError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(seam_module, "clear", clear)
        with pytest.raises(InterruptedError):
            train(config)
    # The row is on disk, and is rewritten on resume.
    assert [row["phase"] for row in rows(tmp_path) if row["kind"] == "layers"] == [0, 1]
    train(config)
    found = rows(tmp_path)

    def places(*kinds):
        return [(row["phase"], row["step"]) for row in found if row["kind"] in kinds]

    assert (
        places("layers")
        == places("evaluation", "growth")
        == [(0, 5), (1, 0), (1, 2), (1, 7), (1, 8)]
    )
    before, seam, *after = [row for row in found if row["kind"] == "layers"]
    assert set(before) - set(found[0]) == {"contribution", "norm"}
    assert len(before["norm"]) == len(seam["norm_before"]) == 1
    assert "similarity_before" not in seam
    assert seam["norm"] == pytest.approx(2 * seam["norm_before"], rel=1e-6)
    assert seam["similarity"] == pytest.approx([1, 1], abs=1e-6)
    # The first copy has the same input as the source's layer.
    assert seam["contribution"][0] == pytest.approx(seam["contribution_before"][0], rel=1e-6)
    assert all(max(row["similarity"]) < 1 - 1e-6 for row in after)


def test_layer_rows_are_off_by_default(uncut):
    assert {row["kind"] for row in rows(uncut)} == {"train", "evaluation", "growth"}
