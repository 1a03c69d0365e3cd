"""Gradual stacking on a CPU (StackedBERT): 6, 12, then 24 layers, against a single growth.

    python -m scripts.bakeoff configs/gradual_tiny.py --jobs 2

Every run has the FLOPs of 400,000 bytes from scratch. The gradual run alone:

    python -m stackjax.train --config configs/gradual_tiny.py

In arXiv:2405.15319, figure 33, a single growth from 6 to 24 layers is better.
"""

import dataclasses

import tiny
from common import bakeoff

from stackjax.config import Config
from stackjax.growth import Stack
from stackjax.model.flops import flops_6nd

TOKENS = 400_000


def get_config() -> Config:
    """Returns the gradual run."""
    config = tiny.get_config()
    base = dataclasses.replace(config.stages[0], tokens=100_000)
    twice = dataclasses.replace(base, growth=Stack(2))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=24),
        stages=(base, twice, dataclasses.replace(twice, tokens=300_000)),
        workdir="runs/gradual_tiny",
    )


def get_runs(seed: int) -> dict[str, Config]:
    """Returns the gradual run, single growths early and late, and scratch."""
    config = get_config()
    return bakeoff.gradual(config, flops=flops_6nd(config.model) * TOKENS, seed=seed)
