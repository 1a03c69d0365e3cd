"""Expansion of a run's stages into phases."""

import dataclasses
import functools
import itertools
import pickle
import re
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import phase_of, random_params, tiny_model, tiny_run

from stackjax import model
from stackjax.config import BatchStep, Config, Rewarm, Schedule, Stage
from stackjax.data.config import DataConfig, SourceConfig
from stackjax.data.mixture import Mixture
from stackjax.growth import (
    DepthFresh,
    DepthRandom,
    DepthZero,
    InsertBlock,
    Interleave,
    LayerMap,
    Learn,
    Noise,
    Stack,
    Untie,
    WidthRandom,
    WidthSplit,
    WidthZero,
    chain,
)
from stackjax.model.config import RopeScaling
from stackjax.model.flops import flops_6nd, matmul_flops
from stackjax.optimizers import AdamW
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand
from stackjax.training.learning_rate import ParameterRates
from stackjax.training.phase import Counts, EarlyEnd
from stackjax.training.run_history import RunHistory
from stackjax.training.stages import stage_models, stage_tokens


@hypothesis.given(st.integers(1, 10**6), st.integers(1, 64), st.integers(2, 512))
def test_stage_lengths_round_up_to_whole_steps(tokens, batch_size, seq_len):
    config = tiny_run(stages=(Stage(tokens=tokens, batch_size=batch_size),))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=seq_len))
    (whole,) = stage_tokens(config)
    per_step = batch_size * seq_len
    assert whole - per_step < tokens <= whole
    assert whole % per_step == 0


