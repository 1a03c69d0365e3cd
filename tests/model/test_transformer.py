"""The decoder matches a numpy decoder, and is causal."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    KINDS,
    MODELS,
    first_microbatch,
    phase_of,
    random_batch,
    random_params,
    tiny_model,
    tiny_run,
)
from decoder import NumpyDecoder

from stackjax import model
from stackjax.data.config import DataConfig
from stackjax.model import LayerSpan
from stackjax.model.config import check_length
from stackjax.model.flops import num_params
from stackjax.model.layer_kind import LayerKind, RopeScaling
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import num_shards
from stackjax.training.stages import stage_seq_lens

B, T = 2, 8


def inputs(seed=0):
    """Returns tokens, positions and segments, [B, T]."""
    return first_microbatch(random_batch(seed, rows=B, seq_len=T))[:3]


@pytest.mark.parametrize("tie_head", [False, True])
def test_model_without_layers_is_embedding_norm_and_head(tie_head):
    config = tiny_model(num_layers=0, tie_head=tie_head)
    params, tokens = random_params(config), inputs()
    x_BTD = params["embedding"][tokens[0]]
    rms_BT1 = np.sqrt(np.mean(x_BTD**2, axis=-1, keepdims=True) + config.norm_epsilon)
    head = params["embedding"].T if tie_head else params["head"]
    expected = (x_BTD / rms_BT1 * params["final_norm"]) @ head
    logits = jax.jit(functools.partial(model.apply, config))(params, *tokens)
    size = config.vocab_size
    np.testing.assert_allclose(logits[..., :size], expected[..., :size], atol=1e-5)
    batch = first_microbatch(random_batch(rows=B, seq_len=T))
    measure = functools.partial(model.contributions, config)
    assert jax.eval_shape(measure, params, batch).shape == (0,)


@pytest.mark.sample(2)
def test_logits_match_a_numpy_decoder(config):
    params, tokens = random_params(config), inputs()
    expected = NumpyDecoder(config, params).logits(*tokens)
    logits = jax.jit(functools.partial(model.apply, config))(params, *tokens)
    assert logits.dtype == jnp.float32
    # Float32 through three layers: a few roundings, for logits near 1.
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    np.testing.assert_array_equal(np.isneginf(logits), np.isneginf(expected))


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_layer_kinds_match_a_numpy_decoder(name):
    config, tokens = KINDS[name], inputs()
    params = random_params(config)
    expected = NumpyDecoder(config, params).logits(*tokens)
    logits = jax.jit(functools.partial(model.apply, config))(params, *tokens)
    # As above; embeddings that are multiplied by 4 have roundings of this size.
    np.testing.assert_allclose(logits, expected, atol=5e-5)


REFUSED = {
    "positions without a number": ({"positions": "learned"}, "max_seq_len is None"),
    "a number of rotary positions": ({"max_seq_len": 8}, "max_seq_len is 8"),
    "a base of learned positions": (
        {"positions": "learned", "max_seq_len": 8, "rope_theta": 10.0},
        "rope_theta is 10.0, which has no effect",
    ),
    "layers without rotary positions": (
        {"positions": "learned", "max_seq_len": 8, "pattern": (LayerKind(rotary=False),)},
        "model.pattern is .*which has no effect",
    ),
    "LayerNorm of queries": ({"norm": "layer", "qk_norm": True}, "no LayerNorm of queries"),
    "YaRN without a base": (
        {"rope_theta": 1.0, "rope_scaling": RopeScaling(method="yarn")},
        "rope_theta is 1.0",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_fields_without_effect_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_model(**fields)


def test_texts_longer_than_the_learned_positions_are_refused():
    check_length(KINDS["like gpt-2"], 9, "a sequence")
    check_length(KINDS["like gpt-neox"], 10**6, "a sequence")
    with pytest.raises(
        UserError, match="a sequence has 10 tokens, and the model has 9 learned"
    ):
        check_length(KINDS["like gpt-2"], 10, "a sequence")
    data = DataConfig(path="data", seq_len=10)
    run = tiny_run(model=KINDS["like gpt-2"], data=data)
    with pytest.raises(UserError, match="has 10 tokens"):
        stage_seq_lens(run)


def test_fields_of_yarn_are_refused_elsewhere():
    with pytest.raises(UserError, match="belong to method 'yarn', not 'linear'"):
        RopeScaling(method="linear", attention_factor=2.0)


def test_bfloat16_logits_are_float32_and_close_to_float32():
    config, tokens = MODELS["gqa"], inputs()
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    logits, expected = (
        jax.jit(functools.partial(model.apply, c))(random_params(c), *tokens)
        for c in (half, config)
    )
    assert logits.dtype == jnp.float32
    # Bfloat16 has 8 bits in each of a dozen products, for logits near 1.
    error = np.abs(logits - expected)[..., : config.vocab_size]
    assert 0 < error.max() < 0.2


@functools.cache
def influence(segments: tuple[int, ...]) -> np.ndarray:
    """Returns the influence of each input (columns) on each position's logits (rows)."""
    config = tiny_model(vocab_size=T)
    params = random_params(config)
    tokens = np.arange(T, dtype=np.int32)[None]
    arrays = tokens, tokens, np.int32(segments)[None]

    def position_sums(embedding):
        logits = model.apply(config, params | {"embedding": embedding}, *arrays)
        # Squares, because the gradient of a plain sum could cancel.
        return jnp.sum(jnp.square(logits[0]), axis=-1)

    # Each place has a token of its own, and the head is untied: row t of the embedding
    # enters at position t alone.
    jacobian = jax.jit(jax.jacrev(position_sums))(params["embedding"])
    return np.abs(np.asarray(jacobian)).max(axis=-1)[:, :T]


