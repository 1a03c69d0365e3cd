"""Stages: models, lengths, trained layers and learning-rate factors."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from stackjax.config import Config, Stage
from stackjax.data.mixture import Mixture
from stackjax.growth.pattern import parse_pattern
from stackjax.model.config import ModelConfig, check_length, differences
from stackjax.model.parametrization import ratios
from stackjax.model.transformer import logical_axes
from stackjax.optimizers import Optimizer
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes
from stackjax.training.learning_rate import ParameterRates


def stage_models(config: Config) -> list[ModelConfig]:
    """Returns each stage's model, derived from the config's model and the growths."""
    growths = [stage.growth for stage in config.stages[1:]]
    models = [config.model]
    if config.model_is == "source":
        for growth in growths:
            models.append(growth.target_config(models[-1]) if growth else models[-1])
        return models
    for stage in range(len(growths), 0, -1):
        growth, target = growths[stage - 1], models[0]
        models.insert(0, growth.source_config(target) if growth else target)
        if growth and (grown := growth.target_config(models[0])) != target:
            raise UserError(
                f"stages.{stage}.growth is {growth}, which cannot make this model: from its "
                f"source_config it makes another, where {differences(grown, target)}; choose "
                f"other sizes, or correct the operator."
            )
    return models


class Part(NamedTuple):
    """A part of a stage with one batch size."""

    batch_size: int
    accumulate: int
    end_tokens: float
    """The stage's tokens at the end, before rounding to whole steps."""


def stage_parts(index: int, stage: Stage, length: float) -> list[Part]:
    """Returns a stage's parts: one, and one more for each batch step.

    Args:
      length: The stage's tokens.
    """
    starts = [step.from_tokens for step in stage.batch_steps]
    for step, (before, start) in enumerate(itertools.pairwise([0, *starts])):
        if not before < start < length:
            raise UserError(
                f"stages.{index}.batch_steps.{step}.from_tokens is {start}; it must be more "
                f"than {before} and less than the {length:.10g} tokens of the stage."
            )
    batches = (stage, *stage.batch_steps)
    return [
        Part(batch.batch_size, batch.accumulate, end)
        for batch, end in zip(batches, (*starts, length), strict=True)
    ]


def stage_tokens(config: Config) -> list[int]:
    """Returns the tokens per stage, in whole steps."""
    found = []
    lengths = zip(stage_lengths(config.stages), stage_seq_lens(config), strict=True)
    for index, (length, seq_len) in enumerate(lengths):
        parts = stage_parts(index, config.stages[index], length)
        found.append(planned_tokens(parts, seq_len))
    return found


def planned_tokens(
    parts: Sequence[Part], seq_len: int, tokens: int = 0, stage_start: int = 0
) -> int:
    """Returns the run's tokens after some parts of a stage, in whole steps.

    Args:
      tokens: The run's tokens before the parts.
      stage_start: The run's tokens before the stage.
    """
    for part in parts:
        per_step = part.batch_size * seq_len
        left = math.ceil((stage_start + part.end_tokens - tokens) / per_step)
        tokens += max(0, left) * per_step
    return tokens


def stage_seq_lens(config: Config) -> list[int]:
    """Returns the sequence length per stage; UserError if one does not divide the longest."""
    lengths = [stage.seq_len or config.data.seq_len for stage in config.stages]
    check_length(config.model, max(lengths, default=0), "a sequence")
    if config.data.packing == "best_fit" and len(set(lengths)) > 1:
        raise UserError(
            f"data.packing is 'best_fit', and the stages have sequences of {lengths} tokens; "
            f"packed sequences need one length, so use 'joined' for several."
        )
    for index, seq_len in enumerate(lengths):
        if max(lengths) % seq_len:
            raise UserError(
                f"stages.{index}.seq_len is {seq_len}, which does not divide the run's longest "
                f"sequence of {max(lengths)} tokens; choose lengths that divide it."
            )
    return lengths


def stage_mixtures(config: Config) -> list[Mixture]:
    """Returns the mixture of sources per stage."""
    own = tuple(source.weight for source in config.data.all_sources)
    mixtures, before = [], own
    for stage, length in zip(config.stages, stage_lengths(config.stages), strict=True):
        weights, ramp = stage.source_weights or own, stage.source_ramp_tokens
        if ramp is not None and ramp > length:
            raise UserError(
                f"stages.{len(mixtures)}.source_ramp_tokens is {ramp}, longer than the "
                f"stage of {length:.10g} tokens; make it shorter."
            )
        mixtures.append(
            Mixture(weights=weights)
            if ramp is None
            else Mixture(weights=weights, ramp_from=before, ramp_tokens=ramp)
        )
        before = weights
    return mixtures


def stage_lengths(stages: Sequence[Stage]) -> list[float]:
    """Returns the tokens per stage, before rounding to whole steps."""
    for i, stage in enumerate(stages):
        if (stage.tokens is None) == (stage.fraction is None):
            raise UserError(
                f"stages.{i} has tokens {stage.tokens} and fraction {stage.fraction}; set "
                f"exactly one."
            )
    fraction = sum(stage.fraction or 0 for stage in stages)
    if fraction >= 1:
        raise UserError(
            f"the stages' fractions add up to {fraction}; they must leave room for a "
            f"stage with a length in tokens, to define the length of the run."
        )
    run_tokens = sum(stage.tokens or 0 for stage in stages) / (1 - fraction)
    return [
        run_tokens * (stage.fraction or 0) if stage.tokens is None else stage.tokens
        for stage in stages
    ]


def trained_layers(
    index: int, stage: Stage, source: ModelConfig, model: ModelConfig
) -> tuple[bool, ...] | None:
    """Returns whether each layer learns; None if all parameters learn."""
    if stage.train_layers == "all":
        return None
    field = f"stages.{index}.train_layers"
    if model.is_mixed:
        raise UserError(
            f"{field} is {stage.train_layers!r}, and model.pattern has dense layers among "
            f"layers with experts, where all layers train; leave it out."
        )
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


def parameter_rates(
    stage: Stage,
    source: ModelConfig,
    trained: tuple[bool, ...] | None,
    optimizer: Optimizer | None = None,
) -> ParameterRates | None:
    """Returns a stage's learning-rate factors; None if all are 1.

    Args:
      optimizer: As from `scaled_optimizer`.
    """
    grows = stage.rewarm is not None or stage.scale_by_fan_in
    if not grows and trained is None and optimizer is None:
        return None
    return ParameterRates(
        source=source,
        growth=stage.growth,
        rewarm=stage.rewarm,
        scale_by_fan_in=stage.scale_by_fan_in,
        trained_layers=trained,
        optimizer=optimizer,
    )


def scaled_optimizer(
    index: int, stage: Stage, model: ModelConfig, optimizer: Optimizer
) -> Optimizer | None:
    """Returns the optimizer whose rule has CompleteP's factors; None without factors.

    Raises:
      UserError: The optimizer has no rule, or a factor would count twice.
    """
    if model.completep is not None and stage.scale_by_fan_in:
        raise UserError(
            f"stages.{index}.scale_by_fan_in is set, and model.completep already divides "
            f"learning rates by the fan-in; leave out one of them."
        )
    if not model.has_factors:
        return None
    for names in jax.tree.leaves(logical_axes(model), is_leaf=lambda x: isinstance(x, Axes)):
        optimizer.rate_factor(names, ratios(model, names))
    return optimizer
