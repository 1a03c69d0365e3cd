"""A run's stages become phases whose every number is settled."""

import dataclasses
import re

import hypothesis
import hypothesis.strategies as st
import pytest
from conftest import tiny_run

from stackjax.config import OptimizerConfig, Schedule, Stage
from stackjax.flops import flops_6nd, matmul_flops
from stackjax.growth import Interleave, Stack
from stackjax.phases import Counts, expand, stage_models, stage_steps


@hypothesis.given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 512))
def test_lengths_round_up_to_whole_steps(tokens, batch_size, seq_len):
    config = tiny_run(stages=(Stage(tokens=tokens, batch_size=batch_size),))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=seq_len))
    (steps,) = stage_steps(config)
    per_step = batch_size * seq_len
    assert (steps - 1) * per_step < tokens <= steps * per_step


def test_a_fraction_is_of_the_whole_run():
    stages = (
        Stage(fraction=0.25, batch_size=8),
        Stage(tokens=4800, batch_size=8),
        Stage(fraction=0.25, batch_size=16),
    )
    config = tiny_run(stages=stages)
    # 4800 tokens are the other half of 9600.
    assert stage_steps(config) == [2400 // 64 + 1, 4800 // 64, 2400 // 128 + 1]


def test_counts_add_up_over_the_stages():
    config = tiny_run()
    first, second = expand(config)
    assert (first.num_steps, second.num_steps) == (10, 10)
    assert first.start == Counts()
    assert first.end == second.start
    small, large = first.model, second.model
    assert (small.num_layers, large.num_layers) == (3, 6)
    assert second.end == Counts(
        tokens=640 + 1280,
        examples=80 + 160,
        flops_6nd=640 * flops_6nd(small) + 1280 * flops_6nd(large),
        flops=640 * matmul_flops(small, 8) + 1280 * matmul_flops(large, 8),
    )


def test_each_phase_has_the_numbers_of_its_stage():
    schedule = Schedule(shape="constant", axis="run")
    config = tiny_run()
    stages = (
        config.stages[0],
        dataclasses.replace(
            config.stages[1],
            peak_learning_rate=5e-3,
            schedule=schedule,
            optimizer_state="grow",
        ),
    )
    first, second = expand(dataclasses.replace(config, stages=stages))
    assert (first.directory, second.directory) == ("stage_0/train", "stage_1/train")
    assert (first.index, second.index) == (0, 1)
    assert (first.growth, second.growth) == (None, Stack(factor=2))
    assert (first.accumulate, second.accumulate) == (1, 2)
    assert second.optimizer_state == "grow"
    assert expand(config)[1].optimizer_state == "reset"
    assert (first.learning_rate.peak, second.learning_rate.peak) == (1e-2, 5e-3)
    # Over the stage, and over the run, counted from where the stage begins.
    assert first.learning_rate.horizon_tokens == 640
    assert first.learning_rate.first_tokens == 0
    assert second.learning_rate.horizon_tokens == 1920
    assert second.learning_rate.first_tokens == 640
    assert second.learning_rate.schedule is schedule


def test_a_peak_learning_rate_of_zero_is_not_the_default():
    stage = Stage(tokens=64, batch_size=8, peak_learning_rate=0.0)
    (phase,) = expand(tiny_run(stages=(stage,)))
    assert phase.learning_rate.peak == 0


def three_stages(factor):
    return (
        Stage(tokens=64, batch_size=8),
        Stage(tokens=64, batch_size=8, growth=Stack(factor=factor)),
        Stage(tokens=64, batch_size=8),
        Stage(tokens=64, batch_size=8, growth=Interleave(factor=2)),
    )


@pytest.mark.parametrize("factor", [1, 3])
def test_the_model_of_the_last_stage_stays_what_is_named_target(factor):
    config = tiny_run(stages=three_stages(factor))
    depths = [model.num_layers for model in stage_models(config)]
    assert depths == [3 // factor, 3, 3, 6]
    assert stage_models(config)[-1] == config.model


@pytest.mark.parametrize("factor", [1, 3])
def test_the_model_of_the_first_stage_stays_what_is_named_source(factor):
    config = tiny_run(stages=three_stages(factor), model_is="source")
    depths = [model.num_layers for model in stage_models(config)]
    assert depths == [6, 6 * factor, 6 * factor, 12 * factor]
    assert stage_models(config)[0] == config.model


def with_schedule(**fields):
    optimizer = OptimizerConfig(peak_learning_rate=1e-3, schedule=Schedule(**fields))
    return {"optimizer": optimizer}


def with_stages(*stages):
    return {"stages": tuple(Stage(batch_size=8, **fields) for fields in stages)}


# What is wrong with a run, and what its message must say.
ERRORS = {
    "no stages": (with_stages(), "stages is empty; a run has at least one stage."),
    "growth first": (
        with_stages({"tokens": 64, "growth": Stack(factor=2)}),
        "stages.0.growth is set, but there is no model before the first stage",
    ),
    "no length": (
        with_stages({"tokens": 64}, {}),
        "stages.1 has tokens None and fraction None; set one of the two",
    ),
    "two lengths": (
        with_stages({"tokens": 64, "fraction": 0.5}),
        "stages.0 has tokens 64 and fraction 0.5; set one of the two",
    ),
    "only fractions": (
        with_stages({"fraction": 0.5}, {"fraction": 0.5}),
        "fractions add up to 1.0; they must leave room for a stage whose length is in tok",
    ),
    "negative fraction": (
        with_stages({"tokens": 64}, {"fraction": -0.5}),
        "fractions add up to -0.5",
    ),
    "no tokens": (
        with_stages({"tokens": 0}),
        "stages.0 is 0 tokens long; it needs more than 0.",
    ),
    "no such source": (
        with_stages({"tokens": 64}, {"tokens": 64, "growth": Stack(factor=4)}),
        "Stack(factor=4) does not fit model.num_layers 6: 4 does not divide 6.",
    ),
    "wsd without decay": (
        with_schedule(shape="wsd"),
        "stages.0 is wsd without decay_tokens; say how many",
    ),
    "long warm-up": (
        with_schedule(warmup_tokens=641),
        "stages.0 warms up over 641 and decays over 0 tokens, which is more than its "
        "horizon of 640.",
    ),
    "long decay": (
        with_schedule(shape="wsd", warmup_tokens=600, decay_tokens=41),
        "stages.0 warms up over 600 and decays over 41 tokens",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_stages_that_do_not_fit_are_refused_with_the_reason(name):
    fields, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        expand(tiny_run(**fields))


def test_a_negative_fraction_is_refused_even_where_others_make_up_for_it():
    config = tiny_run(**with_stages({"tokens": 64}, {"fraction": 0.5}, {"fraction": -0.1}))
    with pytest.raises(ValueError, match=r"stages\.2"):
        expand(config)
