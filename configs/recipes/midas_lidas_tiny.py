"""MIDAS (arXiv:2409.19044) and LIDAS (arXiv:2512.08819): four layers at a time, on a CPU.

    python -m stackjax.train --config configs/recipes/midas_lidas_tiny.py
    python -m scripts.bakeoff configs/recipes/midas_lidas_tiny.py --jobs 2

The first command trains LIDAS with 4, 8, then 12 layers, in about two minutes on two cores. The
second compares LIDAS, MIDAS, copies of the last block, and scratch, for the FLOPs of 500,000 bytes
from scratch.

As in the sources: blocks of four layers and their places. From one block to two, all places are the
same; the runs differ in the last growth. Different: the size; all that midas_lidas_360m.py lists.
"""

from parts import midas, sizes

from stackjax.config import Config
from stackjax.model.flops import flops_6nd

SCRATCH = sizes.tiny("midas_lidas_tiny")
FLOPS = 500_000 * flops_6nd(SCRATCH.model)


def get_config() -> Config:
    """Returns the run of LIDAS."""
    return midas.grown(SCRATCH, "center", flops=FLOPS)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return midas.runs(SCRATCH, flops=FLOPS, seed=seed)
