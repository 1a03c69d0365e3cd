"""One growth from zero or one layer to all layers, late in a single WSD schedule."""

import dataclasses
from collections.abc import Mapping

from parts import lengths

from stackjax.config import Config, Rewarm
from stackjax.growth import DepthFresh, Growth, Stack

SOURCE_SHARE = 0.8
"""Tokens before the growth (the paper's tau / T)."""
WARMUP, DECAY = 0.02, 0.1
"""Warm-up and decay of the schedule, as shares of the tokens."""


def growths(num_layers: int) -> dict[str, Growth]:
    """Returns the three growths to `num_layers`, by name."""
    return {
        "copies": Stack(num_layers),
        "new layers": DepthFresh(num_layers - 1),
        "from zero layers": DepthFresh(num_layers),
    }


def grown(config: Config, growth: Growth, *, flops: float, rewarm: bool = False) -> Config:
    """Returns the run with a growth.

    Args:
      config: A run of the target from scratch.
      rewarm: Warm up the new layers alone, for as long as the run's own warm-up.
    """
    base = config.stages[0]
    last = dataclasses.replace(base, growth=growth, optimizer_state="keep")
    shares = (SOURCE_SHARE, 1 - SOURCE_SHARE)
    run = _scheduled(lengths.with_shares(config, (base, last), shares, flops=flops))
    if not rewarm:
        return run
    warmup = Rewarm(tokens=run.optimizer.schedule.warmup_tokens, ratio=1.0)
    first, last = run.stages
    return dataclasses.replace(run, stages=(first, dataclasses.replace(last, rewarm=warmup)))


def runs(configs: Mapping[str, Config], *, flops: float, seed: int) -> dict[str, Config]:
    """Returns the three growths, copies with a warm-up of new layers, and scratch.

    Args:
      configs: A run from scratch for each optimizer, by name; the first is the paper's.
    """
    found = {}
    for index, (optimizer, config) in enumerate(configs.items()):
        for name, growth in growths(config.model.num_layers).items():
            found[f"{name}, {optimizer}"] = grown(config, growth, flops=flops)
        copies = growths(config.model.num_layers)["copies"]
        found[f"copies with warm-up, {optimizer}"] = grown(
            config, copies, flops=flops, rewarm=True
        )
        scratch = lengths.with_shares(config, config.stages, (1,), flops=flops)
        found[f"scratch, {optimizer}" if index else "scratch"] = _scheduled(scratch)
    return lengths.cells(found, flops=flops, seed=seed)


def _scheduled(run: Config) -> Config:
    return lengths.over_run(run, "wsd", warmup=WARMUP, decay=DECAY, final_fraction=0.0)
