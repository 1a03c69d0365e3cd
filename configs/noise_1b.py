"""The noise ablation in figure 39 (arXiv:2405.15319) at 1.1B: 0, 20 and 50 %.

    python -m stackjax.train --config configs/noise_1b.py --stages.1.growth 'stack(4)+noise(0.2)'

adds noise after stacking (8 to 24 layers in the paper), or after an uneven split of 24 x 1024;
`python -m scripts.bakeoff configs/noise_1b.py --dry-run` prints a command for each run.
"""

import dataclasses

import gstack_1b
from common import bakeoff

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run with stacking, without noise."""
    return dataclasses.replace(gstack_1b.get_config(), workdir="runs/noise_1b")


def get_runs(seed: int) -> dict[str, Config]:
    """Returns a run for every noise level."""
    return bakeoff.runs(
        get_config(),
        bakeoff.noisy(),
        timings={"d": 10_000_000_000},
        flops=8e20,
        seed=seed,
    )
