"""The operators in figure 3 (arXiv:2405.15319) at the paper's size: 1.1B, 8e20 FLOPs.

    python -m scripts.bakeoff configs/bakeoff_1b.py --dry-run

prints a command for each operator at d = 10 and 50 billion tokens, and for scratch.
"""

import dataclasses

import gstack_1b
from common import bakeoff

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run with stacking."""
    return dataclasses.replace(gstack_1b.get_config(), workdir="runs/bakeoff_1b")


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return bakeoff.runs(
        get_config(),
        # 5000 steps per mask, as in the released code.
        bakeoff.operators(mask_tokens=5_000 * 1024 * 2048, fit_steps=100),
        timings={"d": 10_000_000_000, "5d": 50_000_000_000},
        flops=8e20,
        seed=seed,
    )
