"""The eight patterns of arXiv:2405.15319, Table 5, on a CPU: 6 layers become 24.

    python -m scripts.bakeoff configs/table5_tiny.py

A single pattern:

    python -m stackjax.train --config configs/table5_tiny.py --stages.1.growth 'layer_map(12-3456*5-56)'
"""

import dataclasses

import gradual_tiny
from common import bakeoff

from stackjax.config import Config
from stackjax.growth import LayerMap
from stackjax.model.flops import flops_6nd

TOKENS = 400_000


def get_config() -> Config:
    """Returns the run with the whole stack repeated."""
    config = gradual_tiny.get_config()
    base, _, last = config.stages
    stages = (
        dataclasses.replace(base, tokens=100_000),
        dataclasses.replace(last, growth=LayerMap("123456*4")),
    )
    return dataclasses.replace(config, stages=stages, workdir="runs/table5_tiny")


def get_runs(seed: int) -> dict[str, Config]:
    """Returns a run for every pattern."""
    config = get_config()
    return bakeoff.runs(
        config,
        bakeoff.PATTERNS,
        timings={"d": 100_000},
        flops=flops_6nd(config.model) * TOKENS,
        seed=seed,
    )
