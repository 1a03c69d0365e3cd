"""The loss is the mean next-token log-likelihood, for every chunk size."""

import functools

import jax
import numpy as np
import pytest
from conftest import MODELS, first_microbatch, random_batch, random_params

from stackjax import model
from stackjax.model.loss import next_token_loss

CONFIG = MODELS["gqa"]
BATCH = random_batch()


def test_loss_sums_match_a_loop_over_positions():
    batch = first_microbatch(BATCH)
    weights = np.random.default_rng(1).uniform(0, 2, batch.tokens.shape)
    batch = batch._replace(loss_weights=weights.astype(np.float32))
    loss = functools.partial(next_token_loss, CONFIG, z_loss=0.5)
    sums = jax.jit(loss)(random_params(CONFIG), batch)
    logits = jax.jit(functools.partial(model.apply, CONFIG))(random_params(CONFIG), *batch[:3])
    logits = np.float64(logits)
    nll = squares = 0.0
    for b, row in enumerate(batch.tokens):
        for t in range(len(row)):
            # Every weight counts; the last position, whose next token is not in the
            # sequence, is told token 0.
            label = [*row, 0][t + 1]
            normaliser = np.log(np.sum(np.exp(logits[b, t])))
            nll += weights[b, t] * (normaliser - logits[b, t, label])
            squares += weights[b, t] * normaliser**2
    # A float32 sum with 64 terms.
    assert float(sums.nll) == pytest.approx(nll, rel=1e-5)
    assert float(sums.objective) == pytest.approx(nll + 0.5 * squares, rel=1e-5)
