"""Published recipes as configs: equal cost, equal targets, stated sizes and settings."""

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest

from scripts.bakeoff import load_runs
from stackjax.config import Config
from stackjax.config_file import read_config
from stackjax.growth import parse_growth
from stackjax.model.flops import flops_6nd, num_params
from stackjax.optimizers import AdamW, Muon
from stackjax.training.expand import expand
from stackjax.training.phase import Phase

RECIPES = sorted(Path("configs/recipes").glob("*.py"))
LARGE = {
    # Layers, channels and millions of parameters in each stage.
    "one_layer_124m": [(1, 768, 46), (12, 768, 124)],
    "nanochat_stack_d12": [(6, 768, 93), (12, 768, 135)],
    "sparkling_1b": [(24, 1024, 374), (24, 2048, 1364)],
    "midas_lidas_360m": [
        (4 * blocks, 960, params)
        for blocks, params in enumerate((87, 126, 165, 205, 244, 283, 322, 362), 1)
    ],
    "family_1b": [(12, 1024, 220), (24, 1024, 374), (24, 2048, 1364)],
    "completep_124m": [(3, 768, 60), (12, 768, 124)],
}
TWINS = {f"{name.rpartition('_')[0]}_tiny": name for name in LARGE}


@functools.cache
def load(name: str) -> Config:
    return read_config(Path("configs/recipes", f"{name}.py"))


@functools.cache
def load_all(name: str) -> dict[str, Config]:
    return load_runs(Path("configs/recipes", f"{name}.py"))(0)


def rate(phase: Phase, step: int) -> float:
    """Returns the learning rate in a step, relative to the peak."""
    found = float(phase.learning_rate(step % phase.num_steps)) / phase.learning_rate.peak
    return round(found, 6)


def test_every_recipe_has_a_large_and_a_tiny_config_with_equal_runs():
    assert {path.stem for path in RECIPES} == {*TWINS, *TWINS.values()}
    for tiny, large in TWINS.items():
        assert list(load_all(tiny)) == list(load_all(large)), tiny


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_compared_runs_have_equal_target_and_cost(path):
    config, runs = load(path.stem), load_all(path.stem)
    phases = {name: expand(run) for name, run in runs.items()}
    expected = "any" if "tiny" in path.stem else "accelerator"
    assert {run.platform for run in runs.values()} == {expected}
    assert len({run.workdir for run in runs.values()}) == len(runs)
    assert {"scratch"} <= {name for name, run in runs.items() if len(run.stages) == 1}
    budget = max(each[-1].end.flops_6nd for each in phases.values())
    for name, run in runs.items():
        last = phases[name][-1]
        target = dataclasses.replace(config.model, completep=last.model.completep)
        assert last.model == target, name
        assert budget - last.end.flops_6nd < last.per_step.flops_6nd, name
        assert dataclasses.replace(run.data, path=config.data.path) == config.data, name
    # The single run is one of them, and only the seed depends on the seed.
    seeds = load_runs(path)(3)
    assert {name: dataclasses.replace(run, seed=3) for name, run in runs.items()} == {
        name: dataclasses.replace(run, workdir=runs[name].workdir)
        for name, run in seeds.items()
    }
    alone = [dataclasses.replace(run, workdir=config.workdir) for run in runs.values()]
    assert config in alone


@pytest.mark.parametrize("name", LARGE)
def test_stages_have_the_stated_sizes(name):
    models = [phase.model for phase in expand(load(name))]
    sizes = [
        (model.num_layers, model.embed_dim, round(num_params(model) / 1e6)) for model in models
    ]
    assert sizes == LARGE[name]


@pytest.mark.parametrize("name", ["one_layer_tiny", "one_layer_124m"])
def test_one_layer_grows_at_80_percent_in_the_stable_phase(name):
    runs = load_all(name)
    for label, run in runs.items():
        *before, last = expand(run)
        tokens = last.end.tokens
        assert type(run.optimizer) is (Muon if label == "scratch" or "Muon" in label else AdamW)
        for phase in before:
            assert phase.end.tokens / tokens == pytest.approx(0.8, abs=0.01)
            assert phase.model.num_layers == (0 if "zero" in label else 1)
            assert last.optimizer_state == "keep"
            assert (run.stages[1].rewarm is None) == ("warm-up" not in label)
        start = last.learning_rate.decay_start
        assert start / tokens == pytest.approx(0.9, abs=0.01)
        assert rate(before[-1] if before else last, -1) == (1 if before else 0)
        assert rate(last, -1) == pytest.approx(0, abs=1e-3)


