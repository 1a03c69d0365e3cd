"""Gradual stacking at 1.1B (StackedBERT): 6 layers, 12, then 24 (arXiv:2405.15319, figure 33).

    python -m stackjax.train --config configs/gradual_1b.py

10 billion tokens for each of the two smaller models, as the text of the paper says.
"""

import dataclasses

import gstack_1b

from stackjax.config import Config
from stackjax.growth import Stack


def get_config() -> Config:
    """Returns the run."""
    config = gstack_1b.get_config()
    base, last = config.stages
    twice = dataclasses.replace(base, growth=Stack(2))
    stages = (base, twice, dataclasses.replace(last, growth=Stack(2)))
    return dataclasses.replace(config, stages=stages, workdir="runs/gradual_1b")
