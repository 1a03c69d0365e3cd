"""G_stack at 410M (arXiv:2405.15319): 6 layers for 10B tokens, then 24 for 750B.

    python -m stackjax.train --config configs/gstack_410m.py

on GPU hosts or a TPU slice, with the same command on every host. The target has 0.374B parameters.
The paper's speed-up shrinks from 53 % at 400B tokens to 31 % at 700B.
"""

import dataclasses

from common.paper import SCHEDULE, gstack

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return gstack(
        "410m",
        tokens=750_000_000_000,
        accumulate=8,
        # Ours: the released horizon of 629B tokens would end before the run.
        schedule=dataclasses.replace(SCHEDULE, horizon_tokens=750_000_000_000),
    )
