"""The eight patterns of arXiv:2405.15319, Table 5, at 1.1B: 6 layers become 24.

    python -m stackjax.train --config configs/table5_1b.py --stages.1.growth 'layer_map(12-3456*5-56)'

The paper's ranking, best first: 123456*4, 12-3456*5-56, 12-345*7-6 and 123-456*7; then 1234-56*10,
12-34*10-56 and 1-234*7-56; then scratch; then 123*7-456.
`python -m scripts.bakeoff configs/table5_1b.py --dry-run` prints a command for each.
"""

import dataclasses

import gstack_1b
from common import bakeoff

from stackjax.config import Config
from stackjax.growth import LayerMap


def get_config() -> Config:
    """Returns the run with the whole stack repeated."""
    config = gstack_1b.get_config()
    base, last = config.stages
    last = dataclasses.replace(last, growth=LayerMap("123456*4"))
    return dataclasses.replace(config, stages=(base, last), workdir="runs/table5_1b")


def get_runs(seed: int) -> dict[str, Config]:
    """Returns a run for every pattern."""
    return bakeoff.runs(
        get_config(),
        bakeoff.PATTERNS,
        timings={"d": 10_000_000_000},
        flops=8e20,
        seed=seed,
    )
