"""Growth timing and factor (arXiv:2405.15319, figures 8 to 10), on a CPU: 8 layers x 64.

    python -m scripts.sweep configs/isoflop_tiny.py --jobs 2 --seeds 0 1 \\
      --tokens 25e3 50e3 100e3 200e3 400e3 800e3 --growths 'stack(2)' 'stack(4)' 'stack(8)'

Every cell has the FLOPs of 500,000 bytes from scratch. isoflop_tiny_narrow.py has half the width.
"""

from common import sizes

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run with stacking by 4 after a fifth of the bytes."""
    return isoflop_run(64, "runs/isoflop_tiny")


def isoflop_run(width: int, workdir: str) -> Config:
    """Returns a run with about the FLOPs of 500,000 bytes from scratch."""
    return sizes.grown_run(
        sizes.model_of(width), small_tokens=100_000, tokens=470_000, workdir=workdir
    )
