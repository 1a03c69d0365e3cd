"""MIDAS (arXiv:2409.19044) and LIDAS (arXiv:2512.08819) with the sizes of SmolLM-360M.

    python -m stackjax.train --config configs/recipes/midas_lidas_360m.py
    python -m scripts.bakeoff configs/recipes/midas_lidas_360m.py --dry-run

The first command trains LIDAS: 4, 8, ... 32 layers, in eight stages. The second prints a command for
LIDAS, for MIDAS, for copies of the last block (gradual stacking), and for scratch, all for the FLOPs
of 20 billion tokens from scratch.

As in the sources: SmolLM-360M's sizes (LIDAS), blocks of four layers, one block per growth, stage
lengths in proportion to a power of the number of blocks (MIDAS). MIDAS repeats the middle block;
LIDAS inserts, between the two middle blocks, the upper half of the lower one and the lower half of
the upper one. For an odd number of blocks, both are the same.

Different: the sources compare runs with equal tokens; here FLOPs are equal. Far fewer tokens.

The sources do not say, as far as we could read them: the power for SmolLM (here 1), when the rate
decays (here a single WSD schedule, with a warm-up of 1 % and a decay to 0 in the last 20 %, all with
32 layers), and the optimizer state after growth (here old moments are kept). Batch and rate are ours.
"""

from parts import midas, sizes

from stackjax.config import Config
from stackjax.model.flops import flops_6nd

SCRATCH = sizes.smollm("midas_lidas_360m")
FLOPS = 20_000_000_000 * flops_6nd(SCRATCH.model)


def get_config() -> Config:
    """Returns the run of LIDAS."""
    return midas.grown(SCRATCH, "center", flops=FLOPS)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return midas.runs(SCRATCH, flops=FLOPS, seed=seed)
