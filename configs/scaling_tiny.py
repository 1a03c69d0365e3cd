"""The scaling law (arXiv:2405.15319, figure 7) on a CPU: four sizes, grown and from scratch.

    python -m scripts.scale configs/scaling_tiny.py --jobs 2

trains 8 layers x 32, 48, 64 and 80 channels, for the FLOPs of 2.5 bytes per parameter from scratch.
The small model has 2 layers and sees a tenth of these bytes. A single grown run:

    python -m stackjax.train --config configs/scaling_tiny.py
"""

from common import sizes

from stackjax.config import Config
from stackjax.model.flops import num_params

WIDTHS = (32, 48, 64, 80)
TOKENS_PER_PARAM = 2.5


def get_config() -> Config:
    """Returns the grown run with 64 channels."""
    return _grown(64)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns the runs for every size."""
    found = {}
    for width in WIDTHS:
        grown = _grown(width)
        found |= sizes.pair(grown, grown.stages[-1].tokens or 0, seed)
    return found


def _grown(width: int) -> Config:
    model = sizes.model_of(width)
    tokens = int(TOKENS_PER_PARAM * num_params(model))
    workdir = f"runs/scaling_tiny/{width}_channels"
    return sizes.grown_run(model, small_tokens=tokens // 10, tokens=tokens, workdir=workdir)
