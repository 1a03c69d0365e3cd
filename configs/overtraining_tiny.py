"""Data scaling (arXiv:2405.15319, figure 6) on a CPU: a fixed size, up to 8M bytes.

    python -m scripts.scale configs/overtraining_tiny.py --jobs 2

trains 8 layers x 32 channels, grown and from scratch, for the FLOPs of 2 to 70 bytes per parameter.
As in the paper, the small model always sees the same number of bytes. A single run:

    python -m stackjax.train --config configs/overtraining_tiny.py
"""

from common import sizes

from stackjax.config import Config

TOKENS = (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000)
SMALL_TOKENS = 50_000


def get_config() -> Config:
    """Returns the shortest grown run."""
    return _grown(TOKENS[0])


def get_runs(seed: int) -> dict[str, Config]:
    """Returns the runs for every length."""
    found = {}
    for tokens in TOKENS:
        found |= sizes.pair(_grown(tokens), tokens, seed)
    return found


def _grown(tokens: int) -> Config:
    return sizes.grown_run(
        sizes.model_of(32),
        small_tokens=SMALL_TOKENS,
        tokens=tokens,
        workdir=f"runs/overtraining_tiny/{tokens}_bytes",
    )
