"""Gradual stacking on a CPU (StackedBERT): 6 layers, then 12, then 24, against one hop.

    python -m scripts.bakeoff configs/gradual_tiny.py --jobs 2

Every run costs what 400,000 bytes of the 24 layers do. The gradual one alone:

    python -m stackjax.train --config configs/gradual_tiny.py

The paper finds one growth from 6 to 24 better (arXiv:2405.15319, figure 33).
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
    """Returns the gradual run, one hop early and one late, and scratch."""
    config = get_config()
    return bakeoff.gradual(config, flops=flops_6nd(config.model) * TOKENS, seed=seed)
