"""G_stack at 7B (arXiv:2405.15319): 8 layers for 10B tokens, then 32 for 300B.

    python -m stackjax.train --config configs/gstack_7b.py

on GPU hosts or a TPU slice, with the same command on every host. The target has 5.933B parameters.
The paper reaches scratch's loss at 300B tokens after 194B tokens, a speed-up of 54.6 %.
"""

from common.paper import gstack

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return gstack("7b", tokens=300_000_000_000, accumulate=32)
