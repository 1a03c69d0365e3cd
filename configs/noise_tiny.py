"""The noise ablation of arXiv:2405.15319, figure 39, on a CPU: 0, 20 and 50 %.

    python -m scripts.bakeoff configs/noise_tiny.py

after stacking and after an uneven split, each otherwise as in bakeoff_tiny.py.
"""

import dataclasses

import bakeoff_tiny
from common import bakeoff

from stackjax.config import Config
from stackjax.model.flops import flops_6nd


def get_config() -> Config:
    """Returns the run that stacks, without noise."""
    return dataclasses.replace(bakeoff_tiny.get_config(), workdir="runs/noise_tiny")


def get_runs(seed: int) -> dict[str, Config]:
    """Returns the run of every amount of noise."""
    config = get_config()
    return bakeoff.runs(
        config,
        bakeoff.noisy(),
        timings={"d": bakeoff_tiny.TOKENS // 10},
        flops=flops_6nd(config.model) * bakeoff_tiny.TOKENS,
        seed=seed,
    )
