"""Lengths of stages and schedules, from a budget in FLOPs (6ND)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from stackjax.analysis.budget import cell, for_flops
from stackjax.config import Config, Schedule, Stage
from stackjax.model.flops import flops_6nd
from stackjax.optimizers import DECAYING
from stackjax.training.stages import stage_models, stage_tokens


def with_shares(
    config: Config, stages: Sequence[Stage], shares: Sequence[float], *, flops: float
) -> Config:
    """Returns the run with these stages, for a budget.

    Args:
      shares: Each stage's share of the run's tokens; they sum to 1.
    """
    run = dataclasses.replace(config, stages=tuple(stages))
    costs = [flops_6nd(model) for model in stage_models(run)]
    tokens = flops / sum(share * cost for share, cost in zip(shares, costs, strict=True))
    lengths = [
        dataclasses.replace(stage, tokens=int(share * tokens))
        for stage, share in zip(stages, shares, strict=True)
    ]
    return for_flops(dataclasses.replace(run, stages=tuple(lengths)), flops)


def over_run(
    config: Config,
    shape: Literal["cosine", "wsd"],
    *,
    warmup: float,
    decay: float | None = None,
    final_fraction: float = 0.1,
) -> Config:
    """Returns the run with a single schedule over all stages.

    The horizon is a number of tokens, so that stages shared by several runs have it too.

    Args:
      warmup: The warm-up's share of the run's tokens.
      decay: The linear decay's share of the run's tokens, for `wsd`.
    """
    assert shape in DECAYING
    tokens = sum(stage_tokens(config))
    schedule = Schedule(
        shape=shape,
        axis="run",
        warmup_tokens=int(warmup * tokens),
        horizon_tokens=tokens,
        decay_tokens=None if decay is None else int(decay * tokens),
        final_fraction=final_fraction,
    )
    return with_schedule(config, schedule)


def with_schedule(config: Config, schedule: Schedule) -> Config:
    """Returns the run with this schedule in all stages without their own."""
    optimizer = dataclasses.replace(config.optimizer, schedule=schedule)
    return dataclasses.replace(config, optimizer=optimizer)


def cells(runs: Mapping[str, Config], *, flops: float, seed: int) -> dict[str, Config]:
    """Returns the runs with equal FLOPs, each with its own directory."""
    return {name: cell(run, name, flops=flops, seed=seed) for name, run in runs.items()}
