"""Upcycling: a dense 1.3B model for 10B tokens, then 64 experts for 100B.

    python -m stackjax.train --config configs/upcycle_moe_1b.py

The target is that of gstack_moe_1b.py with normalized shares. An expert is an eighth of an MLP, and
a token has whole copies, so growth is function-preserving (arXiv:2410.07524).
"""

import dataclasses

import gstack_moe_1b

from stackjax.config import Config
from stackjax.growth import Upcycle


def get_config() -> Config:
    """Returns the run."""
    config = gstack_moe_1b.get_config()
    routing = dataclasses.replace(gstack_moe_1b.ROUTING, normalize=True)
    base, last = config.stages
    growth = Upcycle(experts=64, top_k=8, granularity=8)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, routing=routing),
        stages=(base, dataclasses.replace(last, growth=growth)),
        workdir="runs/upcycle_moe_1b",
    )
