"""Gradual stacking on a CPU (StackedBERT): 6 layers, then 12, then 24, each half of the last.

    python -m stackjax.train --config configs/gradual_tiny.py

The paper finds one growth from 6 to 24 better (arXiv:2405.15319, figure 33): the same with
`stack(4)` and two stages is table5_tiny.py.
"""

import dataclasses

import tiny

from stackjax.config import Config
from stackjax.growth import Stack


def get_config() -> Config:
    """Returns the run."""
    config = tiny.get_config()
    base = dataclasses.replace(config.stages[0], tokens=150_000)
    twice = dataclasses.replace(base, growth=Stack(2))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=24),
        stages=(base, twice, dataclasses.replace(twice, tokens=300_000)),
        workdir="runs/gradual_tiny",
    )
