"""Gradual stacking at 1.1B (StackedBERT): 6 layers, 12, then 24 (arXiv:2405.15319, figure 33).

    python -m scripts.bakeoff configs/gradual_1b.py --dry-run

prints a command for the gradual run, for a single growth from 6 to 24 layers (early or late), and for
24 layers from scratch, all for the FLOPs of the paper's 1.1B run. Smaller models train on 10
billion tokens each, as stated in the paper. The gradual run alone:

    python -m stackjax.train --config configs/gradual_1b.py
"""

import dataclasses

import gstack_1b
from common import bakeoff

from stackjax.config import Config
from stackjax.growth import Stack
from stackjax.training.expand import expand


def get_config() -> Config:
    """Returns the gradual run."""
    config = gstack_1b.get_config()
    base, last = config.stages
    twice = dataclasses.replace(base, growth=Stack(2))
    stages = (base, twice, dataclasses.replace(last, growth=Stack(2)))
    return dataclasses.replace(config, stages=stages, workdir="runs/gradual_1b")


def get_runs(seed: int) -> dict[str, Config]:
    """Returns the gradual run, single growths early and late, and scratch."""
    flops = expand(gstack_1b.get_config())[-1].end.flops_6nd
    return bakeoff.gradual(get_config(), flops=flops, seed=seed)
