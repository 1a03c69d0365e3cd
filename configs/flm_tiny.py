"""Three sizes on a CPU, grown in depth and width like FLM-101B (arXiv:2309.03852).

    python -m stackjax.train --config configs/flm_tiny.py

3 layers x 32 channels, then 6 x 64, then 12 x 128. New parameters are masked, so growth preserves
the loss. The optimizer keeps its moments.
"""

import dataclasses

import tiny

from stackjax.config import Config
from stackjax.growth import DepthRandom, WidthRandom, chain


def get_config() -> Config:
    """Returns the run."""
    config = tiny.get_config()
    growth = chain(
        DepthRandom(2, mask_tokens=40_000),
        WidthRandom(embed=2, mlp=2, heads=2, mask_tokens=40_000),
    )
    base = dataclasses.replace(config.stages[0], tokens=200_000)
    grown = dataclasses.replace(base, growth=growth, optimizer_state="keep")
    model = dataclasses.replace(
        config.model, embed_dim=128, mlp_dim=352, num_heads=8, num_kv_heads=8, head_dim=16
    )
    return dataclasses.replace(
        config, model=model, stages=(base, grown, grown), workdir="runs/flm_tiny"
    )
