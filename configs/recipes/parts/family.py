"""A family of models: each member is trained to its end, and the next grows from it."""

import dataclasses
import itertools
from collections.abc import Sequence

from parts import lengths

from stackjax.analysis.budget import for_flops
from stackjax.config import Config, Schedule, Stage
from stackjax.growth import Growth
from stackjax.model.flops import flops_6nd, num_params
from stackjax.training.stages import stage_models

WARMUP = 0.05
"""Warm-up of each member, as a share of its tokens; ours."""


def family(
    config: Config,
    growths: Sequence[Growth],
    peaks: Sequence[float],
    *,
    tokens_per_param: float,
) -> Config:
    """Returns the run, a stage for each member.

    The cost up to the end of a member is the cost of this member from scratch.

    Args:
      config: A run of the largest member from scratch.
      growths: The growth of each member but the first.
      peaks: The peak learning rate of each member.
      tokens_per_param: Tokens of a member from scratch, per parameter.
    """
    base = config.stages[0]
    stages = (base, *(dataclasses.replace(base, growth=growth) for growth in growths))
    models = stage_models(dataclasses.replace(config, stages=stages))
    costs = [tokens_per_param * num_params(model) * flops_6nd(model) for model in models]
    members = [
        _member(stage, int((cost - before) / flops_6nd(model)), peak)
        for stage, model, (before, cost), peak in zip(
            stages, models, itertools.pairwise([0, *costs]), peaks, strict=True
        )
    ]
    return for_flops(dataclasses.replace(config, stages=tuple(members)), costs[-1])


def runs(
    config: Config,
    growths: Sequence[Growth],
    peaks: Sequence[float],
    *,
    tokens_per_param: float,
    seed: int,
) -> dict[str, Config]:
    """Returns the family, a family with the largest member's rate, and this member alone.

    See `family` for the arguments.
    """
    target = config.model
    tokens = int(tokens_per_param * num_params(target))
    alone = _member(config.stages[0], tokens, peaks[-1])
    equal = [peaks[-1]] * len(peaks)
    found = {
        "family": family(config, growths, peaks, tokens_per_param=tokens_per_param),
        "family, one rate": family(config, growths, equal, tokens_per_param=tokens_per_param),
        "scratch": dataclasses.replace(config, stages=(alone,)),
    }
    return lengths.cells(found, flops=tokens * flops_6nd(target), seed=seed)


def _member(stage: Stage, tokens: int, peak: float) -> Stage:
    schedule = Schedule(warmup_tokens=int(WARMUP * tokens))
    return dataclasses.replace(stage, tokens=tokens, peak_learning_rate=peak, schedule=schedule)