def test_attention_is_causal():
    moved = influence((0,) * T)
    allowed = np.tril(np.ones((T, T), bool))
    assert (moved[~allowed] == 0).all()
    assert (moved[allowed] > 0).all()


def test_segments_block_attention():
    segments = (0, 0, 0, 1, 1, 2, 2, 2)
    moved = influence(segments)
    same = np.equal.outer(segments, segments) & np.tril(np.ones((T, T), bool))
    assert (moved[~same] == 0).all()
    assert (moved[same] > 0).all()


PADDED = tiny_model()


@pytest.mark.parametrize("tie_head", [False, True])
def test_vocabulary_padding_is_never_predicted_nor_trained(tie_head):
    config = dataclasses.replace(PADDED, tie_head=tie_head)
    params, tokens = random_params(config), inputs()

    def log_likelihood(params):
        log_probs = jax.nn.log_softmax(model.apply(config, params, *tokens))
        return log_probs[..., 0].sum(), log_probs

    gradient = jax.jit(jax.grad(log_likelihood, has_aux=True))
    grads, log_probs = jax.device_get(gradient(params))
    assert np.isneginf(log_probs[..., 11:]).all()
    assert np.isfinite(log_probs[..., :11]).all()
    assert (grads["embedding"][11:] == 0).all()
    assert tie_head or (grads["head"][:, 11:] == 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# Shapes and axes of every parameter, written out for the model with all of them.
LAYER = {
    "attention_norm": ((16,), Axes((), (), ("embed",))),
    "query": ((16, 4, 6), Axes((), ("embed",), ("heads", "head_dim"))),
    "key": ((16, 2, 6), Axes((), ("embed",), ("kv_heads", "head_dim"))),
    "value": ((16, 2, 6), Axes((), ("embed",), ("kv_heads", "head_dim"))),
    "query_bias": ((4, 6), Axes(writes=("heads", "head_dim"), bias=True)),
    "key_bias": ((2, 6), Axes(writes=("kv_heads", "head_dim"), bias=True)),
    "value_bias": ((2, 6), Axes(writes=("kv_heads", "head_dim"), bias=True)),
    "query_norm": ((6,), Axes((), (), ("head_dim",))),
    "key_norm": ((6,), Axes((), (), ("head_dim",))),
    "out": ((4, 6, 16), Axes((), ("heads", "head_dim"), ("embed",))),
    "mlp_norm": ((16,), Axes((), (), ("embed",))),
    "gate_up": ((16, 2, 20), Axes((), ("embed",), ("mlp",), ("gate_up",))),
    "down": ((20, 16), Axes((), ("mlp",), ("embed",))),
}
OUTER = {
    "embedding": ((24, 16), Axes((), ("vocab",), ("embed",))),
    "final_norm": ((16,), Axes((), (), ("embed",))),
    "head": ((16, 24), Axes((), ("embed",), ("vocab",))),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tie_head", [False, True])
def test_parameter_names_shapes_and_axes(qkv_bias, qk_norm, tie_head):
    config = dataclasses.replace(PADDED, qkv_bias=qkv_bias, qk_norm=qk_norm, tie_head=tie_head)
    layer = {
        name: ((3, *shape), axes.stack("layers"))
        for name, (shape, axes) in LAYER.items()
        if (qk_norm or name not in ("query_norm", "key_norm"))
        and (qkv_bias or not name.endswith("_bias"))
    }
    outer = {name: leaf for name, leaf in OUTER.items() if name != "head" or not tie_head}
    expected = {**outer, "layers": layer}
    abstract = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    found = jax.tree.map(
        lambda leaf, axes: (leaf.shape, axes), abstract, model.logical_axes(config)
    )
    assert found == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}
    tables = 1 if tie_head else 2
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert num_params(config) == size - tables * (24 - 11) * 16


# Standard deviations of all matrices for D 64, H 32, N 2, F 176, L 4.
REFERENCE = {
    "embedding": math.sqrt(2 / (5 * 64)),
    "head": math.sqrt(2 / (5 * 64)),
    "query": math.sqrt(2 / (5 * 64)),
    "key": math.sqrt(2 / (5 * 64)),
    "value": math.sqrt(2 / (5 * 64)),
    "out": math.sqrt(2 / (5 * 2 * 32)),
    "gate_up": math.sqrt(2 / (5 * 64)),
    "down": 1 / math.sqrt(176) / 4,
}
SCALED = dict.fromkeys(REFERENCE, 0.02) | {
    "out": 0.02 / math.sqrt(8),
    "down": 0.02 / math.sqrt(8),
}


@pytest.mark.parametrize(("init", "expected"), [("reference", REFERENCE), ("scaled", SCALED)])
def test_initial_standard_deviations_match_the_documentation(init, expected):
    config = tiny_model(
        vocab_size=128,
        num_layers=4,
        embed_dim=64,
        mlp_dim=176,
        num_heads=2,
        head_dim=32,
        init=init,
    )
    params = jax.jit(functools.partial(model.init, config))(jax.random.key(1))
    leaves = params | params["layers"]
    for name, stddev in expected.items():
        values = np.asarray(leaves[name])
        # At least 8192 draws: their spread is within 4 / sqrt(2 n) = 3.2 % of its law's.
        assert values.std() == pytest.approx(stddev, rel=0.032), name
        assert abs(values.mean()) < 4 * stddev / math.sqrt(values.size), name
    for name in ("attention_norm", "mlp_norm", "final_norm"):
        assert (leaves[name] == 1).all()


SMALL = tiny_model(num_layers=2)


@pytest.fixture(scope="module")
def initial_values():
    """Initial values of a small model without a mesh."""
    params = jax.jit(functools.partial(model.init, SMALL))(jax.random.key(0))
    return jax.tree.map(np.asarray, params)


def test_layers_have_different_initial_values(initial_values):
    for name in REFERENCE.keys() & initial_values["layers"].keys():
        first, second = initial_values["layers"][name]
        assert not np.isclose(first, second).all()
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.4


def loss_and_grads(config, spans=None, params=None):
    """Returns a loss over all logits, and the gradient."""

    def loss(params):
        logits = model.apply(config, params, *inputs(), spans)
        return -jax.nn.log_softmax(logits)[..., 3].mean()

    params = random_params(config) if params is None else params
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


def span(num_layers, remat="none", unroll=1):
    return LayerSpan(num_layers=num_layers, remat=remat, unroll=unroll)


@functools.cache
def plain_loss_and_grads():
    return loss_and_grads(MODELS["gqa"])


# Trained layers among three.
TRAINED = {
    "last": (False, False, True),
    "middle": (False, True, False),
    "first": (True, False, False),
    "all but the middle": (True, False, True),
    "all": (True, True, True),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("name", "remat"), [*((name, "none") for name in TRAINED), ("all but the middle", "full")]
)
def test_only_trained_layers_have_gradients(name, remat):
    config = dataclasses.replace(MODELS["gqa"], remat=remat)
    trained = TRAINED[name]
    loss, grads = loss_and_grads(config, phase_of(config, trained_layers=trained).spans)
    expected_loss, expected = plain_loss_and_grads()
    # The tolerance is as above.
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    layers = dict.fromkeys(grads["layers"], np.array(trained))
    learns = {"embedding": all(trained), "final_norm": True, "head": True, "layers": layers}
    for leaf, full, here in zip(*map(jax.tree.leaves, (grads, expected, learns)), strict=True):
        here = np.broadcast_to(here, len(leaf))
        assert not np.any(leaf[~here])
        assert np.any(full[~here]) or here.all()
        tolerance = 1e-6 * np.abs(full).max() + 1e-7
        np.testing.assert_allclose(leaf[here], full[here], atol=tolerance)


def test_logits_do_not_depend_on_frozen_layers():
    config, tokens = MODELS["gqa"], inputs()
    trained = TRAINED["all but the middle"]
    logits, expected = (
        jax.jit(functools.partial(model.apply, config, spans=spans))(
            random_params(config), *tokens
        )
        for spans in (phase_of(config, trained_layers=trained).spans, None)
    )
    # The tolerance is as above.
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["last", "first"])
def test_tied_embedding_gets_only_head_gradients_while_frozen(name):
    tied = MODELS["mqa, tied, slowed"]
    untied = dataclasses.replace(tied, tie_head=False)
    params = random_params(tied)
    spans = phase_of(tied, trained_layers=TRAINED[name]).spans
    _, grads = loss_and_grads(tied, spans)
    # The same model, with an untied head of equal values.
    _, apart = loss_and_grads(untied, spans, params | {"head": params["embedding"].T})
    assert not np.any(apart["embedding"])
    np.testing.assert_allclose(grads["embedding"], apart["head"].T, atol=1e-6)


