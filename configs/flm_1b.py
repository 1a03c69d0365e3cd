"""Three sizes up to 1.1B, grown in depth and width like FLM-101B (arXiv:2309.03852).

    python -m stackjax.train --config configs/flm_1b.py

6 layers x 512 channels, then 12 x 1024, then 24 x 2048, with 25, 25 and 50 billion tokens. FLM-101B
trained 16B, 51B and 101B parameters on 79, 13 and 8 % of its tokens. Masks open over 2500 steps.
"""

import dataclasses

import gstack_1b

from stackjax.config import Config
from stackjax.growth import DepthRandom, WidthRandom, chain


def get_config() -> Config:
    """Returns the run."""
    config = gstack_1b.get_config()
    mask_tokens = 2_500 * 1024 * 2048
    growth = chain(
        DepthRandom(2, mask_tokens),
        WidthRandom(embed=2, mlp=2, heads=2, mask_tokens=mask_tokens),
    )
    base, last = config.stages
    small = dataclasses.replace(base, tokens=25_000_000_000)
    middle = dataclasses.replace(small, growth=growth, optimizer_state="keep")
    large = dataclasses.replace(
        last, tokens=50_000_000_000, growth=growth, optimizer_state="keep"
    )
    return dataclasses.replace(config, stages=(small, middle, large), workdir="runs/flm_1b")
