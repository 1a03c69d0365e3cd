"""Growth in depth by one block at a time: MIDAS, LIDAS and gradual stacking."""

import dataclasses
from typing import Literal

from parts import lengths

from stackjax.config import Config
from stackjax.growth import InsertBlock

BLOCK = 4
"""Layers in a block."""
POWER = 1
"""Stage i, counted from 1, has tokens in proportion to i**POWER."""
WARMUP, DECAY = 0.01, 0.2
"""Warm-up and decay of the schedule, as shares of the tokens."""
Place = Literal["middle", "center", "last"]
RUNS: dict[str, Place] = {"MIDAS": "middle", "LIDAS": "center", "last block": "last"}


def grown(config: Config, at: Place, *, flops: float) -> Config:
    """Returns the run that starts with one block.

    Args:
      config: A run of the target from scratch.
      at: Place of new blocks, as in `InsertBlock`.
    """
    base, count = config.stages[0], config.model.num_layers // BLOCK
    growth = InsertBlock(BLOCK, at)
    later = dataclasses.replace(base, growth=growth, optimizer_state="keep")
    weights = [(1 + index) ** POWER for index in range(count)]
    shares = [(1 - DECAY) * weight / sum(weights) for weight in weights]
    shares[-1] += DECAY
    stages = (base, *[later] * (count - 1))
    return _scheduled(lengths.with_shares(config, stages, shares, flops=flops))


def runs(config: Config, *, flops: float, seed: int) -> dict[str, Config]:
    """Returns the three places of new blocks, and scratch."""
    found = {name: grown(config, at, flops=flops) for name, at in RUNS.items()}
    scratch = lengths.with_shares(config, config.stages, (1,), flops=flops)
    return lengths.cells(found | {"scratch": _scheduled(scratch)}, flops=flops, seed=seed)


def _scheduled(run: Config) -> Config:
    return lengths.over_run(run, "wsd", warmup=WARMUP, decay=DECAY, final_fraction=0.0)
