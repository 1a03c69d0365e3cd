"""The library: its names, and the notebook in docs/library.md."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest
from conftest import tiny_model, tiny_run
from recorded import record_run, row, seam
from runs import rows

import stackjax as sj
from stackjax.options import Sampling
from stackjax.runtime.errors import UserError

PAGE = Path("docs/library.md").read_text()


@pytest.fixture(scope="module")
def config(world):
    return world.config()


def test_import_loads_no_jax_and_lists_every_name():
    code = "import sys, stackjax; assert 'jax' not in sys.modules; print(dir(stackjax))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(repr(name) in done.stdout for name in sj.__all__)


@pytest.mark.parametrize("name", sj.__all__)
def test_every_name_loads_has_a_docstring_and_is_no_command(name):
    assert getattr(sj, name).__doc__
    assert name in ("growth", "model") or not Path("stackjax", f"{name}.py").exists()
    assert name in PAGE or name[0].isupper()


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'grow_stat'"):
        sj.grow_stat  # type: ignore  # noqa: B018


def test_notebook_of_the_page_trains_grows_and_trains_on(world, config):
    (notebook,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found = {}
    exec(notebook.replace("configs/tiny.py", str(world.path / "config.py")), found)
    assert int(found["state"].step) == 5
    assert found["metrics"]["learning_rate"] == 1
    assert found["large"].model.num_layers == 2 * found["small"].model.num_layers
    assert np.isfinite(sj.validation_loss(config, found["large"], found["state"]))


def test_losses_are_those_of_a_run(config, uncut):
    expected = [row["loss"] for row in rows(uncut) if row["kind"] == "train"]
    source, target = sj.expand(config)
    state, losses = sj.init_state(config, source), []
    for phase in (source, target):
        if phase is target:
            state = sj.grow_state(config, source, target, state)
        step = sj.make_step(config, phase)
        for batch in sj.batches(config, phase):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    # The run had one device, here there are eight.
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_batches_continue_from_a_step(config):
    phase, _ = sj.expand(config)
    whole = [batch.tokens for batch in sj.batches(config, phase, steps=4)]
    rest = [batch.tokens for batch in sj.batches(config, phase, start=2, steps=2)]
    np.testing.assert_array_equal(whole[2:], rest)


def test_own_optimizer_applies_its_updates_as_optax_does(config):
    phase, _ = sj.expand(config)
    (batch,) = sj.batches(config, phase, steps=1)

    def moved(rate):
        state = sj.init_state(config, phase, optax.sgd(rate))
        before = np.array(state.params["head"])
        state, _ = sj.make_step(config, phase, optax.sgd(rate))(state, batch)
        return np.asarray(state.params["head"]) - before

    once = moved(1.0)
    assert np.any(once)
    np.testing.assert_allclose(moved(2.0), 2 * once, atol=1e-6)


def test_texts_are_generated_and_scored_alone_as_in_a_batch(uncut):
    model, texts = sj.load_pretrained(str(uncut)), ["a model", "that grows"]
    greedy = {"max_tokens": 4, "sampling": Sampling(temperature=0)}
    together = sj.generate_text(model, texts, **greedy)
    assert together == [*sj.generate_text(model, texts[:1], **greedy), together[1]]
    scores = [score.log_likelihood for score in sj.score_texts(model, texts)]
    alone = [sj.score_texts(model, [text])[0].log_likelihood for text in texts]
    np.testing.assert_allclose(scores, alone, rtol=1e-4)
    assert max(scores) < 0


def test_compared_runs_give_the_speed_up_of_the_grown_run(tmp_path):
    def write(name, stages, speedup):
        found = [row("train", 0, 1e14, 5.0)] + ([seam(1, 5e14)] if len(stages) > 1 else [])
        for flops in np.geomspace(1e15, 1e17, 40):
            loss = float(3 * ((1 + speedup) * flops / 1e16) ** -0.05)
            found.append(row("evaluation", len(stages) - 1, flops, loss))
        tiny = tiny_run(tmp_path / name, model=tiny_model(num_layers=6))
        config = dataclasses.replace(tiny, stages=stages)
        return record_run(tmp_path / name, config, found)

    stages = tiny_run().stages
    paths = [write("scratch", stages[:1], 0.0), write("grown", stages, 0.5)]
    (comparison,) = sj.compare_runs(paths)
    speedups = [each["flops_6nd"].estimate.value for each in comparison.at_losses.values()]
    # Scratch never reaches the final loss of the grown run.
    assert speedups[:-1] == [pytest.approx(0.5, abs=0.02)] * 4


def test_mistake_in_an_override_is_a_user_error(world):
    with pytest.raises(UserError, match="seed is -1"):
        sj.load_config(world.path / "config.py", "--seed", "-1")
