"""Task scores during training equal scores from the command."""

import dataclasses
import functools
import json

import jax
import lm_eval.tasks
import numpy as np
import pytest
from conftest import MODELS, phase_of, random_params
from runs import rows

from stackjax.config import TasksConfig
from stackjax.growth import DepthRandom
from stackjax.inference.pretrained import load_pretrained
from stackjax.inference.tasks import load_tasks, measure
from stackjax.run import train
from stackjax.run.validation import model_params
from stackjax.sharding.config import MeshConfig
from stackjax.training.train_state import TrainState

TASK = {
    "task": "next_word",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(autouse=True)
def only_local(monkeypatch):
    """Finding the harness's own tasks takes seconds."""
    only = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", only)


@pytest.fixture
def task_dir(tmp_path):
    rng = np.random.default_rng(0)
    words = ("model", "grows", "while", "trains")
    documents = [
        {"text": "a model that", "choices": [" grows", f" {rng.choice(words)}x"], "label": 0}
        for _ in range(6)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    kwargs = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "next_word.yaml").write_text(json.dumps(TASK | kwargs))
    return tmp_path / "tasks"


def with_tasks(world, task_dir, workdir, **changes):
    config = world.config(workdir=workdir)
    tasks = TasksConfig(names=("next_word",), every_tokens=5 * 128, directory=str(task_dir))
    return dataclasses.replace(config, tasks=dataclasses.replace(tasks, **changes))


@pytest.mark.slow
def test_scores_at_intervals_and_at_the_end(world, task_dir, tmp_path):
    # Scoring needs whole sequences, training does not.
    config = with_tasks(world, task_dir, tmp_path / "run")
    train.train(dataclasses.replace(config, mesh=MeshConfig(context=2)))
    found = [row for row in rows(tmp_path / "run") if row["kind"] == "tasks"]
    assert [row["tokens"] for row in found] == [5 * 128, 10 * 128, 15 * 128, 16 * 128]
    pretrained = load_pretrained(str(tmp_path / "run"))
    scores = measure(load_tasks(["next_word"], task_dir), pretrained)["next_word"]["metrics"]
    assert {name: found[-1][f"next_word/{name}"] for name in scores} == scores


def test_scored_params_have_masks_applied():
    growth, source = DepthRandom(2, mask_tokens=640), MODELS["gqa"]
    phase = phase_of(
        growth.target_config(source),
        source=source,
        growth=growth,
        reparameterizations=growth.reparameterizations(source),
    )
    state = TrainState(np.int32(5), random_params(phase.model), None)
    params = model_params(phase, state)
    jax.tree.map(
        np.testing.assert_array_equal, params, phase.model_params(state.params, phase.tokens(5))
    )
    # Half open.
    new, old = params["layers"]["out"][1], state.params["layers"]["out"][1]
    np.testing.assert_allclose(new, old / 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"every_tokens": None}, "tasks.every_tokens is None"),
        ({"names": ("next_wrod",)}, "no task 'next_wrod' .* next_word"),
        ({"directory": "no/where"}, "directory no/where is not"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_invalid_tasks_are_refused_without_side_effects(
    world, task_dir, tmp_path, changes, said
):
    with pytest.raises(ValueError, match=said):
        train.train(with_tasks(world, task_dir, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