def test_stage_fraction_is_a_fraction_of_the_run():
    stages = (
        Stage(fraction=0.25, batch_size=8),
        Stage(tokens=4800, batch_size=8),
        Stage(fraction=0.25, batch_size=16),
    )
    config = tiny_run(stages=stages)
    # The two fractions are half the run, so 4800 tokens are the other half.
    assert stage_tokens(config) == [(2400 // 64 + 1) * 64, 4800, (2400 // 128 + 1) * 128]


def test_counts_accumulate_over_stages():
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


def test_each_phase_has_its_stages_settings():
    schedule = Schedule(shape="constant", warmup_tokens=64, axis="run")
    config = tiny_run()
    stages = (
        config.stages[0],
        dataclasses.replace(
            config.stages[1],
            peak_learning_rate=5e-3,
            schedule=schedule,
            optimizer_state="grow",
            remat="full",
            loss_chunk=3,
        ),
    )
    first, second = expand(dataclasses.replace(config, stages=stages))
    assert (first.directory, second.directory) == ("stage_0/train", "stage_1/train")
    assert (first.index, second.index) == (0, 1)
    assert (first.growth, second.growth) == (None, Stack(factor=2))
    assert (first.accumulate, second.accumulate) == (1, 2)
    assert second.optimizer_state == "grow"
    assert expand(config)[1].optimizer_state == "reset"
    assert first.model == expand(config)[0].model
    executed = dataclasses.replace(expand(config)[1].model, remat="full", loss_chunk=3)
    assert second.model == executed
    assert (first.learning_rate.peak, second.learning_rate.peak) == (1e-2, 5e-3)
    # The first schedule covers its stage. The second covers the run.
    assert first.learning_rate.horizon_tokens == 640
    assert first.learning_rate.first_tokens == 0
    assert second.learning_rate.horizon_tokens == 1920
    assert second.learning_rate.first_tokens == 640
    assert second.learning_rate.shape == schedule.shape


def test_peak_learning_rate_of_zero_is_rejected():
    stage = Stage(tokens=64, batch_size=8, peak_learning_rate=0.0)
    with pytest.raises(ValueError, match=r"stages\.0\.peak_learning_rate is 0\.0; it must be"):
        tiny_run(stages=(stage,))


def three_stages(factor):
    return (
        Stage(tokens=64, batch_size=8),
        Stage(tokens=64, batch_size=8, growth=Stack(factor=factor)),
        Stage(tokens=64, batch_size=8),
        Stage(tokens=64, batch_size=8, growth=Interleave(factor=2)),
    )


@pytest.mark.parametrize("factor", [1, 3])
def test_last_stage_has_the_configured_model_by_default(factor):
    config = tiny_run(stages=three_stages(factor))
    depths = [model.num_layers for model in stage_models(config)]
    assert depths == [3 // factor, 3, 3, 6]
    assert stage_models(config)[-1] == config.model


@pytest.mark.parametrize("factor", [1, 3])
def test_first_stage_has_the_configured_model_if_model_is_source(factor):
    config = tiny_run(stages=three_stages(factor), model_is="source")
    depths = [model.num_layers for model in stage_models(config)]
    assert depths == [6, 6 * factor, 6 * factor, 12 * factor]
    assert stage_models(config)[0] == config.model


def with_schedule(**fields):
    optimizer = AdamW(peak_learning_rate=1e-3, schedule=Schedule(**fields))
    return {"optimizer": optimizer}


class Halved(Stack):
    """A stack with a wrong `source_depth`."""

    def source_depth(self, depth):
        return depth


def with_stages(*stages):
    return {"stages": tuple(Stage(batch_size=8, **fields) for fields in stages)}


def growing(growth, **fields):
    """Returns two stages of ten 64-token steps; the second stage grows."""
    return with_stages({"tokens": 640}, {"tokens": 640, "growth": growth, **fields})


LEARNED_ALONE = (
    "stages.1 has rewarm, scale_by_fan_in or train_layers, which a learned growth does not "
    "take: all of its parameters are new."
)
NOTHING_NEW = (
    "stages.1.train_layers is 'new', but the stage has no growth that adds layers; name them "
    "by number, or train 'all'."
)
NO_GROWTH = (
    "which has no effect while stages.1.growth is None; leave it out, or set stages.1.gr"
)

# Invalid runs and the expected error messages.
ERRORS = {
    "no stages": (with_stages(), "stages is (); it must be from 1 to 256 long."),
    "growth first": (
        with_stages({"tokens": 64, "growth": Stack(factor=2)}),
        "stages.0.growth is set, but there is no model before the first stage",
    ),
    "no length": (
        with_stages({"tokens": 64}, {}),
        "stages.1 has tokens None and fraction None",
    ),
    "two lengths": (
        with_stages({"tokens": 64, "fraction": 0.5}),
        "stages.0 has tokens 64 and fraction 0.5",
    ),
    "only fractions": (
        with_stages({"fraction": 0.5}, {"fraction": 0.5}),
        "fractions add up to 1.0",
    ),
    "negative fraction": (
        with_stages({"tokens": 64}, {"fraction": -0.5}),
        "stages.1.fraction is -0.5; it must be more than 0 and less than 1",
    ),
    "no tokens": (
        with_stages({"tokens": 0}),
        "stages.0.tokens is 0; it must be at least 1",
    ),
    "no such source": (
        with_stages({"tokens": 64}, {"tokens": 64, "growth": Stack(factor=4)}),
        "Stack(factor=4) does not fit model.num_layers 6: 4 does not divide 6.",
    ),
    "a source that does not grow so": (
        with_stages({"tokens": 64}, {"tokens": 64, "growth": InsertBlock(5)}),
        "InsertBlock(size=5) does not fit model.num_layers 1: 5 does not divide 1.",
    ),
    "a growth that contradicts itself": (
        with_stages({"tokens": 64}, {"tokens": 64, "growth": Halved(2)}),
        "stages.1.growth is halved(2), which cannot make this model: from its source_config it "
        "makes another, where model.num_layers is 12, not 6",
    ),
    "wsd without decay": (
        with_schedule(shape="wsd"),
        "stages.0 is wsd without decay_tokens; say how many",
    ),
    "long warm-up": (
        with_schedule(warmup_tokens=641),
        "stages.0 warms up over 641 and decays over 0 tokens, which is more than its "
        "horizon of 640",
    ),
    "long decay": (
        with_schedule(shape="wsd", warmup_tokens=600, decay_tokens=41),
        "stages.0 warms up over 600 and decays over 41 tokens",
    ),
    "long mask": (
        growing(DepthRandom(2, mask_tokens=641)),
        "stages.1 is 640 tokens long, and the last mask of "
        "depth_random(factor=2, mask_tokens=641) is open after 641; lower mask_tokens, or "
        "make the stage longer.",
    ),
    "long masks in turn": (
        growing(WidthRandom(embed=2, mlp=2, mask_tokens=321)),
        "width_random(embed=2, mlp=2, mask_tokens=321) is open after 642; lower",
    ),
    "long mask in a chain": (
        growing(chain(Stack(2), WidthRandom(embed=2, mask_tokens=641))),
        "the last mask of stack(2) + width_random(embed=2, mask_tokens=641) is open after 641",
    ),
    "learned moments": (
        growing(Learn(2, fit_steps=3), optimizer_state="grow"),
        "stages.1.optimizer_state is 'grow'; after a learned growth the optimizer can only be "
        "'reset'.",
    ),
    "learned, old moments": (
        growing(Learn(2, fit_steps=3), optimizer_state="keep"),
        "stages.1.optimizer_state is 'keep'; after a learned growth",
    ),
    "learned, rewarmed": (growing(Learn(2), rewarm=Rewarm(tokens=64)), LEARNED_ALONE),
    "learned, scaled": (growing(Learn(2), scale_by_fan_in=True), LEARNED_ALONE),
    "learned, frozen": (growing(Learn(2), train_layers="1"), LEARNED_ALONE),
    "learned, new": (growing(Learn(2), train_layers="new"), LEARNED_ALONE),
    "learned in a chain": (
        growing(chain(Learn(2), Noise())),
        "stages.1.growth is learn(factor=2) + noise(0.2); a learned growth stands alone, and "
        "grows depth and width by itself.",
    ),
    "long fit": (
        growing(Learn(2, fit_steps=10)),
        "stages.1 has 10 steps, of which its growth takes 10 for the fit; give it more "
        "tokens, or fewer fit_steps.",
    ),
    "frozen by no pattern": (
        with_stages({"tokens": 64}, {"tokens": 64, "train_layers": "1-x"}),
        "stages.1.train_layers: layer map '1-x': cannot read 'x'; write parts joined by '-', "
        "as in '12-345*7-6', or '1,2-(3..10)*2-11' for layers from 10 on. It may also be "
        "'all' or 'new'.",
    ),
    "layer 0": (
        with_stages({"tokens": 64, "train_layers": "0"}),
        "stages.0.train_layers: layer map '0': '0' names no layer; patterns count from 1",
    ),
    "frozen by name": (
        with_stages({"tokens": 64, "train_layers": "old"}),
        "stages.0.train_layers: layer map 'old': cannot read",
    ),
    "no such layer": (
        with_stages({"tokens": 64, "train_layers": "(5..7)"}),
        "stages.0.train_layers is '(5..7)', which names layer 7 of a model with 6.",
    ),
    "no such layer yet": (
        with_stages({"tokens": 64, "train_layers": "4"}, {"tokens": 64, "growth": Stack(2)}),
        "stages.0.train_layers is '4', which names layer 4 of a model with 3.",
    ),
    "new without growth": (
        with_stages({"tokens": 64}, {"tokens": 64, "train_layers": "new"}),
        NOTHING_NEW,
    ),
    "new in width": (growing(WidthSplit(embed=2), train_layers="new"), NOTHING_NEW),
    "new of noise": (growing(Noise(), train_layers="new"), NOTHING_NEW),
    "new in order": (growing(LayerMap("654321"), train_layers="new"), NOTHING_NEW),
    "rewarmed without growth": (
        with_stages({"tokens": 64}, {"tokens": 64, "rewarm": Rewarm(tokens=64)}),
        NO_GROWTH,
    ),
    "rewarmed without anything new": (
        growing(Noise(), rewarm=Rewarm(tokens=64)),
        "stages.1.rewarm is set, which has no effect while stages.1.growth is noise(0.2)",
    ),
    "scaled without a longer fan-in": (
        growing(Stack(2), scale_by_fan_in=True),
        "stages.1.scale_by_fan_in is set, which has no effect while stages.1.growth is",
    ),
    "scaled without growth": (
        with_stages({"tokens": 64}, {"tokens": 64, "scale_by_fan_in": True}),
        NO_GROWTH,
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_invalid_stages_are_rejected_with_the_reason(name):
    fields, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        expand(tiny_run(**fields))


@pytest.mark.parametrize(
    "growth",
    [
        DepthRandom(2, mask_tokens=640),
        WidthRandom(embed=2, mlp=2, mask_tokens=320),
        WidthRandom(embed=2, mlp=2, heads=2, mask_tokens=640, phases="together"),
        Learn(2, fit_steps=9),
    ],
)
def test_mask_or_fit_of_maximal_length_is_accepted(growth):
    assert expand(tiny_run(**growing(growth)))[-1].end.tokens == 1280


LEARN = Learn(2, embed=2, mlp=2, heads=2, fit_steps=3, learning_rate=0.25)


def learned_run(**fields):
    """Returns a run of three stages with a learned growth in the second."""
    stages = (
        Stage(tokens=640, batch_size=8),
        Stage(tokens=1280, batch_size=16, accumulate=2, growth=LEARN, **fields),
        Stage(tokens=64, batch_size=8, growth=Stack(2)),
    )
    return tiny_run(stages=stages, model=tiny_model(num_layers=3), model_is="source")


def test_learned_growth_is_fitted_in_the_first_steps_of_its_stage():
    first, fit, train, last = expand(learned_run())
    assert [phase.directory for phase in (first, fit, train, last)] == [
        "stage_0/train",
        "stage_1/fit",
        "stage_1/train",
        "stage_2/train",
    ]
    assert [phase.index for phase in (first, fit, train, last)] == [0, 1, 2, 3]
    assert (fit.num_steps, train.num_steps) == (3, 7)
    assert (fit.growth, train.growth) == (LEARN, None)
    assert (fit.optimizer_state, train.optimizer_state) == ("reset", "reset")
    assert (fit.source, fit.model) == (first.model, LEARN.target_config(first.model))
    assert train.source == train.model == fit.model == last.source
    assert [len(phase.reparameterizations) for phase in (first, fit, train)] == [0, 1, 0]
    assert {(phase.batch_size, phase.accumulate) for phase in (fit, train)} == {(16, 2)}


def test_fit_has_a_constant_learning_rate_and_the_stage_schedule_follows():
    _, fit, train, _ = expand(learned_run())
    assert [float(fit.learning_rate(step)) for step in range(3)] == [0.25] * 3
    # The schedule covers the remaining seven steps.
    assert (train.learning_rate.peak, train.learning_rate.horizon_tokens) == (1e-2, 7 * 128)
    assert train.learning_rate.first_tokens == 0
    assert float(train.learning_rate(6)) == pytest.approx(1e-3)
    of_run = learned_run(schedule=Schedule(shape="constant", warmup_tokens=64, axis="run"))
    assert expand(of_run)[2].learning_rate.first_tokens == 640 + 3 * 128


def test_fit_flops_include_the_target_parameters_and_later_counts_continue():
    first, fit, train, last = expand(learned_run())
    # Once per microbatch; the stage has two microbatches.
    making = 2 * LEARN.fit(first.model).flops(model.logical_axes(first.model))
    large = fit.model
    step = Counts(
        tokens=128,
        examples=16,
        flops_6nd=128 * flops_6nd(large),
        flops=128 * matmul_flops(large, 8),
    )
    assert train.per_step == step
    assert fit.per_step == dataclasses.replace(
        step, flops_6nd=step.flops_6nd + making, flops=step.flops + making
    )
    assert (fit.start, train.start, last.start) == (first.end, fit.end, train.end)
    assert train.end == first.end.after(step, 10).after(
        Counts(flops_6nd=making, flops=making), 3
    )
    assert (train.end.tokens, train.end.examples) == (640 + 1280, 80 + 160)


@pytest.mark.parametrize(
    "growth", [LEARN, Learn(3), Learn(heads=2), Learn(embed=Fraction(3, 2), mlp=2)]
)
def test_fit_flops_are_three_times_the_flops_counted_by_xla(growth):
    source = tiny_model(vocab_size=40, embed_dim=32, mlp_dim=48)
    axes = model.logical_axes(source)
    maps = jax.eval_shape(
        functools.partial(growth.init_maps, axes, source, key=jax.random.key(0))
    )
    make = jax.jit(lambda maps, params: growth.materialize(maps, params, axes, source))
    counted = make.lower(maps, random_params(source)).compile().cost_analysis()["flops"]
    # Repeating the head map for each head of a group is not a matrix product.
    assert growth.fit(source).flops(axes) == pytest.approx(3 * counted, rel=0.02)


# The growth, the `train_layers` setting, and the trained layers of six, marked X.
TRAINED = {
    "all": (Stack(2), "all", None),
    "new of stack": (Stack(2), "new", "...XXX"),
    "new of interleave": (Interleave(2), "new", ".X.X.X"),
    "new of three copies": (Interleave(3), "new", ".XX.XX"),
    "new of middle block": (InsertBlock(2), "new", "..XX.."),
    "new of last block": (InsertBlock(2, at="last"), "new", "....XX"),
    "new of layer map": (LayerMap("12-3*3-2"), "new", "...XXX"),
    "new of zero": (DepthZero(2), "new", ".X.X.X"),
    "new of random": (DepthRandom(2, 64, order="stack"), "new", "...XXX"),
    "new of fresh": (DepthFresh(4), "new", "..XXXX"),
    "new of untied": (Untie(2), "new", "...XXX"),
    "new of center": (InsertBlock(2, at="center"), "new", "..X.X."),
    "new of chain": (chain(Stack(3), WidthSplit(embed=2)), "new", "..XXXX"),
    "numbers": (None, "1-4*2-2", "XX.X.."),
    "numbers after growth": (Stack(2), "(4..6)", "...XXX"),
    "every number": (None, "123456", "XXXXXX"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_layers_are_the_named_or_new_layers(name):
    growth, layers, drawn = TRAINED[name]
    trained = None if drawn is None else tuple(mark == "X" for mark in drawn)
    phase = expand(tiny_run(**growing(growth, train_layers=layers)))[1]
    assert phase.trained_layers == trained
    assert phase.per_step.flops == 64 * matmul_flops(phase.model, 8, trained)
    assert phase.per_step.flops_6nd == 64 * flops_6nd(phase.model, trained)
    if trained is None:
        assert phase.parameter_rates is None
    else:
        assert phase.parameter_rates == ParameterRates(
            source=phase.source,
            growth=growth,
            rewarm=None,
            scale_by_fan_in=False,
            trained_layers=trained,
        )


@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_spans_are_maximal_runs_of_trained_or_frozen_layers(trained):
    config = tiny_model(num_layers=len(trained), remat="full", scan_unroll=4)
    assert phase_of(config).spans is None
    spans = phase_of(config, trained_layers=tuple(trained)).spans
    assert [span.trains for span in spans for _ in range(span.num_layers)] == trained
    for span, following in itertools.pairwise(spans):
        assert span.trains != following.trains
    assert {(span.remat, span.unroll) for span in spans} == {("full", 4)}


EVEN = WidthSplit(embed=2, mlp=2, heads=2)

# A growth, the stage's fields, and `stays_symmetric`: do the copies stay equal?
SYMMETRIC = {
    "even": (EVEN, {}, True),
    "even, one axis": (WidthSplit(mlp=2), {}, True),
    "even, moments grown": (EVEN, {"optimizer_state": "grow"}, True),
    "even, moments kept": (EVEN, {"optimizer_state": "keep"}, False),
    "even, rewarmed": (EVEN, {"rewarm": Rewarm(tokens=64)}, False),
    "even, scaled": (EVEN, {"scale_by_fan_in": True}, True),
    "even, frozen": (EVEN, {"train_layers": "1"}, True),
    "even, then deeper": (chain(EVEN, Stack(2)), {}, True),
    "even, then zero copies": (chain(EVEN, DepthZero(2)), {}, True),
    "even, then fresh zeros": (chain(EVEN, DepthZero(2, rest="fresh")), {}, False),
    "even after fresh zeros": (chain(DepthZero(2, rest="fresh"), EVEN), {}, True),
    "even, then uneven": (chain(EVEN, WidthSplit(mlp=2, split="uneven")), {}, True),
    "even, then noise": (chain(EVEN, Noise(0.1)), {}, False),
    "even, then no noise": (chain(EVEN, Noise(0.0)), {}, True),
    "even, then random copies": (chain(EVEN, DepthRandom(2, 64, init="copy")), {}, True),
    "even, then random": (chain(EVEN, DepthRandom(2, 64)), {}, False),
    "even, then new units": (chain(EVEN, WidthZero(mlp=2)), {}, False),
    "uneven": (dataclasses.replace(EVEN, split="uneven"), {}, False),
    "noisy": (dataclasses.replace(EVEN, noise=0.1), {}, False),
    "next layer": (dataclasses.replace(EVEN, new_units="next_layer"), {}, False),
    "nothing to split": (WidthSplit(), {}, False),
    "zero": (WidthZero(embed=2), {}, False),
    "stack": (Stack(2), {}, False),
    "learned": (Learn(2, embed=2, fit_steps=3), {}, False),
    "no growth": (None, {}, False),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_copies_stay_equal_if_nothing_breaks_their_symmetry(name):
    growth, fields, expected = SYMMETRIC[name]
    for phase in expand(tiny_run(**growing(growth, **fields)))[1:]:
        assert phase.stays_symmetric == expected


@functools.cache
def masked_phase(mask_tokens=256):
    """Returns a phase with 64-token steps and masks on layers 2 and 4."""
    growth = DepthRandom(2, mask_tokens)
    source = tiny_model(num_layers=2)
    return phase_of(
        growth.target_config(source),
        source=source,
        growth=growth,
        reparameterizations=growth.reparameterizations(source),
    )


@pytest.mark.parametrize(("step", "share"), [(0, 0), (1, 0.25), (3, 0.75), (4, 1), (99, 1)])
def test_masks_scale_new_layers_by_their_share_of_tokens(step, share):
    phase = masked_phase()
    params = random_params(phase.model)
    run = phase.model_params(params, phase.tokens(step))
    for name, leaf in params["layers"].items():
        writes = name in ("out", "down")
        factors = np.float32([1, share, 1, share] if writes else [1, 1, 1, 1])
        factors = factors.reshape(-1, *(1,) * (leaf.ndim - 1))
        np.testing.assert_array_equal(run["layers"][name], factors * leaf, err_msg=name)
    for name in params.keys() - {"layers"}:
        np.testing.assert_array_equal(run[name], params[name])


@pytest.mark.parametrize(
    ("step", "lower", "upper"),
    [(0, 0, 0), (1, 0.5, 0.25), (2, 1, 0.5), (3, 1, 0.75), (4, 1, 1)],
)
def test_masks_open_from_the_bottom_up(step, lower, upper):
    growth = DepthRandom(2, 256, phases="bottom_up")
    phase = masked_phase()
    reparameterizations = growth.reparameterizations(phase.source)
    phase = dataclasses.replace(phase, reparameterizations=reparameterizations)
    assert [mask.end_tokens for mask in reparameterizations] == [256]
    assert phase.trains_model(step) == (step == 4)
    params = random_params(phase.model)
    run = phase.model_params(params, phase.tokens(step))
    factors = np.float32([1, lower, 1, upper]).reshape(-1, 1, 1)
    np.testing.assert_array_equal(run["layers"]["down"], factors * params["layers"]["down"])


def test_mask_tokens_may_exceed_int32():
    phase = dataclasses.replace(masked_phase(6_000_000_000), per_step=Counts(tokens=10**9))
    params = random_params(phase.model)
    run = phase.model_params(params, phase.tokens(3))
    np.testing.assert_array_equal(run["layers"]["out"][1], 0.5 * params["layers"]["out"][1])


def test_without_masks_model_params_are_the_trained_parameters():
    params = object()
    assert phase_of(tiny_model()).model_params(params, jnp.float32(3)) is params


def test_step_scales_updates_by_the_parameter_rates():
    phase = dataclasses.replace(masked_phase(), reparameterizations=())
    rates = ParameterRates(
        source=phase.source,
        growth=phase.growth,
        rewarm=Rewarm(tokens=512, ratio=2.0),
        scale_by_fan_in=False,
        trained_layers=(True, True, False, False),
    )
    params = random_params(phase.model)
    updates = jax.tree.map(lambda leaf: 1 + leaf, params)
    rate, tokens = jnp.float32(1e-2), phase.tokens(2)
    plain = jax.jit(phase.step_params)(params, updates, rate, tokens)
    slow = dataclasses.replace(phase, parameter_rates=rates)
    stepped = jax.jit(slow.step_params)(params, updates, rate, tokens)
    query, update = params["layers"]["query"], updates["layers"]["query"]
    # After 128 of 512 tokens, the warm-up is at a quarter of the ratio 2.
    for layer, factor in enumerate([1, 2 / 4, 0, 0]):
        expected = query[layer] - 1e-2 * factor * update[layer]
        np.testing.assert_allclose(stepped["layers"]["query"][layer], expected, rtol=1e-6)
        expected = query[layer] - 1e-2 * update[layer]
        np.testing.assert_allclose(plain["layers"]["query"][layer], expected, rtol=1e-6)
    np.testing.assert_array_equal(stepped["layers"]["query"][2:], query[2:])
    np.testing.assert_array_equal(stepped["embedding"], params["embedding"])
    np.testing.assert_array_equal(stepped["head"], plain["head"])


def test_phases_survive_pickling():
    growths = (Stack(2), Learn(2, fit_steps=3), DepthRandom(2, mask_tokens=64), None)
    stages = tuple(
        Stage(tokens=640, batch_size=8, growth=growth, train_layers="all" if growth else "1")
        for growth in growths
    )
    config = tiny_run(model_is="source", stages=(Stage(tokens=640, batch_size=8), *stages))
    phases = expand(config)
    assert pickle.loads(pickle.dumps(phases)) == phases


def stepped_run(**fields) -> Config:
    """Returns a run whose second stage has three batch sizes."""
    steps = (
        BatchStep(from_tokens=500, batch_size=16, accumulate=2),
        BatchStep(from_tokens=1000, batch_size=24, accumulate=3),
    )
    second = Stage(tokens=2000, batch_size=8, batch_steps=steps, **fields)
    return tiny_run(stages=(Stage(tokens=640, batch_size=8), second))


def test_each_batch_of_a_stage_is_a_phase_in_whole_steps():
    _, *parts = expand(stepped_run(growth=Stack(factor=2)))
    assert [(p.batch_size, p.accumulate, p.num_steps) for p in parts] == [
        (8, 1, 8),  # 512 tokens, the first multiple of 64 from 500 on
        (16, 2, 4),  # 512 tokens more, to 1024
        (24, 3, 6),  # 1152 tokens more, to 2176: 1984 would be less than 2000
    ]
    assert [p.directory for p in parts] == [
        "stage_1/train",
        "stage_1/train_1",
        "stage_1/train_2",
    ]
    assert [p.earlier_tokens for p in parts] == [0, 512, 1024]
    assert [p.growth is None for p in parts] == [False, True, True]
    assert [p.optimizer_state for p in parts] == ["reset", "keep", "keep"]
    for before, after in itertools.pairwise(parts):
        assert before.end == after.start
        assert after.model == after.source == before.model


@pytest.mark.parametrize("axis", ["stage", "run"])
def test_batch_steps_do_not_move_the_learning_rate(axis):
    schedule = Schedule(shape="cosine", axis=axis, warmup_tokens=700)
    stepped = expand(stepped_run(growth=Stack(factor=2), schedule=schedule))
    plain = stepped_run(growth=Stack(factor=2), schedule=schedule)
    last = dataclasses.replace(plain.stages[1], tokens=2176, batch_steps=())
    whole = expand(dataclasses.replace(plain, stages=(plain.stages[0], last)))[1]
    for part in stepped[1:]:
        for step in range(part.num_steps):
            tokens = part.counts(step + 1).tokens - whole.start.tokens
            same_step = tokens / whole.per_step.tokens - 1
            found, expected = part.learning_rate(step), whole.learning_rate(same_step)
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_masks_open_over_all_parts_of_a_stage():
    growth = DepthRandom(factor=2, mask_tokens=1500)
    _, *parts = expand(stepped_run(growth=growth))
    assert all(part.reparameterizations == parts[0].reparameterizations for part in parts)
    opened = [[part.trains_model(step) for step in (0, part.num_steps)] for part in parts]
    assert opened == [[False, False], [False, False], [False, True]]
    with pytest.raises(UserError, match=r"stages.1 is 2176 tokens long"):
        expand(stepped_run(growth=dataclasses.replace(growth, mask_tokens=2200)))


@pytest.mark.parametrize("end", [3, 8, 11, 12, 14])
def test_early_end_in_any_part_leaves_out_the_later_parts(end):
    first, *_ = expand(stepped_run())
    ended = {1: EarlyEnd(steps=end, reason="")}
    _, *short = expand(stepped_run(), RunHistory(ended=ended))
    assert sum(part.num_steps for part in short) == end
    assert len(short) == sum(before < end for before in (0, 8, 12))
    assert short[0].start == first.end


@pytest.mark.parametrize("from_tokens", [(1000, 500), (500, 500), (2000,), (500, 3000)])
def test_batch_steps_out_of_order_are_refused(from_tokens):
    steps = tuple(BatchStep(from_tokens=tokens, batch_size=16) for tokens in from_tokens)
    config = tiny_run(stages=(Stage(tokens=2000, batch_size=8, batch_steps=steps),))
    with pytest.raises(UserError, match=r"batch_steps.\d.from_tokens is \d+; it must be more"):
        expand(config)


@pytest.mark.parametrize("seq_lens", [(8, 12), (3, 8), (8, 3)])
def test_lengths_that_do_not_divide_the_longest_are_refused(seq_lens):
    stages = [Stage(tokens=640, batch_size=8, seq_len=seq_len) for seq_len in seq_lens]
    with pytest.raises(UserError, match=r"seq_len is \d+, which does not divide"):
        expand(tiny_run(stages=tuple(stages)))


def test_stage_has_its_own_length_positions_and_mixture():
    sources = tuple(SourceConfig(name=name, path=name) for name in ("a", "b"))
    data = DataConfig(sources=sources, seq_len=8)
    stages = (
        Stage(tokens=640, batch_size=8, rope_theta=100.0),
        Stage(tokens=640, batch_size=8, seq_len=16, source_weights=(1.0, 3.0)),
        Stage(
            tokens=640,
            batch_size=8,
            source_weights=(1.0, 0.0),
            source_ramp_tokens=300,
            rope_scaling=RopeScaling(factor=2.0, original_seq_len=8),
        ),
    )
    phases = expand(tiny_run(data=data, stages=stages))
    assert [phase.seq_len for phase in phases] == [8, 16, 8]
    assert [phase.num_steps for phase in phases] == [10, 5, 10]
    assert [phase.model.rope_theta for phase in phases] == [100.0, 1e4, 1e4]
    assert [phase.model.rope_scaling for phase in phases][:2] == [None, None]
    assert phases[2].model.rope_scaling is stages[2].rope_scaling
    assert [phase.mixture for phase in phases] == [
        Mixture(weights=(1.0, 1.0)),
        Mixture(weights=(1.0, 3.0)),
        Mixture(weights=(1.0, 0.0), ramp_from=(1.0, 3.0), ramp_tokens=300),
    ]
    flops = [phase.per_step.flops for phase in phases]
    assert flops[1] > 2 * flops[0]  # attention over longer sequences


def test_ramp_longer_than_its_stage_is_refused():
    data = DataConfig(
        sources=tuple(SourceConfig(name=name, path=name) for name in ("a", "b")), seq_len=8
    )
    stage = Stage(tokens=640, batch_size=8, source_weights=(1.0, 0.0), source_ramp_tokens=700)
    with pytest.raises(UserError, match=r"stages.0.source_ramp_tokens is 700, longer than"):
        expand(tiny_run(data=data, stages=(stage,)))