@pytest.mark.sample(2)
def test_initial_values_are_the_same_on_every_mesh(initial_values, mesh):
    params = jax.jit(functools.partial(model.init, SMALL))(jax.random.key(0))
    for leaf, other in zip(
        jax.tree.leaves(params), jax.tree.leaves(initial_values), strict=True
    ):
        # The random bits are equal; quantiles may differ by a rounding or two.
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-7)
    # Shards along heads and along embed, in that order.
    shard = params["layers"]["query"].addressable_shards[0].data.shape
    assert shard == (2, 16 // num_shards("embed"), 4 // num_shards("heads"), 6)


def test_sharded_sequences_do_not_change_the_parameters():
    config = tiny_model()
    with jax.set_mesh(build_mesh(MeshConfig(fsdp=2, context=2, tensor=2))):
        params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    whole = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, whole)


# Field, invalid value, and reason.
BAD_FIELDS = {
    "num_layers": (-1, "must be at least 0"),
    "vocab_size": (-5, "must be at least 1"),
    "vocab_multiple": (0, "must be at least 1"),
    "scan_unroll": (-1, "scan_unroll is -1; it must be at least 0"),
    "num_kv_heads": (3, "num_heads is 4, which model.num_kv_heads 3 does not divide"),
    "head_dim": (5, "model.head_dim is 5; .* must be even"),
    "loss_chunk": (0, "must be at least 1"),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_impossible_sizes_are_refused(field):
    value, message = BAD_FIELDS[field]
    with pytest.raises(ValueError, match=message):
        tiny_model(**{field: value})
