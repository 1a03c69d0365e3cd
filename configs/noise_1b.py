"""The noise ablation of arXiv:2405.15319, figure 39, at 1.1B: 0, 20 and 50 %.

    python -m stackjax.train --config configs/noise_1b.py --stages.1.growth 'stack(4)+noise(0.2)'

after stacking (the paper: 8 layers to 24) and after an uneven split of 24 x 1024;
`python -m scripts.bakeoff configs/noise_1b.py --dry-run` lists a command for each.
"""

import dataclasses

import gstack_1b
from common import bakeoff

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run that stacks, without noise."""
    return dataclasses.replace(gstack_1b.get_config(), workdir="runs/noise_1b")


def get_runs(seed: int) -> dict[str, Config]:
    """Returns the run of every amount of noise."""
    return bakeoff.runs(
        get_config(),
        bakeoff.noisy(),
        timings={"d": 10_000_000_000},
        flops=8e20,
        seed=seed,
    )
