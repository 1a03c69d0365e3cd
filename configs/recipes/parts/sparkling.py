"""Twice the width in the middle of a run, with the optimizer's state and rates of SPARKLING."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from parts import lengths

from stackjax.config import Config, Rewarm
from stackjax.growth import WidthSplit

GROWTH = WidthSplit(embed=2, mlp=2, heads=2)
WARMUP = 0.02
"""Warm-up of the schedule, as a share of the tokens; ours."""
RATIO = 1.3
"""Learning rate of new parameters after their warm-up, relative to old parameters."""


def grown(config: Config, *, rewarm_tokens: int, flops: float) -> Config:
    """Returns the run of SPARKLING.

    Args:
      config: A run of the target from scratch.
      rewarm_tokens: Tokens of the new parameters' warm-up; 250 steps in the paper.
    """
    rewarm = Rewarm(tokens=rewarm_tokens, ratio=RATIO)
    return _grown(config, flops, optimizer_state="keep", rewarm=rewarm)


def runs(
    configs: Mapping[str, Config], *, rewarm_tokens: int, flops: float, seed: int
) -> dict[str, Config]:
    """Returns each optimizer state with and without a warm-up of new parameters, and scratch.

    Args:
      configs: A run from scratch for each optimizer, by name.
    """
    rewarm = Rewarm(tokens=rewarm_tokens, ratio=RATIO)
    found = {}
    for index, (optimizer, config) in enumerate(configs.items()):
        for state in ("keep", "reset", "grow"):
            found[f"{state}, {optimizer}"] = _grown(config, flops, optimizer_state=state)
            found[f"{state} and rewarm, {optimizer}"] = _grown(
                config, flops, optimizer_state=state, rewarm=rewarm
            )
        scratch = lengths.with_shares(config, config.stages, (1,), flops=flops)
        found[f"scratch, {optimizer}" if index else "scratch"] = _scheduled(scratch)
    return lengths.cells(found, flops=flops, seed=seed)


def _grown(config: Config, flops: float, **seam: Any) -> Config:
    base = config.stages[0]
    last = dataclasses.replace(base, growth=GROWTH, **seam)
    return _scheduled(lengths.with_shares(config, (base, last), (0.5, 0.5), flops=flops))


def _scheduled(run: Config) -> Config:
    return lengths.over_run(run, "cosine", warmup=WARMUP)
