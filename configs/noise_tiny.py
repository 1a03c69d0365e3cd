"""The noise ablation in figure 39 (arXiv:2405.15319) on a CPU: 0, 20 and 50 %.

    python -m scripts.bakeoff configs/noise_tiny.py

trains with noise after stacking and after an uneven split; other settings are from bakeoff_tiny.py.
"""

import dataclasses

import bakeoff_tiny
from common import bakeoff

from stackjax.config import Config
from stackjax.model.flops import flops_6nd


def get_config() -> Config:
    """Returns the run with stacking, without noise."""
    return dataclasses.replace(bakeoff_tiny.get_config(), workdir="runs/noise_tiny")


def get_runs(seed: int) -> dict[str, Config]:
    """Returns a run for every noise level."""
    config = get_config()
    return bakeoff.runs(
        config,
        bakeoff.noisy(),
        timings={"d": bakeoff_tiny.TOKENS // 10},
        flops=flops_6nd(config.model) * bakeoff_tiny.TOKENS,
        seed=seed,
    )
