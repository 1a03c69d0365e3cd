"""Stacking and interleaving under CompleteP (arXiv:2505.01618), on a CPU: 3 layers to 12.

    python -m stackjax.train --config configs/recipes/completep_tiny.py
    python -m scripts.bakeoff configs/recipes/completep_tiny.py --jobs 2

The first command interleaves under CompleteP, in about two minutes on two cores. The second compares
stacking, interleaving and scratch, standard and under CompleteP, for the FLOPs of 500,000 bytes from
scratch. The growth and the comparison are ours; completep_124m.py says what the source has.
"""

from parts import completep, sizes

from stackjax.config import Config
from stackjax.growth import Interleave
from stackjax.model.flops import flops_6nd

SCRATCH = sizes.tiny("completep_tiny")
FLOPS = 500_000 * flops_6nd(SCRATCH.model)


def get_config() -> Config:
    """Returns the run with interleaving, under CompleteP."""
    run = completep.under_completep(SCRATCH)
    return completep.grown(run, Interleave(completep.FACTOR), flops=FLOPS)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return completep.runs(SCRATCH, flops=FLOPS, seed=seed)
