"""The phases that a run consists of: the stages of its config, with every number settled."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from stackjax.config import Config, Schedule, Stage
from stackjax.errors import UserError
from stackjax.flops import flops_6nd, matmul_flops
from stackjax.growth import Learn
from stackjax.growth.chain import Chain
from stackjax.growth.learned import Fit
from stackjax.growth.masked import Mask
from stackjax.growth.pattern import parse_pattern
from stackjax.model.config import ModelConfig
from stackjax.model.transformer import logical_axes
from stackjax.optimizer import LearningRate, ParameterRates
from stackjax.phase import Counts, Ending, Phase, with_births


def expand(config: Config, ended: Mapping[int, Ending] | None = None) -> tuple[Phase, ...]:
    """Returns the phases of a run; UserError where stages do not fit together.

    Args:
      ended: Stages that a trigger has ended early: later ones follow sooner, and nothing else
        changes. Lengths, and the horizons of learning rates, are those of the config.
    """
    if config.stages[0].growth is not None:
        raise UserError(
            "stages.0.growth is set, but there is no model before the first stage; put "
            "the growth into a later stage."
        )
    models = stage_models(config)
    lengths = stage_steps(config)
    run_tokens = sum(
        steps * stage.batch_size * config.data.seq_len
        for stage, steps in zip(config.stages, lengths, strict=True)
    )
    phases: list[Phase] = []
    start = Counts()
    for i, steps in enumerate(lengths):
        *before, last = _stage_phases(config, i, models, steps, start, run_tokens)
        if ended and i in ended:
            fitted = sum(phase.num_steps for phase in before)
            last = dataclasses.replace(last, num_steps=ended[i].steps - fitted)
        for phase in (*before, last):
            phases.append(dataclasses.replace(phase, index=len(phases)))
        start = last.end
    return with_births(phases)


def _stage_phases(
    config: Config,
    index: int,
    models: list[ModelConfig],
    steps: int,
    start: Counts,
    run_tokens: int,
) -> list[Phase]:
    """Returns the phases of one stage, in order; their indices are not settled yet."""
    stage, model = config.stages[index], models[index]
    source, growth = models[max(index - 1, 0)], stage.growth
    step_tokens = stage.batch_size * config.data.seq_len
    trained = _trained_layers(index, stage, source, model)
    train = Phase(
        index=0,
        stage=index,
        name="train",
        source=source,
        model=model,
        growth=growth,
        # What does not grow goes on as it is.
        optimizer_state=stage.optimizer_state if growth is not None else "keep",
        reparameterisations=growth.reparameterisations(source) if growth else (),
        trained_layers=trained,
        mesh=stage.mesh or config.mesh,
        batch_size=stage.batch_size,
        accumulate=stage.accumulate,
        num_steps=steps,
        learning_rate=_learning_rate(config, index, step_tokens, steps, start, run_tokens),
        parameter_rates=_parameter_rates(index, stage, source, trained),
        births=None,
        start=start,
        per_step=Counts(
            tokens=step_tokens,
            examples=stage.batch_size,
            flops_6nd=step_tokens * flops_6nd(model, trained),
            flops=step_tokens * matmul_flops(model, config.data.seq_len, trained),
        ),
    )
    if not isinstance(growth, Learn):
        _check_growth(train)
        return [train]
    fit = _fit_phase(train, growth)
    rest = steps - fit.num_steps
    train = dataclasses.replace(
        train,
        source=model,
        growth=None,
        optimizer_state="reset",
        num_steps=rest,
        learning_rate=_learning_rate(config, index, step_tokens, rest, fit.end, run_tokens),
        start=fit.end,
    )
    return [fit, train]


def _fit_phase(train: Phase, growth: Learn) -> Phase:
    """Returns the phase that fits a learned growth, before the one that trains."""
    if train.optimizer_state != "reset":
        raise UserError(
            f"stages.{train.stage}.optimizer_state is {train.optimizer_state!r}; after a "
            f"learned growth the optimizer can only be 'reset'."
        )
    if train.parameter_rates is not None:
        raise UserError(
            f"stages.{train.stage} has rewarm, scale_by_fan_in or train_layers, which a "
            f"learned growth does not take: all of its parameters are new."
        )
    if growth.fit_steps >= train.num_steps:
        raise UserError(
            f"stages.{train.stage} has {train.num_steps} steps, of which its growth takes "
            f"{growth.fit_steps} for the fit; give it more tokens, or fewer fit_steps."
        )
    # Every microbatch makes the target's parameters for itself.
    making = train.accumulate * growth.flops(logical_axes(train.source), train.source)
    per_step = train.per_step
    return dataclasses.replace(
        train,
        name="fit",
        reparameterisations=(Fit(growth, train.source),),
        num_steps=growth.fit_steps,
        learning_rate=LearningRate(
            peak=growth.learning_rate,
            schedule=Schedule(shape="constant"),
            horizon_tokens=growth.fit_steps * per_step.tokens,
            first_tokens=0,
            tokens_per_step=per_step.tokens,
        ),
        per_step=dataclasses.replace(
            per_step,
            flops_6nd=per_step.flops_6nd + making,
            flops=per_step.flops + making,
        ),
    )


def _check_growth(phase: Phase) -> None:
    """Raises UserError where a growth does not fit into its stage."""
    if isinstance(phase.growth, Chain):
        for link in phase.growth.growths:
            if isinstance(link, Learn):
                raise UserError(
                    f"stages.{phase.stage}.growth is {phase.growth}; a learned growth stands "
                    f"alone, and grows depth and width by itself."
                )
    tokens = phase.num_steps * phase.per_step.tokens
    for mask in phase.reparameterisations:
        if isinstance(mask, Mask) and mask.open_tokens > tokens:
            raise UserError(
                f"stages.{phase.stage} is {tokens} tokens long, and the last mask of "
                f"{phase.growth} is open after {mask.open_tokens}; lower "
                f"mask_tokens, or make the stage longer."
            )


def _trained_layers(
    index: int, stage: Stage, source: ModelConfig, model: ModelConfig
) -> tuple[bool, ...] | None:
    if stage.train_layers == "all":
        return None
    field = f"stages.{index}.train_layers"
    if stage.train_layers == "new":
        maps = stage.growth.axis_maps(source) if stage.growth else {}
        if "layers" not in maps or not maps["layers"].is_new.any():
            raise UserError(
                f"{field} is 'new', but the stage has no growth that adds layers; name them "
                f"by number, or train 'all'."
            )
        return tuple(bool(new) for new in maps["layers"].is_new)
    try:
        layers = parse_pattern(stage.train_layers)
    except UserError as error:
        raise UserError(f"{field}: {error} It may also be 'all' or 'new'.") from None
    if max(layers) >= model.num_layers:
        raise UserError(
            f"{field} is {stage.train_layers!r}, which names layer {max(layers) + 1} of a "
            f"model with {model.num_layers}."
        )
    return tuple(layer in layers for layer in range(model.num_layers))


def _parameter_rates(
    index: int, stage: Stage, source: ModelConfig, trained: tuple[bool, ...] | None
) -> ParameterRates | None:
    grows = stage.rewarm is not None or stage.scale_by_fan_in
    if grows and stage.growth is None:
        raise UserError(
            f"stages.{index} has rewarm or scale_by_fan_in, which are about growth, but no "
            f"growth."
        )
    if not grows and trained is None:
        return None
    return ParameterRates(
        source=source,
        growth=stage.growth,
        rewarm=stage.rewarm,
        scale_by_fan_in=stage.scale_by_fan_in,
        trained_layers=trained,
    )


def stage_models(config: Config) -> list[ModelConfig]:
    """Returns the model of each stage, from the one that the config names."""
    growths = [stage.growth for stage in config.stages[1:]]
    models = [config.model]
    if config.model_is == "source":
        for growth in growths:
            models.append(growth.target_config(models[-1]) if growth else models[-1])
        return models
    for growth in reversed(growths):
        source = growth.source_config(models[0]) if growth else models[0]
        if growth is not None and growth.target_config(source) != models[0]:
            raise UserError(
                f"{growth}.source_config and .target_config contradict each other: {models[0]} "
                f"comes from {source}, which grows into {growth.target_config(source)}."
            )
        models.insert(0, source)
    return models


def stage_steps(config: Config) -> list[int]:
    """Returns the optimizer steps of each stage: its length, rounded up."""
    return steps_of(config.stages, config.data.seq_len)


def steps_of(stages: Sequence[Stage], seq_len: int) -> list[int]:
    """Returns the optimizer steps of stages of a run: the length of each, rounded up."""
    for i, stage in enumerate(stages):
        if (stage.tokens is None) == (stage.fraction is None):
            raise UserError(
                f"stages.{i} has tokens {stage.tokens} and fraction {stage.fraction}; set "
                f"one of the two."
            )
    fraction = sum(stage.fraction or 0 for stage in stages)
    if not 0 <= fraction < 1:
        raise UserError(
            f"the stages' fractions add up to {fraction}; they must leave room for a "
            f"stage whose length is in tokens, which settles that of the run."
        )
    run_tokens = sum(stage.tokens or 0 for stage in stages) / (1 - fraction)
    return [_steps(seq_len, i, stage, run_tokens) for i, stage in enumerate(stages)]


def _steps(seq_len: int, index: int, stage: Stage, run_tokens: float) -> int:
    tokens = run_tokens * stage.fraction if stage.fraction is not None else stage.tokens
    assert tokens is not None, "stage_steps checks that one of the two is set"
    steps = math.ceil(tokens / (stage.batch_size * seq_len))
    if steps < 1:
        raise UserError(f"stages.{index} is {tokens} tokens long; it needs more than 0.")
    return steps


def _learning_rate(
    config: Config,
    index: int,
    tokens_per_step: int,
    steps: int,
    start: Counts,
    run_tokens: int,
) -> LearningRate:
    stage = config.stages[index]
    schedule = stage.schedule or config.optimizer.schedule
    of_run = schedule.axis == "run"
    horizon = schedule.horizon_tokens
    if horizon is None:
        horizon = run_tokens if of_run else steps * tokens_per_step
    if schedule.shape == "wsd" and schedule.decay_tokens is None:
        raise UserError(
            f"the schedule of stages.{index} is wsd without decay_tokens; say how many "
            f"tokens its decay takes."
        )
    if schedule.warmup_tokens + (schedule.decay_tokens or 0) > horizon:
        raise UserError(
            f"the schedule of stages.{index} warms up over {schedule.warmup_tokens} and "
            f"decays over {schedule.decay_tokens or 0} tokens, which is more than its "
            f"horizon of {horizon}."
        )
    peak = stage.peak_learning_rate
    return LearningRate(
        peak=config.optimizer.peak_learning_rate if peak is None else peak,
        schedule=schedule,
        horizon_tokens=horizon,
        first_tokens=start.tokens if of_run else 0,
        tokens_per_step=tokens_per_step,
    )
