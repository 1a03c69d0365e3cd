"""Stacking and interleaving, for standard models and under CompleteP."""

import dataclasses

from parts import lengths

from stackjax.config import Config, Schedule
from stackjax.growth import Growth, Interleave, Stack
from stackjax.model.config import CompleteP

FACTOR = 4
"""Growth factor in depth."""
SOURCE_SHARE = 0.5
"""Tokens of the small model, as a share of the run's."""
WARMUP = 0.05
"""Warm-up in each stage, as a share of the run's tokens."""
GROWTHS = {"stack": Stack(FACTOR), "interleave": Interleave(FACTOR)}


def under_completep(config: Config) -> Config:
    """Returns the run under CompleteP; the base model is the small model."""
    small = Stack(FACTOR).source_config(config.model)
    model = dataclasses.replace(config.model, completep=CompleteP.of(small))
    return dataclasses.replace(config, model=model)


def grown(config: Config, growth: Growth, *, flops: float) -> Config:
    """Returns the run with a growth.

    Args:
      config: A run of the target from scratch.
    """
    base = config.stages[0]
    stages = (base, dataclasses.replace(base, growth=growth))
    shares = (SOURCE_SHARE, 1 - SOURCE_SHARE)
    return _scheduled(lengths.with_shares(config, stages, shares, flops=flops))


def runs(config: Config, *, flops: float, seed: int) -> dict[str, Config]:
    """Returns both growths and scratch, standard and under CompleteP."""
    found = {}
    for kind, run in {"standard": config, "CompleteP": under_completep(config)}.items():
        for name, growth in GROWTHS.items():
            found[f"{name}, {kind}"] = grown(run, growth, flops=flops)
        scratch = lengths.with_shares(run, run.stages, (1,), flops=flops)
        found["scratch" if kind == "standard" else f"scratch, {kind}"] = _scheduled(scratch)
    return lengths.cells(found, flops=flops, seed=seed)


def _scheduled(run: Config) -> Config:
    tokens = sum(stage.tokens or 0 for stage in run.stages)
    return lengths.with_schedule(run, Schedule(warmup_tokens=int(WARMUP * tokens)))
