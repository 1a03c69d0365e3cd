"""Every Python example in docs/extending.md, and the operator in docs/growth.md, works."""

import functools
import inspect
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import phase_of, random_batch, random_params, tiny_model, tiny_run

import stackjax as sj
from stackjax.growth import base
from stackjax.model import transformer
from stackjax.optimizers import base as optimizers
from stackjax.run import validation
from stackjax.training import train_state
from stackjax.training.compile import phase_optimizer
from stackjax.training.expand import expand
from stackjax.training.preflight import check

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
METRIC, SUMS, HOOK, OPTIMIZER = BLOCK.findall(Path("docs/extending.md").read_text())[2:]
OPERATOR = BLOCK.findall(Path("docs/growth.md").read_text())[-1]
GET_CONFIG = """
from conftest import tiny_run

def get_config():
    return tiny_run()
"""
MODEL = tiny_model()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a config file with an example in it."""
    monkeypatch.setattr(base, "_REGISTERED", dict(base._REGISTERED))
    monkeypatch.setattr(optimizers, "OPTIMIZERS", dict(optimizers.OPTIMIZERS))

    def load(example, *overrides):
        (tmp_path / "run.py").write_text(example + GET_CONFIG)
        return sj.load_config(tmp_path / "run.py", *overrides)

    return load


def edited(function, old, new, **names):
    """Returns a function with an edit in its source."""
    source = inspect.getsource(function)
    assert source.count(old) == 1
    scope = vars(sys.modules[function.__module__]) | names
    exec(source.replace(old, new), scope)
    return scope[function.__name__]


def test_operator_grows_a_run(load):
    config = load(OPERATOR, "--stages.1.growth", "mirror()")
    assert [phase.model.num_layers for phase in expand(config)] == [3, 6]


def test_optimizer_is_built_and_its_state_grows(load):
    config = load(OPTIMIZER, "--optimizer", "lion", "--stages.1.optimizer-state", "grow")
    _, estimate = check(config, 1)
    params = sum(leaf.size for leaf in jax.tree.leaves(estimate.state.params))
    assert estimate.state_bytes == 4 * (2 * params + 2)


def test_metric_joins_the_metrics_of_a_step():
    phase = phase_of(MODEL)
    tx, last = phase_optimizer(phase), '"is_finite": is_finite,\n'
    step = edited(train_state.train_step, last, last + METRIC)
    state = jax.eval_shape(
        functools.partial(train_state.init_state, MODEL, tx), jax.random.key(0)
    )
    args = phase.step_inputs, state, random_batch()
    _, metrics = jax.eval_shape(functools.partial(step, phase, tx, 0.0), *args)
    assert metrics["param_norm"].shape == ()


def test_validation_metric_is_a_sum_over_tokens():
    last = '    return {"held_out_loss": sums.nll}, weight\n'
    sums = edited(validation.batch_sums.__wrapped__, last, SUMS, transformer=transformer)
    found, weight = jax.jit(sums, static_argnums=0)(MODEL, random_params(MODEL), random_batch())
    assert 0 < found["accuracy"] < weight


def test_hook_measures_the_model_on_validation_data(monkeypatch):
    given, batch = [], random_batch()
    monkeypatch.setattr(sj, "load_config", lambda path, *overrides: tiny_run())
    monkeypatch.setattr(sj, "train_run", lambda config, hooks: given.extend(hooks))
    exec(HOOK, {})
    step = types.SimpleNamespace(
        phase=phase_of(MODEL),
        params=random_params(MODEL),
        validation_batches=lambda: iter([batch]),
    )
    apply = jax.jit(transformer.apply, static_argnums=0)
    logits = apply(MODEL, step.params, *(field[0] for field in batch[:3]))
    found = given[0].on_step(step)["largest_logit"]
    np.testing.assert_allclose(found, jnp.max(logits), rtol=1e-5)
