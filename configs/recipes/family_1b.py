"""A family of three models up to 1.1B, each grown from the one before (arXiv:2504.00623).

    python -m stackjax.train --config configs/recipes/family_1b.py
    python -m scripts.bakeoff configs/recipes/family_1b.py --dry-run

The first command trains 12 layers x 1024 channels (0.22B parameters), 24 x 1024 (0.37B), then
24 x 2048 (1.36B). The second prints a command for the family, for a family with one rate for all
members, and for the largest member from scratch. A stage is a member, trained to the end of its own
schedule; its last checkpoint is always kept. To export the members to transformers:

    python -m stackjax.convert 'runs/recipes/family_1b/stage_0/train/STEP' member_0.2b

for the last STEP in the directory, and likewise stage_1 and stage_2. The run itself is the largest
member: `python -m stackjax.convert runs/recipes/family_1b member_1.4b`.

As in the source: the whole family costs as much as its largest member from scratch. Larger members
have lower peak rates. Here each member, with all members before it, also costs as much as the member
from scratch.

Different: three members up to 1.1B, for a family from 1B to 8B. Rates of the two larger members and the
batch are those of arXiv:2405.15319, the rate of the smallest is ours.

The source does not say, as far as we could read it: the tokens per parameter (here 20 from scratch), the
growth (here stacking and an uneven split), the optimizer state after growth (here reset), and the
schedule (here a warm-up of 5 % and a cosine to a tenth for each member).
"""

from parts import family, sizes

from stackjax.config import Config
from stackjax.growth import Stack, WidthSplit

SCRATCH = sizes.llama_1b("family_1b")
GROWTHS = (Stack(2), WidthSplit(embed=2, mlp=2, heads=2, split="uneven"))
PEAKS = (1e-3, 6e-4, 3e-4)
TOKENS_PER_PARAM = 20


def get_config() -> Config:
    """Returns the family."""
    return family.family(SCRATCH, GROWTHS, PEAKS, tokens_per_param=TOKENS_PER_PARAM)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return family.runs(SCRATCH, GROWTHS, PEAKS, tokens_per_param=TOKENS_PER_PARAM, seed=seed)
