"""G_stack at 3B (arXiv:2405.15319): 8 layers for 10B tokens, then 32 for 300B.

    python -m stackjax.train --config configs/gstack_3b.py

on GPU hosts or a TPU slice, with the same command on every host. The target has 2.397B parameters.
The paper measures a speed-up of 48.6 % at 180B tokens and 54.5 % at 240B.
"""

from common.paper import gstack

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return gstack("3b", tokens=300_000_000_000, accumulate=16)