def test_nanochat_has_five_timings_and_one_switch_at_a_time():
    runs = load_all("nanochat_stack_d12")
    base = runs["replication, 5.25 tokens"]
    small, grown = expand(base)
    counted = num_params(small.model) - 32_768 * 768
    assert counted == pytest.approx(67.6e6, rel=1e-3)
    timings = [expand(run)[0].end.tokens for name, run in runs.items() if "replication" in name]
    ratios = [tokens / counted for tokens in timings]
    assert ratios == pytest.approx([1.25, 2.25, 3.25, 4.25, 5.25], abs=0.01)
    # The source's budget, in its own convention.
    assert grown.end.flops_6nd == pytest.approx(9.27e17, rel=0.02)
    assert [rate(small, 0), rate(small, -1)] == [1, 1]
    assert rate(grown, 0) == pytest.approx(1 - 1 / grown.num_steps, rel=1e-3)
    assert rate(grown, -1) == pytest.approx(0, abs=1e-4)
    changes = {
        "factor 4": {"factor"},
        "AdamW": {"optimizer"},
        "grown state": {"state"},
        "kept state": {"state"},
        "long cosine": {"schedule"},
        "all four": {"factor", "optimizer", "state", "schedule"},
    }
    for name, expected in changes.items():
        assert switches(base, runs[f"{name}, 5.25 tokens"]) == expected, name


def switches(first: Config, second: Config) -> set[str]:
    """Returns what differs between two runs of nanochat."""

    def values(run: Config) -> dict[str, object]:
        last = run.stages[-1]
        return {
            "factor": last.growth,
            "optimizer": type(run.optimizer),
            "state": last.optimizer_state,
            "schedule": last.schedule.shape if last.schedule else None,
        }

    one, two = values(first), values(second)
    return {name for name in one if one[name] != two[name]}


def test_sparkling_keeps_moments_and_warms_up_new_parameters():
    small, large = expand(load("sparkling_1b"))
    assert small.end.tokens / large.end.tokens == pytest.approx(0.5, abs=1e-3)
    rewarm = load("sparkling_1b").stages[1].rewarm
    assert rewarm is not None
    assert (rewarm.tokens / large.per_step.tokens, rewarm.ratio) == (250, 1.3)
    assert large.optimizer_state == "keep"
    assert large.growth is not None and large.growth.preserves_function == "always"
    assert rate(large, 0) == pytest.approx(rate(small, -1), rel=1e-3)


def test_blocks_of_four_grow_in_longer_and_longer_stages():
    runs = load_all("midas_lidas_360m")
    places = (("MIDAS", "middle"), ("LIDAS", "center"), ("last block", "last"))
    for name, at in places:
        phases = expand(runs[name])
        assert {phase.growth for phase in phases[1:]} == {
            parse_growth(f"insert_block(size=4, at={at})")
        }
        *lengths, _ = [phase.end.tokens - phase.start.tokens for phase in phases]
        ratios = [length / lengths[0] for length in lengths]
        assert ratios == pytest.approx(range(1, 8), rel=0.01)
        # The rate decays with all layers.
        assert rate(phases[-1], 0) == 1
        assert rate(phases[-1], -1) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["family_tiny", "family_1b"])
def test_each_member_and_those_before_cost_as_much_as_the_member_alone(name):
    phases = expand(load(name))
    ratios = []
    for phase in phases:
        alone = num_params(phase.model) * flops_6nd(phase.model)
        ratios.append(phase.end.flops_6nd / alone)
        # Every member ends with its own schedule.
        assert rate(phase, -1) == pytest.approx(0.1, rel=0.01)
    assert ratios == pytest.approx([5 if "tiny" in name else 20] * 3, rel=0.01)
    peaks = [phase.learning_rate.peak for phase in phases]
    assert all(small > large for small, large in itertools.pairwise(peaks))


def test_small_model_is_the_base_of_completep():
    for name, run in load_all("completep_124m").items():
        models = [phase.model for phase in expand(run)]
        assert {model.completep is not None for model in models} == {"CompleteP" in name}
        if len(models) > 1:
            assert models[0].base == dataclasses.replace(models[0], completep=None)
