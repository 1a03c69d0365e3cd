"""G_stack at 1.1B (arXiv:2405.15319): 6 layers for 10B tokens, then 24 for 97.5B.

    python -m stackjax.train --config configs/gstack_1b.py

on GPU hosts or a TPU slice, with the same command on every host. The target has 1.364B parameters.
The paper reaches a training loss of 2.15 at 8e20 FLOPs, a speed-up of 49 % over scratch.
"""

from common.paper import gstack

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return gstack("1b", tokens=97_500_000_000, accumulate=16)
