"""SPARKLING, twice the width in the middle of a run (arXiv:2602.02472), at 1.1B.

    python -m stackjax.train --config configs/recipes/sparkling_1b.py
    python -m scripts.bakeoff configs/recipes/sparkling_1b.py --dry-run

The first command grows 24 layers from 1024 to 2048 channels (1.364B parameters). The second prints a
command for kept, reset and grown optimizer state, with and without a warm-up of new parameters, and
for scratch, with AdamW and Muon, all for the FLOPs of 25 billion tokens from scratch.

As in the source: growth after half of the tokens, old moments kept and new moments zero, the rate of
old parameters unchanged, a warm-up of new parameters over 250 steps to 1.3 times this rate, copies
of all channels, units and heads. For twice the width, the source's scale for copies is a half, as in
an even split, so the growth is function-preserving.

Different: a dense model; version 1 has mixtures of experts. The source grows the width inside experts
and of the model separately too. The run named `keep and rewarm` is the recipe. With a reset or grown
state and no warm-up, an even split leaves copies equal: the source calls this locked symmetry.

The source does not say, as far as we could read it: the schedule (here a single cosine to a tenth, a
warm-up of 2 %). Model, batch and AdamW's rate are those of arXiv:2405.15319; Muon's rate is ours.
"""

import dataclasses

from parts import sizes, sparkling

from stackjax.config import Config
from stackjax.model.flops import flops_6nd
from stackjax.optimizers import Muon

SCRATCH = sizes.llama_1b("sparkling_1b")
FLOPS = 25_000_000_000 * flops_6nd(SCRATCH.model)
REWARM_TOKENS = 250 * 1024 * 2048
OPTIMIZERS = {
    "AdamW": SCRATCH,
    "Muon": dataclasses.replace(SCRATCH, optimizer=Muon(peak_learning_rate=1e-3)),
}


def get_config() -> Config:
    """Returns the run of SPARKLING, with AdamW."""
    return sparkling.grown(SCRATCH, rewarm_tokens=REWARM_TOKENS, flops=FLOPS)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return sparkling.runs(OPTIMIZERS, rewarm_tokens=REWARM_TOKENS, flops=FLOPS, seed=seed)
