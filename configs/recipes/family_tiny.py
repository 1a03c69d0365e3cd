"""A family of three models, each grown from the one before (arXiv:2504.00623), on a CPU.

    python -m stackjax.train --config configs/recipes/family_tiny.py
    python -m scripts.bakeoff configs/recipes/family_tiny.py --jobs 2

The first command trains 3 layers x 32 channels, 6 x 32, then 6 x 64, in about two minutes on two
cores. The second compares the largest member with a family with one rate for all members, and with
scratch. A stage is a member, trained to the end of its own schedule. To export the members:

    python -m stackjax.convert 'runs/recipes/family_tiny/stage_0/train/STEP' member_3x32

for the last STEP in the directory, and likewise stage_1 and stage_2.

As in the source: the whole family costs as much as its largest member from scratch; larger members
have lower peak rates. Different: the size, and 5 bytes per parameter; all that family_1b.py lists.
"""

from parts import family, sizes

from stackjax.config import Config
from stackjax.growth import Stack, WidthSplit

SCRATCH = sizes.tiny("family_tiny", num_layers=6)
GROWTHS = (Stack(2), WidthSplit(embed=2, mlp=2, heads=2, split="uneven"))
PEAKS = (8e-3, 6e-3, 4e-3)
TOKENS_PER_PARAM = 5


def get_config() -> Config:
    """Returns the family."""
    return family.family(SCRATCH, GROWTHS, PEAKS, tokens_per_param=TOKENS_PER_PARAM)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return family.runs(SCRATCH, GROWTHS, PEAKS, tokens_per_param=TOKENS_PER_PARAM, seed=seed)
