"""Hooks: rows at the right steps, exactly once; metrics of any value."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import phase_of, tiny_model, tiny_run
from runs import rows

from stackjax.run import validation
from stackjax.run.goodput import Clock
from stackjax.run.hooks import BUILT_IN_KINDS, Hook, StepInfo, check_hooks, every
from stackjax.run.step_log import StepLog
from stackjax.run.train import train
from stackjax.run.watchdog import Watchdog
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Counts


def test_rows_of_a_hook_and_a_validation_metric_survive_a_restart(world, tmp_path, monkeypatch):
    calls, batch_sums = [], validation.batch_sums

    def with_ones(*args):
        sums, weight = batch_sums(*args)
        return sums | {"ones": weight}, weight

    monkeypatch.setattr(validation, "batch_sums", with_ones)

    @jax.jit
    def norms(params):
        return jnp.stack([jnp.sqrt(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(params)])

    def weights(step: StepInfo):
        calls.append(step.step)
        if len(calls) == 2:
            raise InterruptedError
        batch, found = next(step.validation_batches()), norms(step.params)
        return {"norms": found, "worst": jnp.inf, "rows": batch.tokens.shape[1]}

    config = world.config(workdir=tmp_path)
    hooks = [Hook(kind="weights", when=every(5 * 128), on_step=weights)]
    with pytest.raises(InterruptedError):
        train(config, hooks=hooks)
    train(config, hooks=hooks)
    found = [row for row in rows(tmp_path) if row["kind"] == "weights"]
    assert [row["tokens"] for row in found] == [5 * 128, 10 * 128, 15 * 128, 16 * 128]
    assert [row["worst"] for row in found] == [None] * 4
    assert [row["rows"] for row in found] == [config.evaluation.batch_size] * 4
    assert min(found[0]["norms"]) > 0
    (seam,) = (row for row in rows(tmp_path) if row["kind"] == "growth")
    evaluations = [row["ones"] for row in rows(tmp_path) if row["kind"] == "evaluation"]
    assert {*evaluations, seam["ones_before"], seam["ones"]} == {1.0}


@pytest.mark.parametrize("kind", BUILT_IN_KINDS)
def test_built_in_kinds_are_refused(kind):
    with pytest.raises(UserError, match=kind):
        check_hooks([Hook(kind=kind, when=every(1), on_step=lambda step: {})])


class Recorder:
    """A run that keeps rows in a list."""

    def __init__(self):
        self.config, self.rows, self.phases = tiny_run(), [], [phase_of(tiny_model())]
        self.history = types.SimpleNamespace(ended={})
        self.progress = types.SimpleNamespace(row=lambda *_: None)
        self.clock = Clock()
        self.watchdog = Watchdog()

    def write(self, kind, phase, step, counts, **values):
        self.rows.append(values)
        return values

    def flush(self):
        pass


def log_step(**metrics):
    """Returns the row's values for a step with these metrics."""
    run, saved = Recorder(), types.SimpleNamespace(wait=lambda: None, latest_step=None)
    log = StepLog(run, run.phases[0], saved, Counts())
    step = StepInfo(run, 0, None, 10, Counts(tokens=640, flops=1), None)
    loss, norm = metrics["loss"], metrics["grad_norm"]
    is_finite = np.isfinite(loss) and np.isfinite(norm)
    metrics |= {"learning_rate": 0.1, "is_finite": is_finite}
    log.add(step, jax.tree.map(jnp.asarray, metrics))
    log.settle()
    return run.rows[0]


def test_only_loss_and_gradient_norm_must_be_finite():
    row = log_step(loss=2.0, grad_norm=1.0, worst=np.inf, unknown=np.nan, each=[1.0, np.inf])
    assert (row["loss"], row["worst"], row["each"]) == (2.0, math.inf, [1.0, math.inf])
    for name in ("loss", "grad_norm"):
        with pytest.raises(FloatingPointError, match="nan"):
            log_step(**{"loss": 2.0, "grad_norm": 1.0, name: np.nan})
