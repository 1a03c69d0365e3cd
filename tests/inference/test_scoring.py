"""Log-likelihood scores: reference values, meshes, memory and invalid spans."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from conftest import MESHES, MODELS, equations, mesh_of, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from stackjax import model
from stackjax.inference.pretrained import Pretrained
from stackjax.inference.scoring import (
    NUM_LENGTHS,
    Rows,
    Span,
    padded_lengths,
    score,
    score_rows,
)
from stackjax.model import ModelConfig
from stackjax.sharding.partition import on_mesh
from stackjax.tokenizer.tokenization import tokenization
from stackjax.tokenizer.tokenizer import load_tokenizer

SEQ_LEN = 20


@functools.cache
def pretrained_of(config: ModelConfig, mesh_name: str = "one device") -> Pretrained:
    mesh = mesh_of(mesh_name)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
        auto_sharded = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(abstract, mesh))
        params = jax.device_put(random_params(config), auto_sharded)
    return Pretrained(
        config=config,
        params=params,
        mesh=mesh,
        tokenization=tokenization(load_tokenizer("bytes")),
        seq_len=SEQ_LEN,
    )


_apply = jax.jit(model.apply, static_argnums=0)


def log_likelihoods(config: ModelConfig, text: Sequence[int]) -> np.ndarray:
    """Returns float64 log-likelihoods of the next token, [T, V]."""
    tokens = np.zeros((1, SEQ_LEN + 1), np.int32)
    tokens[0, : len(text)] = text
    positions = np.arange(SEQ_LEN + 1, dtype=np.int32)[None]
    logits_BTV = _apply(config, random_params(config), tokens, positions, None)
    logits_TV = np.asarray(logits_BTV, np.float64)[0, : len(text), : config.vocab_size]
    return logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)


def expected(config: ModelConfig, span: Span) -> tuple[float, bool]:
    """Returns a span's reference score."""
    labels = np.asarray(span.tokens[span.start : span.stop], int)
    log_likelihoods_TV = log_likelihoods(config, span.tokens)[span.start - 1 : span.stop - 1]
    is_greedy = bool(np.all(log_likelihoods_TV.argmax(-1) == labels))
    return log_likelihoods_TV[np.arange(len(labels)), labels].sum(), is_greedy


@st.composite
def spans(draw) -> Span:
    # The vocabulary is small, so some spans are greedy.
    tokens = draw(st.lists(st.integers(0, 10), min_size=1, max_size=SEQ_LEN + 1))
    start = draw(st.integers(1, len(tokens)))
    return Span(tokens, start, draw(st.integers(start, len(tokens))))


def random_spans() -> list[Span]:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 11, rng.integers(2, SEQ_LEN + 2)) for _ in range(19)]
    return [Span(text, int(rng.integers(1, len(text))), len(text)) for text in texts]


def assert_scored(pretrained: Pretrained, batch: list[Span], batch_size: int) -> None:
    found = score(pretrained, batch, batch_size)
    reference = [expected(pretrained.config, span) for span in batch]
    assert len(found) == len(batch)
    np.testing.assert_allclose(
        [each.log_likelihood for each in found],
        [log_likelihood for log_likelihood, _ in reference],
        # Sums of twenty float32 log-likelihoods; logits are about ten.
        rtol=2e-5,
        atol=2e-5,
    )
    assert [each.is_greedy for each in found] == [is_greedy for _, is_greedy in reference]


@pytest.mark.sample(3)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(batch=st.lists(spans(), max_size=9), batch_size=st.sampled_from([1, 4]))
def test_batched_scores_match_the_reference(config, batch, batch_size):
    assert_scored(pretrained_of(config), batch, batch_size)


@pytest.mark.parametrize("mesh_name", MESHES)
def test_scores_are_equal_on_every_mesh(mesh_name):
    assert_scored(pretrained_of(MODELS["gqa"], mesh_name), random_spans(), 5)


def test_span_is_greedy_if_every_token_is_the_argmax():
    config, text = MODELS["gqa"], [3]
    for _ in range(6):
        text.append(int(log_likelihoods(config, text)[-1].argmax()))
    wrong = [*text[:-1], (text[-1] + 1) % config.vocab_size]
    batch = [Span(text, 1, 7), Span(wrong, 1, 7), Span(wrong, 1, 6), Span(wrong, 7, 7)]
    found = score(pretrained_of(config), batch)
    assert [each.is_greedy for each in found] == [True, False, True, True]


def test_full_logits_are_never_stored():
    config = dataclasses.replace(MODELS["gqa"], loss_chunk=8)
    assert_scored(pretrained_of(config), random_spans(), 4)
    rows = Rows(*(np.zeros((4, 32), dtype) for dtype in (int, int, int, bool)))
    params = jax.device_put(random_params(config))
    program = jax.make_jaxpr(functools.partial(score_rows, config))(params, rows)
    held = [
        variable.aval.shape[1]
        for equation in equations(program.jaxpr)
        for variable in equation.outvars
        if variable.aval.shape[2:] == (config.padded_vocab_size,)
    ]
    assert set(held) == {1, 8}, "1 is the comparison of labels with every token"


@pytest.mark.parametrize("longest", [1, 20, 128, 512, 1000, 2048, 4096])
def test_padded_lengths_are_few_and_sufficient(longest):
    lengths = padded_lengths(longest)
    assert len(lengths) <= NUM_LENGTHS
    assert longest <= lengths[0] < longest + 128
    assert lengths == sorted(lengths, reverse=True)
    assert all(length % 128 == 0 for length in lengths if length > 128)


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 1), (1, 4)])
def test_invalid_span_is_refused(start, stop):
    with pytest.raises(ValueError, match=f"span from {start} to {stop} of 3 tokens"):
        Span([1, 2, 3], start, stop)
