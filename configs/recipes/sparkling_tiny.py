"""SPARKLING, twice the width in the middle of a run (arXiv:2602.02472), on a CPU.

    python -m stackjax.train --config configs/recipes/sparkling_tiny.py
    python -m scripts.bakeoff configs/recipes/sparkling_tiny.py --jobs 2 --seeds 1

The first command grows 12 layers from 32 to 64 channels, in about two minutes on two cores. The
second compares kept, reset and grown optimizer state, with and without a warm-up of new parameters,
with AdamW and Muon, for the FLOPs of 500,000 bytes from scratch.

As in the source: growth after half of the tokens, old moments kept and new moments zero, new
parameters at 1.3 times the rate of old ones. Different: the size, a warm-up of 25 steps, because
the second stage has about 200; all that sparkling_1b.py lists.
"""

import dataclasses

from parts import sizes, sparkling

from stackjax.config import Config
from stackjax.model.flops import flops_6nd
from stackjax.optimizers import Muon

SCRATCH = sizes.tiny("sparkling_tiny")
FLOPS = 500_000 * flops_6nd(SCRATCH.model)
REWARM_TOKENS = 25 * 16 * 128
OPTIMIZERS = {
    "AdamW": SCRATCH,
    "Muon": dataclasses.replace(SCRATCH, optimizer=Muon(peak_learning_rate=4e-3)),
}


def get_config() -> Config:
    """Returns the run of SPARKLING, with AdamW."""
    return sparkling.grown(SCRATCH, rewarm_tokens=REWARM_TOKENS, flops=FLOPS)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return sparkling.runs(OPTIMIZERS, rewarm_tokens=REWARM_TOKENS, flops=FLOPS, seed=seed)
